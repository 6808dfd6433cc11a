"""Which kinds of cells a table's column may hold, and its pieces as text."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

TEXT = pa.large_string()
UNREADABLE = "?"  # a cell that is neither text nor number, where that is no error
_TEXTS = (
    *(pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view),
    *(pa.types.is_integer, pa.types.is_null),
)
_NUMBERS = (pa.types.is_floating, pa.types.is_boolean, pa.types.is_decimal)


class KindError(ValueError):
    """A column of a kind that it may not be of, without the file's path and without any cell."""


class Free(NamedTuple):
    """Fields that may hold more than text and integers."""

    of_numbers: Collection[str]  # with a point, and truth values
    of_anything: Collection[str]  # these are among of_numbers too


def check_kind(kind: pa.DataType, field: str, name: str, free: Free) -> None:
    """Raises KindError for a column that cannot be text; one of gaps alone is known by its cells.

    field    what the column `name` is wanted as
    """
    may_be_gaps = pa.types.is_floating(kind)
    if not (field in free.of_anything or may_be_gaps or _fits(kind, field, free)):
        raise _of_another_kind(kind, name)


def as_text(piece: pa.Array, field: str, name: str, free: Free) -> pa.LargeStringArray:
    """A piece of the column as texts; NaN is null where no numbers with a point are wanted.

    pandas writes a column of texts that are all missing as numbers that are none.
    Raises:  KindError where some are.
    """
    if pa.types.is_floating(piece.type) and field not in free.of_numbers:
        if not pc.all(pc.is_null(piece, nan_is_null=True)).as_py():
            # a number with a point cannot be turned back into the identifier it was
            raise _of_another_kind(piece.type, name)
        return pa.nulls(len(piece), TEXT)
    if pa.types.is_dictionary(piece.type):
        piece = pc.cast(piece, piece.type.value_type)
    if not _is_one(piece.type, (*_TEXTS, *_NUMBERS)):  # let through as one of anything
        said, nothing = pa.scalar(UNREADABLE, TEXT), pa.scalar(None, TEXT)
        return pc.if_else(piece.is_valid(), said, nothing)
    return pc.cast(piece, TEXT)


def _fits(kind: pa.DataType, field: str, free: Free) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return _is_one(kind, _TEXTS) or field in free.of_numbers and _is_one(kind, _NUMBERS)


def _is_one(kind: pa.DataType, kinds: Iterable[Callable[[pa.DataType], bool]]) -> bool:
    return any(is_one(kind) for is_one in kinds)


def _of_another_kind(kind: pa.DataType, name: str) -> KindError:
    # what evaluate.subgroups cuts into ranges, too
    hint = "; write days as numbers such as 20200131" if pa.types.is_temporal(kind) else ""
    return KindError(f"column {name!r}: expected text or integers, got {kind}{hint}")
