"""A CSV file's header and quoting, judged before Arrow reads it.

Arrow takes a quotation mark that was never closed for the begin of a long cell: the next rows, with
their identifiers, would become part of one patient's report, without an error.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mlip.dataloading.tables.text_encoding import BOM, first_line_not_utf8, is_utf16

_HEAD_BYTES = 1 << 20  # a header line is shorter: 1,500 radiomics features have 75 KB
_BLOCK_BYTES = 4 << 20
_QUOTE = ord('"')
_WORKBOOKS = (b"PK\x03\x04", b"\xd0\xcf\x11\xe0")  # .xlsx is a ZIP file, .xls an OLE one
_SHOWN = 40  # columns that a message names
# What stands in cells and hardly in a column's name: a number or an identifier, a file, a sentence.
# AX-204, A-12-34 and DOE^JOHN are none either; sha256 is.
_DATA = re.compile(
    r"^\d|\d{4}|(?<!sha)(?<!sha[-_])\d{3}|\d[-/]\d|\^|\.[a-z]{3,5}$|[a-z]{4}\.$|[.!?] |^.{61}"
    r"|(\S+\s+){6}",
    re.DOTALL | re.IGNORECASE,
)


class CsvError(ValueError):
    """What is wrong with the text of a CSV file, without its path and without any cell."""


def read_header(path: Path) -> tuple[list[str], str]:
    """Column names and delimiter of a CSV file, from its first record.

    Raises:  CsvError: no text, another encoding, empty; OSError.
    """
    with open(path, "rb") as stream:
        head = stream.read(_HEAD_BYTES)
    if head.startswith(_WORKBOOKS):
        raise CsvError(
            "is an Excel workbook, whatever its name says: save it from there as 'CSV UTF-8'"
        )
    if is_utf16(head):
        raise CsvError("not UTF-8 but UTF-16 ('Unicode text' of Excel): save it as 'CSV UTF-8'")
    record = _first_record(head.removeprefix(BOM))
    if b"\0" in record:
        raise CsvError("its first line holds NUL bytes: this is no text in UTF-8; save it as that")
    if len(record) > _HEAD_BYTES - len(BOM):
        raise CsvError(
            f"its first line is longer than {_HEAD_BYTES >> 20} MiB: expected a header line with "
            "the columns' names"
        )
    try:
        line = record.decode("utf-8")
    except UnicodeDecodeError:
        place = first_line_not_utf8(path)
        raise CsvError(f"line {place} is not UTF-8: save the table as UTF-8 text") from None
    if not line.strip():
        raise CsvError(
            "its first line is blank: expected a header line with the columns' names"
            if head.removeprefix(BOM)
            else "it is empty: expected a header line"
        )
    if re.fullmatch(r'"?sep=.?"?', line.strip(), re.IGNORECASE):  # blank behind it: a tab
        raise CsvError(
            "its first line is 'sep=', which Excel alone reads: remove it, the header comes first"
        )
    bare = re.sub(r'"[^"]*"', "", line)
    delimiter = max(",;\t", key=bare.count)
    try:
        return next(csv.reader(io.StringIO(line, newline=""), delimiter=delimiter)), delimiter
    except csv.Error:  # a cell of more than 128 KiB
        raise _unclosed(1) from None


def _first_record(head: bytes) -> bytes:
    """Up to the first line break outside quotation marks; lines may end in \\n, \\r\\n or \\r."""
    inside = False
    for mark in re.finditer(rb'["\r\n]', head):
        if mark.group() == b'"':
            inside = not inside
        elif not inside:
            return head[: mark.start()]
    return head


def looks_like_data(names: Sequence[str]) -> bool:
    """Whether a header may be a row of data: a table without one shows a report in its place."""
    return any(_DATA.search(name) for name in names)


def shown(names: Sequence[str]) -> str:
    """A header fit for a message: names, or the reason why they are not shown."""
    if looks_like_data(names):
        return (
            f"{len(names)} columns whose first line looks like data and is not shown: expected a "
            "header line with the columns' names"
        )
    listed = (repr(name) if name != name.strip() else name for name in names[:_SHOWN])
    return ", ".join(listed) or "no columns"


def some_shown(names: Sequence[str]) -> str:
    """Columns of a header that was found to be one: those whose names may be told, and how many
    others there are."""
    told = [name for name in names if not looks_like_data([name])][:_SHOWN]
    others = len(names) - len(told)
    return ", ".join(told + [f"{others} others"] * (others > 0))


def check_quotes(path: Path, delimiter: str) -> None:
    """Raises CsvError with the line of a quoted cell that does not end as one.

    A quotation mark inside an unquoted cell (a 5" tube) is text. The quick pass takes every second
    mark for a closing one; where that does not fit, marks are walked one by one.
    """
    fits = np.zeros(256, bool)
    fits[[10, 13, _QUOTE, ord(delimiter)]] = True
    count, before = 0, b"\n"
    with open(path, "rb") as stream:
        block = stream.read(_BLOCK_BYTES).removeprefix(BOM)
        while block:
            following = stream.read(_BLOCK_BYTES)
            text = np.frombuffer(before + block + (following[:1] or b"\n"), np.uint8)
            places = np.flatnonzero(text[1:-1] == _QUOTE) + 1
            opens = np.arange(count, count + len(places)) % 2 == 0
            if not fits[np.where(opens, text[places - 1], text[places + 1])].all():
                return _walk(path, delimiter)
            count, before, block = count + len(places), block[-1:], following
    if count % 2:
        _walk(path, delimiter)


def _walk(path: Path, delimiter: str) -> None:
    ends = b"\r\n" + delimiter.encode()
    opened = line = 1
    inside = escaped = False
    before = b"\n"
    with open(path, "rb") as stream:
        block = stream.read(_BLOCK_BYTES).removeprefix(BOM)
        while block:
            following = stream.read(_BLOCK_BYTES)
            text, last = before + block + (following[:1] or b"\n"), 1
            for mark in re.finditer(b'"', text[1:-1]):
                place = mark.start() + 1
                line += _line_breaks(text, last, place)
                last = place
                if escaped:
                    escaped = False
                elif not inside:
                    inside = text[place - 1] in ends
                    opened = line
                elif text[place + 1] == _QUOTE:
                    escaped = True
                elif text[place + 1] in ends:
                    inside = False
                else:
                    raise _unclosed(opened)
            line += _line_breaks(text, last, len(text) - 1)
            before, block = block[-1:], following
    if inside:
        raise _unclosed(opened)


def _line_breaks(text: bytes, start: int, stop: int) -> int:
    breaks = text.count(b"\n", start, stop)
    return breaks or text.count(b"\r", start, stop)


def _unclosed(line: int) -> CsvError:
    return CsvError(
        f"line {line}: a quoted cell begins there and does not end as one, so the rows behind it "
        "would run into it: write a quotation mark inside a quoted cell twice, or remove it"
    )
