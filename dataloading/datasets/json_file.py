"""JSON of a data set: one value a file, or one object a line.

Errors name file, line and what was expected, never a word of the content: it may be a report.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlip.dataloading.datasets.rows import MAX_TABLE_BYTES, DatasetError

# an escape or bytes of a surrogate, or UTF-16: of a pair, or of half of one
_MAY_BE_HALF = re.compile(rb"\\u[dD][89a-fA-F]|\xed[\xa0-\xbf]|\0")
MAX_LINE_BYTES = 1 << 20  # of one image's labels; real ones have about 400


def read_json(path: Path, expected: str, access: str) -> Any:
    """The value of a JSON file; `expected` says in the error what it should hold.

    Raises:  DatasetError naming the file where it is too large, unreadable or no JSON.
    """
    try:
        is_large = path.stat().st_size > MAX_TABLE_BYTES
        content = b"" if is_large else path.read_bytes()
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read: {error.strerror}") from None
    if is_large:
        raise DatasetError(f"{path}: has more than {MAX_TABLE_BYTES} bytes")
    try:
        value = json.loads(content)
        is_text = not _MAY_BE_HALF.search(content) or _is_unicode(value)
    except (ValueError, RecursionError):
        raise DatasetError(
            f"{path}: is no JSON: expected {expected}; fetch the file again. It is part of {access}"
        ) from None
    if not is_text:
        raise DatasetError(
            f"{path}: a text holds half a surrogate pair (\\ud800 to \\udfff), which is no "
            f"character: fetch the file again. It is part of {access}"
        )
    return value


def _is_unicode(value: Any) -> bool:
    """Whether each text can be written: found here, not after hours of images."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def read_json_lines(path: Path, key: str, access: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The text under `key` of each line's object, and the object.

    Raises:  DatasetError naming file and line of one that is no object or has no such text.
    """
    number = 0
    try:
        with open(path, "rb") as file:
            while line := file.readline(MAX_LINE_BYTES):
                number += 1
                if not line.strip():
                    continue
                entry = json.loads(line)
                if not isinstance(entry, dict) or not isinstance(entry.get(key), str):
                    raise ValueError
                yield entry[key], entry
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise DatasetError(
            f"{path}: line {number}: expected a JSON object with {key}; fetch the file again. It "
            f"is part of {access}"
        ) from None
