"""CSV, Parquet or JSONL as text columns; every fault is one ManifestError without cell contents."""

from __future__ import annotations

import csv
import difflib
import hashlib
import io
import json
from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet

_NAMED_LINES = 5  # how many bad lines an error names
_TEXT = pa.large_string()
_BLOCK_BYTES = 16 << 20  # Arrow wants every row inside one block; reports of a megabyte happen


class ManifestError(ValueError):
    """A manifest that cannot be used; the message never holds report text or an identifier."""

    exit_code = 3


def read_table(path: Path, wanted: Mapping[str, str]) -> tuple[dict[str, pa.ChunkedArray], str]:
    """Field -> text column for the wanted columns (field -> column name), and the SHA-256.

    Columns stay in the pieces they were read in: a copy of all texts would be half the memory.

    Raises:  ManifestError: unreadable, another format, ragged rows, missing or doubled columns.
    """
    readers = {
        ".csv": _read_csv,
        ".tsv": _read_csv,
        ".parquet": _read_parquet,
        ".jsonl": _read_jsonl,
        ".ndjson": _read_jsonl,
    }
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise ManifestError(
            f"{path}: expected a .csv, .tsv, .parquet or .jsonl manifest, got suffix "
            f"{path.suffix!r}"
        )
    try:
        with open(path, "rb") as stream:
            fingerprint = hashlib.file_digest(stream, "sha256").hexdigest()
        table = reader(path, wanted)
    except OSError as error:
        raise ManifestError(f"{path}: cannot be read: {error.strerror}") from None
    except pa.ArrowException:
        # Arrow's own messages quote cells
        raise ManifestError(
            f"{path}: cannot be read as {path.suffix[1:]}: damaged, or not UTF-8"
        ) from None
    columns = {field: _as_text(table.column(name), name, path) for field, name in wanted.items()}
    del table
    # what parsing needed: 100 MiB of a million rows
    pa.default_memory_pool().release_unused()
    return columns, fingerprint


def _check_columns(names: list[str], wanted: Mapping[str, str], path: Path) -> None:
    missing = {field: name for field, name in wanted.items() if name not in names}
    if missing:
        parts = []
        for field, name in missing.items():
            near = difflib.get_close_matches(name, names, n=1)
            hint = f", nearest is {near[0]!r}" if near else ""
            parts.append(f"{name!r} (data.columns.{field}{hint})")
        raise ManifestError(
            f"{path}: missing columns: {'; '.join(parts)}. The manifest has: "
            f"{', '.join(names[:40]) or 'no columns'}. Map them with data.columns.<field>=<name>, "
            "or null where there is none"
        )
    doubled = sorted({n for n in wanted.values() if names.count(n) > 1})
    if doubled:
        raise ManifestError(f"{path}: columns that occur twice: {', '.join(doubled)}")


def _read_csv(path: Path, wanted: Mapping[str, str]) -> pa.Table:
    with open(path, "rb") as stream:
        head = stream.read(1 << 16).removeprefix(b"\xef\xbb\xbf")
    try:
        line = head.split(b"\n", 1)[0].decode("utf-8").rstrip("\r")
    except UnicodeDecodeError:
        raise ManifestError(f"{path}: not UTF-8: save it as UTF-8 text") from None
    if not line.strip():
        raise ManifestError(f"{path}: the manifest is empty: expected a header line")
    delimiter = max(",;\t", key=line.count)
    names = next(csv.reader(io.StringIO(line), delimiter=delimiter))
    _check_columns(names, wanted, path)
    ragged = 0

    def count_ragged(row: pa.csv.InvalidRow) -> str:
        nonlocal ragged
        ragged += 1
        return "skip"

    table = pa.csv.read_csv(
        path,
        read_options=pa.csv.ReadOptions(block_size=_BLOCK_BYTES),
        parse_options=pa.csv.ParseOptions(
            delimiter=delimiter, newlines_in_values=True, invalid_row_handler=count_ragged
        ),
        convert_options=pa.csv.ConvertOptions(
            include_columns=sorted(set(wanted.values())),
            column_types=dict.fromkeys(wanted.values(), _TEXT),
            strings_can_be_null=True,
            quoted_strings_can_be_null=True,
            null_values=[""],
        ),
    )
    if ragged:
        lines = _ragged_lines(path, delimiter, len(names))
        raise ManifestError(
            f"{path}: {ragged} rows do not have the header's {len(names)} columns"
            f"{' (lines ' + ', '.join(map(str, lines)) + ')' if lines else ''}: quote cells that "
            "hold the delimiter or a line break"
        )
    return table


def _ragged_lines(path: Path, delimiter: str, columns: int) -> list[int]:
    lines: list[int] = []
    try:
        with open(path, encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(stream, delimiter=delimiter)
            for row in reader:
                if row and len(row) != columns:
                    lines.append(reader.line_num)
                if len(lines) == _NAMED_LINES:
                    break
    except (csv.Error, UnicodeDecodeError):
        return lines
    return lines


def _read_parquet(path: Path, wanted: Mapping[str, str]) -> pa.Table:
    schema = pa.parquet.read_schema(path)
    _check_columns(list(schema.names), wanted, path)
    return pa.parquet.read_table(path, columns=sorted(set(wanted.values())))


def _read_jsonl(path: Path, wanted: Mapping[str, str]) -> pa.Table:
    names: dict[str, None] = {}
    with open(path, encoding="utf-8") as stream:
        for number, line in enumerate(stream, start=1):
            if number > 100 or set(wanted.values()) <= names.keys():
                break
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                raise ManifestError(f"{path}: line {number} is not JSON") from None
            if not isinstance(row, dict):
                raise ManifestError(f"{path}: line {number}: expected a JSON object")
            names.update(dict.fromkeys(row))
    _check_columns(list(names), wanted, path)
    blocks = pa.json.ReadOptions(block_size=_BLOCK_BYTES)
    texts = pa.schema([(name, pa.string()) for name in sorted(set(wanted.values()))])
    try:
        return pa.json.read_json(
            path,
            read_options=blocks,
            parse_options=pa.json.ParseOptions(
                explicit_schema=texts, newlines_in_values=False, unexpected_field_behavior="ignore"
            ),
        )
    except pa.ArrowInvalid:
        # some column holds numbers: let Arrow find the types, they become text below
        return pa.json.read_json(path, read_options=blocks)


def _as_text(column: pa.ChunkedArray, name: str, path: Path) -> pa.ChunkedArray:
    kind = column.type
    if pa.types.is_dictionary(kind):
        column = pc.cast(column, kind.value_type)
        kind = column.type
    if not (
        pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_integer(kind)
        or pa.types.is_null(kind)
    ):
        # a number with a point cannot be turned back into the identifier it was
        raise ManifestError(f"{path}: column {name!r}: expected text or integers, got {kind}")
    return pc.cast(column, _TEXT)
