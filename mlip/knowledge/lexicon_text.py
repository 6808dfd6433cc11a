"""The text of lexicon files: where ours lie, how a file is read, what a line stands for."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable
from pathlib import Path

from mlip.knowledge.concepts import LexiconError

LEXICON_DIR = Path(__file__).with_name("lexicon")
_MAX_FORMS = 10_000  # of one line


def read_text(path: str | Path) -> str:
    """A whole UTF-8 file, with an error that names it.

    Raises:  LexiconError where the file is missing or not UTF-8.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise LexiconError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise LexiconError(
            f"{path}: not UTF-8 (byte {error.start}); convert it, for example with iconv"
        ) from error


def expand(lines: Iterable[str], where: str) -> tuple[str, ...]:
    """Terms with "[a|b|]" written out; an empty alternative leaves the word out.

    where  what an error calls the file and the place in it
    Raises:  LexiconError for a line of more than _MAX_FORMS terms: 40 choices of two are 10^12; for
             a "|" outside of brackets, which would make each part a term ("no sign|evidence")
    """
    forms = []
    for line in lines:
        if re.search(r"[\[\]|]", re.sub(r"\[[^\[\]]*\]", "", line)):
            raise LexiconError(
                f"{where}: in the term {line[:40]!r} a bracket lacks its other, or | stands "
                "outside of brackets: write alternatives as [a|b], none inside another"
            )
        slots = [part.split("|") for part in re.split(r"[\[\]]", line)]
        if math.prod(map(len, slots)) > _MAX_FORMS:
            raise LexiconError(
                f"{where}: a term that begins {line[:40]!r} stands for more than {_MAX_FORMS} "
                "terms: write fewer alternatives in brackets"
            )
        for choice in itertools.product(*slots):
            forms.append(" ".join("".join(choice).split()))
    return tuple(dict.fromkeys(form for form in forms if form))
