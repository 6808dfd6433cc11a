"""`manifest`: a CSV, Parquet or JSONL of the user's own, one row an image.

Licence and access: whatever the user's own data stand under.
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet

from mlip.dataloading.datasets.mimic_cxr import label_states
from mlip.dataloading.datasets.rows import (
    SPLIT_OF,
    Collected,
    Dataset,
    DatasetError,
    Row,
    split_by_patient,
)
from mlip.dataloading.table import read_table

# field -> column names tried in this order where the user gives none
_USUAL = {
    "image": ("image", "image_path", "path", "Path", "file", "filename", "dicom_path"),
    "patient_id": ("patient_id", "subject_id", "PatientID", "patient"),
    "study_id": ("study_id", "StudyInstanceUID", "study"),
    "image_id": ("image_id", "dicom_id", "SOPInstanceUID"),
    "report": ("report", "text", "Report", "caption", "findings_and_impression"),
    "split": ("split", "Split", "set"),
    "view": ("view", "ViewPosition", "view_position", "projection"),
    "labels": ("labels", "finding_labels", "Finding Labels"),
    "sha256": ("sha256", "sha_256"),
}
_NEEDED = ("image", "patient_id")
_AS_NUMBER = {"true": "1", "false": "0", "nan": ""}  # what tables write for yes, no and unknown


def collect(root: Path, options: dict[str, str]) -> Collected:
    """The manifest's rows; rows without a split get one by the hash of their patient."""
    path = _find(root, options["file"])
    names = _names(path)
    wanted: dict[str, str] = {}
    for field, usual in _USUAL.items():
        given = options[field]
        if given == "none":
            continue
        found = given or next((name for name in usual if name in names), "")
        if found:
            wanted[field] = found
        elif field in _NEEDED:
            raise DatasetError(
                f"{path}: no column for {field}: give --option {field}=<column>; the file has "
                f"{', '.join(names[:40])}"
            )
    findings = _findings(path, options, names)
    if findings:
        wanted.pop("labels", None)
    states = {f"finding {name}": name for name in findings}
    read = read_table(path, wanted | states, numbers=states)[0]
    table = {field: column.to_pylist() for field, column in read.items()}
    count = len(table["image"])
    excluded: Counter[str] = Counter()
    rows = []
    for place in range(count):
        cell = {field: (column[place] or "").strip() for field, column in table.items()}
        if not cell["image"] or not cell["patient_id"]:
            excluded["no_image_or_patient"] += 1
            continue
        said = {name: cell[f"finding {name}"] for name in findings}
        said = {name: _AS_NUMBER.get(value.lower(), value) for name, value in said.items()}
        positive, uncertain, negative = label_states(said, (), path)
        split = SPLIT_OF.get(cell.get("split", "").lower(), "")
        if "split" in wanted and not split:
            excluded["no_split"] += 1
            continue
        rows.append(
            Row(
                image=cell["image"],
                patient_id=cell["patient_id"],
                study_id=cell.get("study_id", ""),
                image_id=cell.get("image_id") or cell["image"],
                split=split or split_by_patient(cell["patient_id"], "manifest", 0.1, 0.1),
                view=cell.get("view", ""),
                report=cell.get("report", ""),
                labels=positive if findings else cell.get("labels", ""),
                uncertain=uncertain,
                negative=negative,
                sha256=cell.get("sha256", ""),
            )
        )
    columns = ", ".join(f"{field} = {name}" for field, name in wanted.items())
    notes = [f"columns: {columns}"]
    if findings:
        notes.append(f"findings: {', '.join(findings)}")
    return Collected(rows, excluded, notes, keeps_ids=False)


def _findings(path: Path, options: dict[str, str], names: list[str]) -> list[str]:
    """Columns of one finding each, as --option findings=A,B names them.

    Raises:  DatasetError where one is missing or named twice, or labels are given too.
    """
    wanted = [name.strip() for name in options["findings"].split(",") if name.strip()]
    missing = sorted(set(wanted) - set(names))
    if missing or len(set(wanted)) < len(wanted):
        wrong = f"missing: {', '.join(missing)}" if missing else "one is named twice"
        raise DatasetError(
            f"{path}: --option findings={options['findings']}: expected different columns of the "
            f"file, commas between; {wrong}; the file has {', '.join(names[:40])}"
        )
    if wanted and options["labels"] not in ("", "none"):
        raise DatasetError(
            f"{path}: --option labels={options['labels']} and findings both say what is there: "
            "give one of them"
        )
    if barred := [name for name in wanted if "|" in name]:
        raise DatasetError(
            f"{path}: --option findings: the name {barred[0]!r} holds '|', which stands between "
            "names in the prepared manifest: rename the column"
        )
    return wanted


def _names(path: Path) -> list[str]:
    """Column names, from as little of the file as tells them; table.py judges the rest."""
    try:
        if path.suffix == ".parquet":
            return list(pa.parquet.read_schema(path).names)
        with open(path, encoding="utf-8-sig", newline="") as file:
            if path.suffix in (".jsonl", ".ndjson"):
                lines = [json.loads(line) for _, line in zip(range(100), file, strict=False)]
                return list(dict.fromkeys(name for line in lines for name in line))
            head = file.readline(1 << 16)
            return next(csv.reader([head], delimiter=max(",;\t", key=head.count)), [])
    except (OSError, ValueError, TypeError, csv.Error, pa.ArrowException) as error:
        raise DatasetError(f"{path}: cannot be read ({type(error).__name__})") from None


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
    options={
        "file": ("", "manifest file; empty = manifest.csv, .parquet or .jsonl in the root"),
        **{
            field: ("", f"column of {field}; empty = a usual name, none = no such column")
            for field in _USUAL
        },
        "findings": (
            "",
            "columns of one finding each, commas between, that hold 1 (present), 0 (absent), "
            "-1 (uncertain) or blank; in place of labels",
        ),
    },
)
