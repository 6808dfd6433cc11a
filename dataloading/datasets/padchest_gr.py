"""PadChest-GR: frontal films of PadChest with a sentence a finding, and boxes for the sentences.

Licence: BIMCV's research use agreement: research, no sharing. Access: on request,
https://bimcv.cipf.es/bimcv-projects/padchest-gr/. Source: Castro et al. 2024 (arXiv 2411.05085).
4,555 studies of one film each. Sentences are in Spanish and, translated, in English; those of
findings that are there carry labels of PadChest and boxes of one or two readers, as shares of the
film's width and height: the first reader's are taken. master_table.csv, a row a study and label,
tells patient, split, PatientSex_DICOM and PatientAge. Its films are PadChest's (padchest.py).
"""

from __future__ import annotations

import json
import math
import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from mlip.dataloading.datasets.json_file import read_json
from mlip.dataloading.datasets.rows import (
    Collected,
    Dataset,
    DatasetError,
    Row,
    keep_apart,
    newest,
    read_csv,
    relative,
    require,
    require_choice,
)
from mlip.dataloading.datasets.sections import cell_text
from mlip.dataloading.demographics import PatientCells
from mlip.dataloading.images.image_file import PNG_SIGNATURE
from mlip.dataloading.splits import SPLIT_OF

ACCESS = "PadChest-GR, https://bimcv.cipf.es/bimcv-projects/padchest-gr/ (request and agreement)"
_REPORTS = ("grounded_reports_*.json",)
_COLUMNS = ["StudyID", "ImageID", "split", "PatientID"]
_PRIOR = "PadChest_GR_progression_prior_studies"  # earlier films of the same patients, no rows
_NORMAL = "normal"  # as PadChest calls a film without findings
_EXPECTED = (
    "a list with an entry a study: StudyID, ImageID and findings, a list of objects with "
    "sentence_en, abnormal, labels and boxes"
)


class _Read(NamedTuple):
    """What the findings of one film say."""

    report: str
    labels: list[str]
    boxes: list[list[float | str]]


def collect(root: Path, options: dict[str, str]) -> Collected:
    """Official splits; the report is the film's sentences, in their order.

    A box stands once a label of its sentence, so that a name asks for all boxes of its finding; the
    sentence stands behind the first label alone, so that it is asked once.
    """
    require_choice(options, "language", ("en", "es"))
    reports = newest(root, _REPORTS, "grounded_reports_20240819.json", ACCESS)
    told = _told_of_studies(_table(root))
    path_of = _images(root)
    cells = PatientCells()
    excluded: Counter[str] = Counter()
    count: Counter[str] = Counter()
    seen: set[str] = set()
    rows: list[Row] = []
    for study in _studies(reports):
        table_row = told.get(study["StudyID"])
        image = study["ImageID"]
        path = path_of.get(image)
        if image in seen:
            excluded["repeated_image"] += 1
            continue
        seen.add(image)
        if table_row is None or not table_row["PatientID"]:
            excluded["not_in_master_table"] += 1
            continue
        if path is None:
            excluded["listed_but_not_there"] += 1
            continue
        split = SPLIT_OF.get(table_row["split"], "")
        if not split:
            excluded["no_split"] += 1
            continue
        size = png_size(root / path)
        if size is None:
            excluded["no_readable_png"] += 1
            continue
        read = _read(study["findings"], f"sentence_{options['language']}", size, reports, count)
        rows.append(
            Row(
                image=path,
                patient_id=table_row["PatientID"],
                study_id=study["StudyID"],
                image_id=image,
                split=split,
                view="FRONTAL",
                sex=cells.sex(table_row.get("PatientSex_DICOM", "")),
                age=_age(cells, table_row),
                report=read.report,
                labels="|".join(read.labels),
                boxes=json.dumps(read.boxes) if read.boxes else "",
            )
        )
    rows = keep_apart(rows, excluded)
    boxed = sum(bool(row.boxes) for row in rows)
    notes = [f"{len(rows)} films, {boxed} of them with boxes for {count['boxed']} sentences"]
    for name, text in _COUNTED.items():
        if count[name]:
            notes.append(f"{count[name]} {text}")
    return Collected(rows, excluded, notes + cells.notes())


_COUNTED = {
    "blank": "findings have no sentence in that language: they stand in no report",
    "unlabelled": "sentences with boxes have no label: their boxes are left out",
    "no_box": "boxes are not x1 < x2 and y1 < y2 within the film: left out",
}


def _read(
    findings: list[Any], sentence: str, size: tuple[int, int], path: Path, count: Counter[str]
) -> _Read:
    """Report, labels and boxes in px of a film of `size` (height, width)."""
    sentences: list[str] = []
    labels: dict[str, None] = {}
    boxes: list[list[float | str]] = []
    is_normal = True
    for finding in findings:
        text = " ".join(cell_text(finding.get(sentence)).split())
        if text:  # the sentences stand in one line: each ends as one
            text = text if text[-1] in ".!?" else f"{text}."
            sentences.append(text)
        count["blank"] += not text
        if not finding.get("abnormal"):
            continue
        is_normal = False
        names = _names(finding.get("labels"), path)
        labels.update(dict.fromkeys(names))
        placed = list(_placed(finding.get("boxes"), size, path, count))
        count["unlabelled"] += bool(placed and not names)
        count["boxed"] += bool(placed and names and text)
        for place, name in enumerate(names):
            boxes += [[*box, name, text if place == 0 else ""] for box in placed]
    return _Read(" ".join(sentences), [_NORMAL] if is_normal else list(labels), boxes)


def _placed(
    listed: Any, size: tuple[int, int], path: Path, count: Counter[str]
) -> Iterator[list[float]]:
    """[x, y, width, height] in px of each box of shares; edges beyond the film are cut at it."""
    if listed is None:
        return
    if not isinstance(listed, list):
        raise DatasetError(f"{path}: boxes: expected a list of [x1, y1, x2, y2]")
    height, width = size
    for box in listed:
        try:
            shares = [float(share) for share in box]
            x1, y1, x2, y2 = (min(max(share, 0.0), 1.0) for share in shares)
        except (TypeError, ValueError, OverflowError):  # of a whole number of 400 digits
            raise DatasetError(f"{path}: boxes: expected [x1, y1, x2, y2] as numbers") from None
        if not all(map(math.isfinite, shares)) or x1 >= x2 or y1 >= y2:
            count["no_box"] += 1
            continue
        corners = (x1 * width, y1 * height, (x2 - x1) * width, (y2 - y1) * height)
        yield [round(edge, 2) for edge in corners]


def _names(labels: Any, path: Path) -> list[str]:
    if labels is None:
        return []
    if not isinstance(labels, list) or not all(isinstance(n, str) and "|" not in n for n in labels):
        raise DatasetError(f"{path}: labels: expected a list of names without '|'")
    names = (" ".join(name.split()) for name in labels)
    return list(dict.fromkeys(name for name in names if name))


def _studies(path: Path) -> Iterator[dict[str, Any]]:
    entries = read_json(path, _EXPECTED, ACCESS)
    if not isinstance(entries, list) or not entries:
        raise DatasetError(f"{path}: expected {_EXPECTED}; fetch the file again")
    for number, study in enumerate(entries, start=1):
        is_whole = (
            isinstance(study, dict)
            and all(isinstance(study.get(key), str) for key in ("StudyID", "ImageID"))
            and isinstance(study.get("findings"), list)
            and all(isinstance(finding, dict) for finding in study["findings"])
            # one of another name would make every film a normal one
            and all(finding.get("abnormal") in (True, False) for finding in study["findings"])
        )
        if not is_whole:
            raise DatasetError(
                f"{path}: entry {number}: expected StudyID and ImageID as texts and findings as a "
                "list of objects with abnormal (true or false); fetch the file again"
            )
        yield study


def _table(root: Path) -> Path:
    table = root / "master_table.csv"
    if table.is_dir():  # some programs unpack an archive into a folder of its name
        table /= table.name
    if not table.is_file() and (root / "master_table.csv.zip").is_file():
        raise DatasetError(f"{table}: no such file. Unzip master_table.csv.zip, part of {ACCESS}")
    return require(table, ACCESS)


def _told_of_studies(table: Path) -> dict[str, dict[str, str]]:
    """Study -> the first of its rows: a study has one for each of its labels."""
    told: dict[str, dict[str, str]] = {}
    for row in read_csv(table, _COLUMNS, ACCESS):
        first = told.setdefault(row["StudyID"], row)
        if (first["split"], first["PatientID"]) != (row["split"], row["PatientID"]):
            raise DatasetError(
                f"{table}: a StudyID has two patients or splits: fetch the file again"
            )
    return told


def _images(root: Path) -> dict[str, str]:
    """File name -> path below the root, of the films that have reports."""
    found = {
        path.name: relative(path, root)
        for path in sorted(root.rglob("*.png"))
        if _PRIOR not in path.parts
    }
    if not found:
        hint = ""
        if next(root.rglob("PadChest_GR.zip.*"), None) is not None:
            hint = ". Join its parts: cat PadChest_GR.zip.* > PadChest_GR.zip, then unzip it"
        raise DatasetError(f"{root}: no .png here or below. The images are part of {ACCESS}{hint}")
    return found


def png_size(path: Path) -> tuple[int, int] | None:
    """(height, width) in px that a PNG's header states; None where it is none or is not read."""
    try:
        with open(path, "rb") as file:
            start = file.read(24)
    except OSError:
        return None
    if len(start) < 24 or not start.startswith(PNG_SIGNATURE) or start[12:16] != b"IHDR":
        return None
    width, height = struct.unpack(">II", start[16:24])
    return height, width


def _age(cells: PatientCells, row: dict[str, str]) -> str:
    if row.get("PatientAge"):
        return cells.age(row["PatientAge"])
    return cells.age_between(row.get("PatientBirth", ""), row.get("StudyDate_DICOM", ""))


DATASET = Dataset(
    title="PadChest-GR",
    licence="BIMCV PadChest-GR research use agreement",
    access=ACCESS,
    collect=collect,
    options={"language": ("en", "en, or es: the language of the sentences")},
)
