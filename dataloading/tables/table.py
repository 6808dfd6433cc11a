"""CSV, Parquet or JSONL as text columns; every fault is one ManifestError without cell contents."""

from __future__ import annotations

import csv
import difflib
import hashlib
import json
import math
import os
from collections.abc import Collection, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet

from mlip.dataloading.tables.cells import TEXT, UNREADABLE, Free, KindError, as_text, check_kind
from mlip.dataloading.tables.csv_text import (
    CsvError,
    check_quotes,
    looks_like_data,
    read_header,
    shown,
)
from mlip.dataloading.tables.text_encoding import first_line_not_utf8, is_utf16
from mlip.system.machine import LimitError, limit_reached, require_threads

_NAMED_LINES = 5  # how many bad lines an error names
_BLOCK_BYTES = 16 << 20  # Arrow wants every row inside one block; reports of a megabyte happen
_ROWS_AT_ONCE = 1 << 15  # of a Parquet file: about a block's worth
_SMALL_BLOCK_BYTES = 1 << 20
_CSV_THREADS = 2  # Arrow's for one CSV: one reads, one parses
_ROUNDED = r"^\s*\d([.,]\d+)?[eE]\+\d+\s*$"
_CSV, _PARQUET, _JSONL = (".csv", ".tsv"), ".parquet", (".jsonl", ".ndjson")
Batches = tuple[pa.Schema, Iterator[pa.RecordBatch]]


class Sink(Protocol):
    """What takes a column's pieces in row order; cleared where reading starts again."""

    def append(self, piece: pa.LargeStringArray) -> None: ...

    def clear(self) -> None: ...


class ManifestError(ValueError):
    """A manifest that cannot be used; the message never holds report text or an identifier."""

    exit_code = 3


def read_table(
    path: Path,
    wanted: Mapping[str, str],
    take: Mapping[str, Sink] | None = None,
    numbers: Collection[str] = (),
    anything: Collection[str] = (),
) -> tuple[dict[str, pa.ChunkedArray], Any]:
    """Field -> text column for the wanted columns (field -> column name), and hashlib's SHA-256.

    Columns stay in the pieces they were read in: a copy of all texts would be half the memory.
    `take` (field -> sink) gets a field's pieces in row order as they are read, in place of a
    column of the result: at no time are all of them in memory. Fields in `numbers` may hold numbers
    with a point and truth values too: "1", "0.5", "true". Those in `anything` may hold whatever a
    table can, which is UNREADABLE where it is neither text nor number: a date, a list.

    Raises:  ManifestError: unreadable, another format, ragged rows, missing or doubled columns.
    """
    _check_suffix(path)
    suffix = path.suffix.lower()
    free = Free({*numbers, *anything}, frozenset(anything))
    try:
        with open(path, "rb") as stream:
            digest = hashlib.file_digest(stream, "sha256")
        if suffix == _PARQUET:
            columns = _collect(_read_parquet(path, wanted), path, wanted, take or {}, free)
        elif suffix in _JSONL:
            reader = _read_jsonl(path, wanted, free)
            columns = _collect(reader, path, wanted, take or {}, free)
        else:
            columns = _whole_csv(path, wanted, take or {}, free)
    except OSError as error:
        if error.errno is None:  # Arrow's, of a damaged Parquet file
            raise _explained(error, path) from None
        below = "" if path.is_absolute() else f" (looked for below {os.getcwd()})"
        raise ManifestError(f"{path}: cannot be read: {error.strerror}{below}") from None
    except (CsvError, KindError, UnicodeError, pa.ArrowException) as error:
        raise _explained(error, path) from None
    # what parsing needed: 100 MiB of a million rows
    pa.default_memory_pool().release_unused()
    return columns, digest


def column_names(path: Path) -> list[str]:
    """A table's columns, from as little of the file as tells them; of JSONL those of 100 rows.

    Raises:  ManifestError as read_table.
    """
    _check_suffix(path)
    suffix = path.suffix.lower()
    try:
        if suffix == _PARQUET:
            return list(pa.parquet.read_schema(path).names)
        return _jsonl_names(path, set()) if suffix in _JSONL else read_header(path)[0]
    except OSError as error:
        if error.errno is None:
            raise _explained(error, path) from None
        raise ManifestError(f"{path}: cannot be read: {error.strerror}") from None
    except (CsvError, UnicodeError, pa.ArrowException) as error:
        raise _explained(error, path) from None


def _check_suffix(path: Path) -> None:
    if path.suffix.lower() not in (*_CSV, _PARQUET, *_JSONL):
        raise ManifestError(
            f"{path}: expected a .csv, .tsv, .parquet or .jsonl table, got suffix {path.suffix!r}"
        )


def _explained(error: Exception, path: Path) -> ManifestError | LimitError:
    """Without a word of Arrow's or Python's own: they quote cells."""
    if isinstance(error, OSError | pa.ArrowException) and (told := limit_reached(error)):
        return LimitError(f"{path}: cannot be read: {told}")
    if isinstance(error, CsvError | KindError):
        return ManifestError(f"{path}: {error}")
    if isinstance(error, UnicodeEncodeError):
        return ManifestError(
            f"{str(path)!a}: expected a path in UTF-8, which Arrow needs: each \\udc.. is a byte "
            "of another encoding; rename that file or folder"
        )
    kind = path.suffix[1:].lower()
    if kind == "parquet":
        return ManifestError(f"{path}: cannot be read as parquet: damaged, or not UTF-8 text")
    if (line := first_line_not_utf8(path)) is not None:
        return ManifestError(
            f"{path}: cannot be read as {kind}: line {line} is not UTF-8: save the table as UTF-8 "
            "text"
        )
    return ManifestError(
        f"{path}: cannot be read as {kind}: damaged, or a row of more than {_BLOCK_BYTES >> 20} MiB"
    )


def check_identifiers(column: pa.ChunkedArray, name: str, path: Path) -> None:
    """Raises ManifestError where a spreadsheet has rounded identifiers: 1.23E+11 may be anybody."""
    rounded = pc.fill_null(pc.match_substring_regex(column, _ROUNDED), False)
    if count := pc.sum(rounded).as_py():
        raise ManifestError(
            f"{path}: column {name!r} holds {count} identifiers that a spreadsheet has rounded "
            f"(like 1.23E+11), the first in data row {pc.index(rounded, True).as_py() + 1}: their "
            "digits are lost; export the table again without opening it there"
        )


def _whole_csv(
    path: Path, wanted: Mapping[str, str], take: Mapping[str, Sink], free: Free
) -> dict[str, pa.ChunkedArray]:
    """A CSV's columns, read in small blocks, in large ones where a row is longer than those.

    Arrow reads 32 blocks ahead of a slow taker, which are 512 MiB of large ones.
    """
    check_quotes(path, read_header(path)[1])
    try:
        return _collect(_read_csv(path, wanted, _SMALL_BLOCK_BYTES), path, wanted, take, free)
    except pa.ArrowInvalid:
        for sink in take.values():
            sink.clear()
    return _collect(_read_csv(path, wanted, _BLOCK_BYTES), path, wanted, take, free)


def _collect(
    reader: Batches,
    path: Path,
    wanted: Mapping[str, str],
    take: Mapping[str, Sink],
    free: Free,
) -> dict[str, pa.ChunkedArray]:
    pieces: dict[str, list[pa.Array]] = {field: [] for field in wanted if field not in take}
    schema, batches = reader
    for field, name in wanted.items():
        check_kind(schema.field(name).type, field, name, free)
    for batch in batches:
        for field, name in wanted.items():
            piece = as_text(batch.column(name), field, name, free)
            if field in take:
                take[field].append(piece)
            else:
                pieces[field].append(piece)
    return {field: pa.chunked_array(parts, type=TEXT) for field, parts in pieces.items()}


# data.verify asks for that column: null alone would be refused next
_WITHOUT_HASHES = " (without image hashes: data.columns.sha256=null data.verify=none)"


def _check_columns(names: list[str], wanted: Mapping[str, str], path: Path) -> None:
    missing = {field: name for field, name in wanted.items() if name not in names}
    if missing:
        parts = []
        for field, name in missing.items():
            near = [] if looks_like_data(names) else difflib.get_close_matches(name, names, n=1)
            hint = f", nearest is {near[0]!r}" if near else ""
            parts.append(f"{name!r} (data.columns.{field}{hint})")
        raise ManifestError(
            f"{path}: missing columns: {'; '.join(parts)}. The file has: "
            f"{shown(names)}. Map them with data.columns.<field>=<name>, "
            f"or null where there is none{_WITHOUT_HASHES if 'sha256' in missing else ''}"
        )
    doubled = sorted({n for n in wanted.values() if names.count(n) > 1})
    if doubled:
        raise ManifestError(f"{path}: columns that occur twice: {', '.join(doubled)}")


def _read_csv(path: Path, wanted: Mapping[str, str], block_bytes: int) -> Batches:
    names, delimiter = read_header(path)
    _check_columns(names, wanted, path)
    ragged = 0

    def count_ragged(row: pa.csv.InvalidRow) -> str:
        nonlocal ragged
        ragged += 1
        return "skip"

    require_threads(_CSV_THREADS)
    reader = pa.csv.open_csv(
        path,
        read_options=pa.csv.ReadOptions(block_size=block_bytes),
        parse_options=pa.csv.ParseOptions(
            delimiter=delimiter, newlines_in_values=True, invalid_row_handler=count_ragged
        ),
        convert_options=pa.csv.ConvertOptions(
            include_columns=sorted(set(wanted.values())),
            column_types=dict.fromkeys(wanted.values(), TEXT),
            strings_can_be_null=True,
            quoted_strings_can_be_null=True,
            null_values=[""],
        ),
    )

    def batches() -> Iterator[pa.RecordBatch]:
        yield from reader
        if ragged:
            lines = _ragged_lines(path, delimiter, len(names))
            raise ManifestError(
                f"{path}: {ragged} rows do not have the header's {len(names)} columns"
                f"{' (lines ' + ', '.join(map(str, lines)) + ')' if lines else ''}: quote cells "
                "that hold the delimiter or a line break"
            )

    return reader.schema, batches()


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


def _read_parquet(path: Path, wanted: Mapping[str, str]) -> Batches:
    file = pa.parquet.ParquetFile(path)
    _check_columns(list(file.schema_arrow.names), wanted, path)
    columns = sorted(set(wanted.values()))
    return file.schema_arrow, map(_checked, file.iter_batches(_ROWS_AT_ONCE, columns=columns))


def json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and object of each line that is not blank."""
    with open(path, "rb") as raw:
        head = raw.read(2)
    # without a byte-order mark a row still begins with an ASCII character, half of it zero
    if is_utf16(head) or head.count(0) == 1:
        raise ManifestError(f"{path}: not UTF-8 but UTF-16: save it as UTF-8 text")
    with open(path, encoding="utf-8-sig") as stream:
        for number, line in enumerate(stream, start=1):
            if line.isspace():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                raise ManifestError(f"{path}: line {number} is not JSON") from None
            if not isinstance(row, dict):
                raise ManifestError(f"{path}: line {number}: expected a JSON object")
            yield number, row


def _jsonl_names(path: Path, enough: set[str]) -> list[str]:
    """Keys of the first 100 rows, of fewer where those in `enough` are found."""
    names: dict[str, None] = {}
    for _, row in islice(json_rows(path), 100):
        names.update(dict.fromkeys(row))
        if enough and enough <= names.keys():
            break
    return list(names)


def _read_jsonl(path: Path, wanted: Mapping[str, str], free: Free) -> Batches:
    """Row by row: of a column that holds texts here and numbers there Arrow makes nothing, and of
    texts that look like a date a point in time."""
    _check_columns(_jsonl_names(path, set(wanted.values())), wanted, path)
    schema = pa.schema([(name, TEXT) for name in sorted(set(wanted.values()))])
    of_numbers = {wanted[field] for field in free.of_numbers}
    of_anything = {wanted[field] for field in free.of_anything}

    def batches() -> Iterator[pa.RecordBatch]:
        cells: dict[str, list[str | None]] = {name: [] for name in schema.names}
        rows = 0
        for number, row in json_rows(path):
            for name, column in cells.items():
                value = row.get(name)
                if name in of_anything and not isinstance(value, str | float | int | None):
                    value = UNREADABLE
                elif value is not None and type(value) is not str:
                    value = _json_text(value, name, name in of_numbers, f"{path}: line {number}")
                column.append(value)
            rows += 1
            if rows % _ROWS_AT_ONCE == 0:
                yield _as_batch(cells, schema, path)
        yield _as_batch(cells, schema, path)

    return schema, batches()


def _as_batch(cells: dict[str, list[str | None]], schema: pa.Schema, path: Path) -> pa.RecordBatch:
    """The cells as a batch, their lists empty again."""
    try:
        batch = pa.record_batch(list(cells.values()), schema=schema)
    except UnicodeEncodeError:
        raise ManifestError(
            f"{path}: a text holds half a surrogate pair (\\ud800 to \\udfff), which is no "
            "character: mend the export"
        ) from None
    for column in cells.values():
        column.clear()
    return batch


def _json_text(value: Any, name: str, may_be_number: bool, where: str) -> str | None:
    """A cell that is neither null nor text; NaN, which programs write for a gap, is null."""
    if type(value) is int:
        return str(value)
    if type(value) is float and math.isnan(value):
        return None
    if may_be_number and isinstance(value, (bool, float)):
        return json.dumps(value)
    kind = {bool: "a truth value", float: "a number with a point", list: "a list"}
    raise ManifestError(
        f"{where}: column {name!r}: expected text or integers, got "
        f"{kind.get(type(value), 'an object')}"
    )


def _checked(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The batch, whose texts are UTF-8; of a CSV alone Arrow looks at that by itself."""
    batch.validate(full=True)
    return batch
