"""`manifest`: a CSV, Parquet or JSONL of the user's own, one row an image.

Licence and access: whatever the user's own data stand under.
"""

from __future__ import annotations

import posixpath
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from mlip.dataloading.datasets.report_columns import (
    find_report,
    joined_texts,
    said,
    usual_column,
)
from mlip.dataloading.datasets.rows import (
    Collected,
    Dataset,
    DatasetError,
    Row,
    is_list_text,
    label_states,
    leads_out,
    split_by_patient,
)
from mlip.dataloading.demographics import PatientCells
from mlip.dataloading.splits import SPLIT_OF
from mlip.dataloading.tables.csv_text import shown, some_shown
from mlip.dataloading.tables.table import check_identifiers, column_names, read_table
from mlip.dataloading.view_position import projection, stated_projection
from mlip.settings.config import ConfigError

# field -> usual names as plain_name writes them, tried in this order where the user gives none
USUAL = {
    "image": ("image", "imagepath", "path", "file", "filename", "filepath", "dicompath"),
    "patient_id": ("patientid", "subjectid", "patient", "mrn"),
    "study_id": ("studyid", "studyinstanceuid", "study"),
    "image_id": ("imageid", "dicomid", "sopinstanceuid"),
    "split": ("split", "set"),
    "view": ("view", "viewposition", "projection"),
    "sex": ("sex", "gender", "patientsex", "patientgender"),
    "age": ("age", "patientage"),
    "labels": ("labels", "findinglabels"),
    "sha256": ("sha256",),
}
_NEEDED = ("image", "patient_id")
_IDENTIFIERS = {"patient_id", "study_id", "image_id"}
# of pandas a column of ages with a gap holds numbers with a point; where it holds dates or lists
# nothing is stated, which is counted
_DEMOGRAPHICS = {"sex", "age"}
_MOST_VIEWS = 16  # of more values, most of them different, that name none, a column is of no views
_LONGEST = 60  # characters of a view or of a finding's name; text is longer
_AS_NUMBER = {"true": "1", "false": "0", "nan": ""}  # what tables write for yes, no and unknown


@dataclass(frozen=True)
class _Columns:
    """Where the manifest's table holds what."""

    of: dict[str, str]  # field of USUAL: column
    findings: list[str]  # columns of one finding each
    texts: list[str]  # columns that hold the report's parts


def collect(root: Path, options: dict[str, str]) -> Collected:
    """The manifest's rows; without a column of splits they get one by the hash of their patient."""
    path = _find(root, options["file"])
    names = column_names(path)
    columns = _columns(path, options, names)
    table = _read(path, columns)
    different, doubts = _look_through(path, table, columns.of)
    cells = PatientCells(table.get("sex", ()))
    rows, excluded = _rows(path, table, columns, cells)
    shown_of = columns.of | ({"report": ", ".join(columns.texts)} if columns.texts else {})
    held = ", ".join(f"{field} = {name} ({different[field]})" for field, name in shown_of.items())
    notes = [f"columns, with how many different values each holds: {held}"]
    is_read = {*columns.of.values(), *columns.texts, *columns.findings}
    # one without a name holds the row numbers of pandas
    if unread := [name for name in names if name.strip() and name not in is_read]:
        notes.append(f"columns not read: {some_shown(unread)}")
    if count := excluded["unknown_split"]:
        notes.append(
            f"rows with another word than train, val or test in column {columns.of['split']!r}: "
            f"{count} (--option split=none splits by patient)"
        )
    notes += doubts
    if count := _shared_by_patients(rows):
        notes.append(
            f"column {columns.of['study_id']!r} (study_id) holds {count} "
            f"value{'s' * (count > 1)}, each of several patients: fine for the visits of a "
            "patient; the name of a trial makes all films of a patient one study (--option "
            "study_id=none leaves it out)"
        )
    if not columns.texts and options["report"] != "none":
        notes.append("no column of reports was found: name one with --option report=COLUMN")
    if count := sum("\\" in row.image for row in rows):
        notes.append(f"{count} image paths hold a backslash: folders are separated by '/'")
    notes += cells.notes()
    if columns.findings:
        notes.append(f"findings: {', '.join(columns.findings)}")
    return Collected(rows, excluded, notes)


def _columns(path: Path, options: dict[str, str], names: list[str]) -> _Columns:
    """The columns that options name, or usual names find.

    Raises:  DatasetError where one that is needed is missing or a report's holds identifiers
    """
    of: dict[str, str] = {}
    for field, usual in USUAL.items():
        if options[field] != "none" and (found := options[field] or usual_column(names, usual)):
            of[field] = found
    if missing := [field for field in _NEEDED if field not in of]:
        how = " ".join(f"--option {field}=<column>" for field in missing)
        raise DatasetError(
            f"{path}: no column for {', '.join(missing)}: give {how}; the file has {shown(names)}"
        )
    if findings := _findings(path, options, names):
        of.pop("labels", None)
    texts = []
    if options["report"] != "none":
        texts = find_report(path, names, options["report"], "report")
        if ids := {of[field] for field in ("image", *_IDENTIFIERS) if field in of} & set(texts):
            raise DatasetError(
                f"{path}: {', '.join(sorted(ids))} holds identifiers and cannot be a report: name "
                "another column with --option report, or report=none"
            )
    return _Columns(of, findings, texts)


def _read(path: Path, columns: _Columns) -> dict[str, list[str | None]]:
    """The cells of each field, of "report" and of each finding as "finding NAME"."""
    states = {f"finding {name}": name for name in columns.findings}
    read = read_table(
        path,
        columns.of | states | {f"text {name}": name for name in columns.texts},
        numbers=states.keys(),
        anything=_DEMOGRAPHICS & columns.of.keys(),
    )[0]
    for field in _IDENTIFIERS & read.keys():
        check_identifiers(read[field], columns.of[field], path)
    table = {field: column.to_pylist() for field, column in read.items()}
    parts = {name: table.pop(f"text {name}") for name in columns.texts}
    if parts:
        table["report"] = list(joined_texts(parts))
    return table


def _look_through(
    path: Path, table: dict[str, list[str | None]], of: dict[str, str]
) -> tuple[dict[str, int], list[str]]:
    """How many different values each field has, and lines about columns that seem another's."""
    different: dict[str, int] = {}
    doubts: list[str] = []
    for field, column in table.items():
        cells = Counter(map(said, column))  # of one column at a time: reports are many
        del cells[""]
        different[field] = len(cells)
        if field == "view":
            doubts += _doubts_of_views(path, of[field], cells)
        elif field == "labels":
            doubts += _doubts_of_labels(of[field], cells)
    return different, doubts


def _rows(
    path: Path, table: dict[str, list[str | None]], columns: _Columns, cells: PatientCells
) -> tuple[list[Row], Counter[str]]:
    """The rows that can be taken, and how many of the others each rule left out.

    Raises:  DatasetError naming the row, no cell of it
    """
    rows = []
    excluded: Counter[str] = Counter()
    place_of: dict[str, int] = {}
    findings = columns.findings
    for place in range(len(table["image"])):
        cell = {field: (column[place] or "").strip() for field, column in table.items()}
        cell |= {field: said(cell[field]) for field in _IDENTIFIERS & cell.keys()}
        if not cell["image"] or not cell["patient_id"]:
            excluded["no_image_or_patient"] += 1
            continue
        _check_row(path, place, cell, columns.of, place_of)
        stated = {name: cell[f"finding {name}"] for name in findings}
        stated = {name: _AS_NUMBER.get(value.lower(), value) for name, value in stated.items()}
        positive, uncertain, negative = label_states(stated, (), path)
        split = SPLIT_OF.get(cell.get("split", "").lower(), "")
        if "split" in columns.of and not split:
            excluded["unknown_split" if cell["split"] else "no_split"] += 1
            continue
        rows.append(
            Row(
                image=cell["image"],
                patient_id=cell["patient_id"],
                study_id=cell.get("study_id", ""),
                image_id=cell.get("image_id") or cell["image"],
                split=split or split_by_patient(cell["patient_id"], "manifest", 0.1, 0.1),
                view=cell.get("view", ""),
                sex=cells.sex(cell.get("sex", "")),
                age=cells.age(cell.get("age", "")),
                report=cell.get("report", ""),
                labels=positive if findings else cell.get("labels", ""),
                uncertain=uncertain,
                negative=negative,
                sha256=cell.get("sha256", ""),
            )
        )
    return rows, excluded


def _check_row(
    path: Path, place: int, cell: dict[str, str], of: dict[str, str], place_of: dict[str, int]
) -> None:
    """Refuse a row that names what it must not; place_of has the images of the rows before it.

    Raises:  DatasetError naming file, row and column
    """
    # of a table "~" is meant as a home folder; of a folder it is a name like any other
    if leads_out(cell["image"]) or cell["image"].startswith("~"):
        raise DatasetError(
            f"{path}: data row {place + 1}: its image path may lead out of --root "
            f"(column {of['image']!r}); expected a relative path without '..'"
        )
    if (first := place_of.setdefault(posixpath.normpath(cell["image"]), place)) != place:
        raise DatasetError(
            f"{path}: data rows {first + 1} and {place + 1} name the same image (column "
            f"{of['image']!r}; --option image=COLUMN names another): expected one row an "
            "image; join the texts of one image, an addendum for instance, in one row"
        )
    if is_list_text(cell.get("labels", "")):
        raise DatasetError(
            f"{path}: data row {place + 1}: column {of['labels']!r} (labels) holds a list "
            "in brackets, which would be one name: write names joined by '|'; --option "
            "labels=none leaves them out"
        )


def _doubts_of_views(path: Path, column: str, cells: Counter[str]) -> list[str]:
    """A line about a column of views that names hardly any, without a cell of it.

    Raises:  DatasetError for one that can be of no views: its cells would be kept, beside hashed
             ids too, and stand for what DICOM headers tell
    """
    views = {view: n for view, n in cells.items() if projection(view)}
    count = sum(views.values())
    known = sum(n for v, n in views.items() if len(v) <= _LONGEST and stated_projection(v))
    if 10 * known >= count:  # the name of a file or a room holds a PA now and then
        return []
    held = f"column {column!r} (view) holds {len(views)} different value{'s' * (len(views) > 1)}"
    if len(views) > max(_MOST_VIEWS, count // 2):
        raise DatasetError(
            f"{path}: {held} in {count} rows, hardly any the name of a view: expected PA, AP, "
            "lateral and the like; --option view=COLUMN names another one, --option view=none "
            "leaves it out"
        )
    return [
        f"{held}, hardly any a known name of a view (PA, AP, lateral), and is kept as it stands: "
        "with --option view=none it is left out, and the headers of DICOM files tell the view"
    ]


def _doubts_of_labels(column: str, cells: Counter[str]) -> list[str]:
    """A line about a column of labels that mostly holds text, without a cell of it."""
    long = sum(n for cell, n in cells.items() if max(map(len, cell.split("|"))) > _LONGEST)
    if 2 * long <= cells.total():
        return []
    return [
        f"column {column!r} (labels): {long} of {cells.total()} cells hold a name of more than "
        f"{_LONGEST} characters: expected names of findings joined by '|', not text; --option "
        "labels=none leaves it out"
    ]


def _shared_by_patients(rows: Iterable[Row]) -> int:
    """How many study ids there are where each stands for several patients and some are words; 0
    elsewhere: numbers are those of a patient's visits."""
    first: dict[str, str] = {}
    shared = set()
    for row in rows:
        if row.study_id and first.setdefault(row.study_id, row.patient_id) != row.patient_id:
            shared.add(row.study_id)
    has_words = any(any(map(str.isalpha, study)) for study in shared)
    return len(shared) if has_words and len(shared) == len(first) else 0


def _findings(path: Path, options: dict[str, str], names: list[str]) -> list[str]:
    """Columns of one finding each, as --option findings=A,B names them.

    Raises:  DatasetError where one is missing or named twice; ConfigError where labels are given
             too.
    """
    wanted = [name.strip() for name in options["findings"].split(",") if name.strip()]
    missing = sorted(set(wanted) - set(names))
    if missing or len(set(wanted)) < len(wanted):
        wrong = f"missing: {', '.join(missing)}" if missing else "one is named twice"
        raise DatasetError(
            f"{path}: --option findings={options['findings']}: expected different columns of the "
            f"file, commas between; {wrong}; the file has {shown(names)}"
        )
    if wanted and options["labels"] not in ("", "none"):
        raise ConfigError(
            f"{path}: --option labels={options['labels']} and findings both say what is there: "
            "give one of them"
        )
    if barred := [name for name in wanted if "|" in name]:
        raise DatasetError(
            f"{path}: --option findings: the name {barred[0]!r} holds '|', which stands between "
            "names in the prepared manifest: rename the column"
        )
    return wanted


def _find(root: Path, given: str) -> Path:
    if given:
        return Path(given)
    names = ["manifest.csv", "manifest.parquet", "manifest.jsonl"]
    for name in names:
        if (root / name).is_file():
            return root / name
    raise DatasetError(f"{root}: expected {', '.join(names)}, or give --option file=<path>")


DATASET = Dataset(
    title="a manifest of your own",
    licence="your own",
    access="you: one row an image with at least its path and a patient id",
    collect=collect,
    keeps_ids=False,
    demographics=("sex", "age"),
    options={
        "file": ("", "path of another manifest than manifest.csv, .parquet or .jsonl in the root"),
        **{
            field: ("", f"column of {field}; empty = a usual name, none = no such column")
            for field in USUAL
        },
        "report": (
            "",
            "column of report, or several, commas between; empty = a usual name, else findings "
            "and impression; none = no such column",
        ),
        "findings": (
            "",
            "columns of one finding each, commas between, that hold 1 (present), 0 (absent), "
            "-1 (uncertain) or blank; in place of labels",
        ),
    },
)
