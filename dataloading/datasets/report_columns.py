"""The report of each row of a user's table: one column, or its sections in several."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from mlip.dataloading.datasets.rows import DatasetError
from mlip.dataloading.reports.text import HEADINGS
from mlip.dataloading.tables.csv_text import shown

# usual names as plain_name writes them, tried in this order; beside "Report Text" a column "Report"
# is a state or a number
_WHOLE = "reporttext radiologyreport report text fulltext caption findingsandimpression".split()
_SECTIONS = {
    "FINDINGS": ("findings", "findingstext", "finding"),
    "IMPRESSION": ("impression", "impressiontext", "conclusion"),
}

# what R, pandas, databases and spreadsheets write for an empty cell
_NOTHING = frozenset({"na", "nan", "null", "none", "n/a", "#n/a", "<na>"})


def said(cell: str | None) -> str:
    """What a cell says without blanks around it; "" for the words that programs write for none."""
    text = (cell or "").strip()
    return "" if len(text) < 5 and text.lower() in _NOTHING else text


def plain_name(column: str) -> str:
    """A column's name without case, blanks and marks: "Accession No." and accession_no are one."""
    return re.sub(r"[\W_]+", "", column.lower())


def usual_column(names: Sequence[str], usual: Sequence[str]) -> str:
    """The column of the first usual name, "" where there is none.

    Of Patient_ID and patient_id the one that is written as our pages write it, else the first.

    usual  as plain_name writes them, tried in this order
    """
    as_ours = sorted(names, key=lambda name: name.strip() != name.strip().lower().replace(" ", "_"))
    plain = {plain_name(name): name for name in reversed(as_ours)}
    return next((plain[name] for name in usual if name in plain), "")


def find_report(path: Path, names: Sequence[str], given: str, option: str) -> list[str]:
    """The column or columns of the report: those given, else a usual one, else its two sections.

    Raises:  DatasetError where a given one is missing.
    """
    # a column without a name, the row numbers of pandas for one, is nobody's choice
    if given and given in names:
        return [given]
    if given:
        wanted = [name.strip() for name in given.split(",") if name.strip()]
        missing = [name for name in wanted if name not in names]
        if missing or not wanted or len(set(wanted)) < len(wanted):
            raise DatasetError(
                f"{path}: --option {option}={given}: expected one column, or different ones with "
                f"commas between{'; missing: ' if missing else ''}{', '.join(missing)}; the file "
                f"has {shown(names)}"
            )
        return wanted
    if whole := usual_column(names, _WHOLE):
        return [whole]
    found = [usual_column(names, usual) for usual in _SECTIONS.values()]
    # one of them alone may as well be a column of labels
    return found if all(found) else []


def joined_texts(columns: Mapping[str, Sequence[str | None]]) -> Iterator[str]:
    """Row by row the text; of several columns each under its heading, blank ones left out.

    A column that is named like a section of a report opens with its heading, so that
    `data.sections` finds it; any other is put behind the one before.
    """
    if len(columns) == 1:
        yield from map(said, next(iter(columns.values())))
        return
    headings = [_heading(name) for name in columns]
    for cells in zip(*columns.values(), strict=True):
        parts = [said(cell) for cell in cells]
        yield "\n".join(
            f"{heading}{part}" for heading, part in zip(headings, parts, strict=True) if part
        )


def _heading(column: str) -> str:
    name = plain_name(column)
    for heading, usual in _SECTIONS.items():
        if name in usual:
            return f"{heading}: "
    words = " ".join(re.sub(r"[\W_]+", " ", column).lower().split())
    return f"{words.upper()}: " if words in HEADINGS else ""
