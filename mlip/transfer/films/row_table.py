"""A CSV with a line for each row of a manifest: what a command found of its image, or why nothing.

Rows are numbers of manifest rows, from 0: files and patients stay in the manifest.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from mlip.dataloading.ledger import listed
from mlip.system.output_file import whole_file

# what a cell begins with that Excel and LibreOffice take for a formula, full-width forms too
# (OWASP, CSV Injection)
_FORMULA = tuple("=+-@\t\r\uff1d\uff0b\uff0d\uff20")


def begins_as_formula(text: str) -> bool:
    """Whether a spreadsheet would run a cell of this text, as one that opens the table may."""
    return text.startswith(_FORMULA)


def write_row_table(
    path: Path,
    columns: Sequence[str],
    lines: Mapping[int, Sequence[object]],
    bad: Mapping[int, str],
    *,
    require_own: Callable[[Path], None] | None = None,
) -> None:
    """`row_index`, the columns and, of a row whose image cannot be read, `reason`, by row.

    lines  manifest row -> a cell a column
    bad    manifest row -> why its image cannot be read
    require_own  as of whole_file
    """
    blank = [""] * len(columns)
    every = {row: [*cells, ""] for row, cells in lines.items()}
    every |= {row: [*blank, reason] for row, reason in bad.items()}
    write_private_csv(
        path,
        ["row_index", *columns, "reason"],
        ([row, *every[row]] for row in sorted(every)),
        require_own=require_own,
    )


def write_private_csv(
    path: Path,
    header: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    require_own: Callable[[Path], None] | None = None,
) -> None:
    """A CSV, whole or not there, that its owner alone may read; require_own as of whole_file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path, is_private=True, require_own=require_own) as partial:
        with partial.open("w", encoding="utf-8", newline="") as stream:
            table = csv.writer(stream)
            table.writerow(header)
            table.writerows(rows)


def told(bad: Mapping[int, str]) -> str:
    """Reasons of bad rows with their counts, "missing 3, truncated 1"."""
    return listed(Counter(bad.values()))


def unread(bad: Mapping[int, str]) -> str:
    """The end of a line about a table: "" where every image could be read."""
    return f"; {len(bad)} cannot be read ({told(bad)})" if bad else ""
