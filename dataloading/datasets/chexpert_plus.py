"""CheXpert Plus: CheXpert's images with their reports, which the publisher cut into sections.

Licence: Stanford University Dataset Research Use Agreement. Access: registration,
https://stanfordaimi.azurewebsites.net/datasets/5158c524-d3ab-4e02-96e9-6ee9efc110a1. Source:
Chambon et al. 2024 (arXiv 2405.19538). Its table has a row an image (223,228 of train, 234 of
valid), with a report of each that says the same of a study in slightly other words: it was
anonymised image by image. Labels are CheXbert's of one section, in files of their own. Sex and
age are its columns sex (Male, Female, Unknown) and age; 0 counts as not stated, as in CheXpert.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from mlip.dataloading.datasets.chexbert_labels import CheXbertLabels
from mlip.dataloading.datasets.chexpert import VAL_SHARE, read_five_by_200
from mlip.dataloading.datasets.rows import (
    Collected,
    Dataset,
    DatasetError,
    Row,
    keep_apart,
    newest,
    read_csv,
    relative,
    require_choice,
    split_by_patient,
)
from mlip.dataloading.datasets.sections import joined_sections
from mlip.dataloading.demographics import PatientCells
from mlip.dataloading.view_position import is_frontal

ACCESS = (
    "CheXpert Plus, https://stanfordaimi.azurewebsites.net/datasets/"
    "5158c524-d3ab-4e02-96e9-6ee9efc110a1 (registration and agreement)"
)
_COLUMNS = [
    *("path_to_image", "path_to_dcm", "frontal_lateral", "ap_pa", "deid_patient_id"),
    *("report", "section_findings", "section_impression", "split"),
]
_TABLES = ("df_chexpert_plus_*.csv", "df_chexpert_plus_*.csv.gz")
_SPLITS = ("train", "valid")
_PATH = re.compile(r"(train|valid)/(patient\w+/study\w+)/([\w.-]+)\.(?:jpg|png|dcm)")
# where the folder of a split lies below the root, by how the archives are named and unpacked
_FOLDERS = {
    "png": ("PNG/PNG/{}", "PNG/{}", "PNG_{}", "png_{}", "{}"),
    "dcm": (
        *("DICOM/Uncompressed/{}", "DICOM/Compressed/{}", "DICOM/DICOM/{}", "DICOM/{}"),
        *("DICOM_{}", "dicom_{}", "{}"),
    ),
    "jpg": ("CheXpert-v1.0/{}", "CheXpert-v1.0-small/{}", "{}"),
}


class _Study(NamedTuple):
    """What is said of a study: by the first of its rows that has impression or findings."""

    report: str
    labels: tuple[str, str, str]


def collect(root: Path, options: dict[str, str]) -> Collected:
    """valid is test, val a share of train's patients, the same as of CheXpert itself.

    An image has the report and the labels of the first row of its study that says something.
    """
    require_choice(options, "files", tuple(_FOLDERS))
    require_choice(options, "views", ("frontal", "all"))
    table = newest(root, _TABLES, "df_chexpert_plus_240401.csv", ACCESS)
    folders = _folders(root, options["files"])
    chexbert = CheXbertLabels(root, options["labels"], ACCESS)
    chosen, digest = set[str](), ""
    if options["five_by_200"] != "none":
        chosen, digest = read_five_by_200(options["five_by_200"])
    patients_5x200 = {path.split("/")[1] for path in chosen if path.count("/") > 1}
    cells = PatientCells()
    excluded: Counter[str] = Counter()
    studies: dict[str, _Study] = {}
    silent: dict[str, dict[str, str]] = {}  # study -> its first row without a report
    wordings: Counter[tuple[str, bool]] = Counter()  # rows of (study, as its first report)
    seen: set[str] = set()
    rows: list[Row] = []
    for row in read_csv(table, _COLUMNS, ACCESS):
        folder, study, name = _parts(row["path_to_image"], "path_to_image", table)
        if row["path_to_image"] in seen:
            excluded["repeated_row"] += 1
            continue
        seen.add(row["path_to_image"])
        if row["split"] not in _SPLITS:
            raise DatasetError(f"{table}: column split: expected train or valid in every row")
        report = joined_sections(row["section_impression"], row["section_findings"])
        if not report:
            silent.setdefault(study, row)
        elif study not in studies:
            studies[study] = _Study(report, chexbert.of(row))
        wordings[study, bool(report) and report == studies[study].report] += 1
        patient = row["deid_patient_id"]
        if not patient:
            excluded["no_patient"] += 1
            continue
        is_front = row["frontal_lateral"] == "Frontal"
        if options["views"] == "frontal" and not is_front:
            excluded["view_not_frontal"] += 1
            continue
        image_id = f"{folder}/{study}/{name}.jpg"  # as in CheXpert, whatever files are read
        is_listed = image_id in chosen
        if not is_listed and patient in patients_5x200:
            excluded["other_image_of_5x200_patient"] += 1
            continue
        if options["files"] == "dcm":
            folder, study_dcm, name = _parts(row["path_to_dcm"], "path_to_dcm", table)
            path = f"{folders.get(folder, folder)}/{study_dcm}/{name}.dcm"
        else:
            path = f"{folders.get(folder, folder)}/{study}/{name}.{options['files']}"
        if not (root / path).is_file():
            excluded["listed_but_not_there"] += 1
            continue
        is_test = row["split"] == "valid" or is_listed
        rows.append(
            Row(
                image=path,
                patient_id=patient,
                study_id=study,
                image_id=image_id,
                split="test" if is_test else split_by_patient(patient, "chexpert", VAL_SHARE),
                view=_view(row["ap_pa"]) if is_front else "LATERAL",
                sex=cells.sex(row.get("sex", "")),
                age=cells.age(row.get("age", ""), zero_years=""),
                subset="5x200" if is_listed else "valid" if row["split"] == "valid" else "",
            )
        )
    reworded = sum(wordings[study, False] for study in studies)
    for study in silent.keys() - studies.keys():
        studies[study] = _Study("", chexbert.of(silent[study]))
    empty = sum(not said.report for said in studies.values())
    rows = [_with_report(row, studies[row.study_id]) for row in rows]
    notes = [f"{len(studies)} studies, {empty} of them without impression and findings"]
    if reworded:
        notes.append(
            f"{reworded} rows word the report otherwise than the first row of their study that has "
            "one, whose report and labels they have"
        )
    notes += chexbert.notes()
    if chosen:
        notes.append(_found(options["five_by_200"], chosen, seen, digest, table))
    return Collected(keep_apart(rows, excluded), excluded, notes + cells.notes())


def _with_report(row: Row, said: _Study) -> Row:
    positive, uncertain, negative = said.labels
    return replace(row, report=said.report, labels=positive, uncertain=uncertain, negative=negative)


def _folders(root: Path, files: str) -> dict[str, str]:
    """Split -> its folder below the root."""
    found = {}
    for split in _SPLITS:
        for form in _FOLDERS[files]:
            if (root / form.format(split)).is_dir():
                found[split] = relative(root / form.format(split), root)
                break
    if not found:
        names = " or ".join(form.format("train") + "/" for form in _FOLDERS[files])
        raise DatasetError(
            f"{root}: expected {names} with the images (--option files={files}). They are part of "
            f"{ACCESS}; --option files=jpg takes those of CheXpert-v1.0 or CheXpert-v1.0-small"
        )
    return found


def _parts(path: str, column: str, table: Path) -> tuple[str, str, str]:
    match = _PATH.fullmatch(path)
    if match is None:
        raise DatasetError(
            f"{table}: column {column}: expected train/patient00001/study1/view1_frontal.jpg in "
            "every row"
        )
    folder, study, name = match.groups()
    return folder, study, name


def _view(ap_pa: str) -> str:
    # 17 films of the table are Frontal and yet LL or RL: which of the two is right nobody says
    return ap_pa if is_frontal(ap_pa) else "FRONTAL"


def _found(option: str, chosen: set[str], known: set[str], digest: str, table: Path) -> str:
    if not (there := chosen & known):
        raise DatasetError(f"{option}: none of its {len(chosen)} paths is in {table.name}")
    return (
        f"5x200 list: {len(chosen)} images, SHA-256 {digest}; {len(chosen - there)} of them are "
        "not in the table"
    )


DATASET = Dataset(
    title="CheXpert Plus",
    licence="Stanford University Dataset Research Use Agreement (no redistribution)",
    access=ACCESS,
    collect=collect,
    options={
        "files": ("png", "png, dcm, or jpg: those of CheXpert-v1.0 or CheXpert-v1.0-small"),
        "views": ("frontal", "frontal or all"),
        "labels": (
            "",
            "section that CheXbert read: impression, findings or report; none; empty = impression "
            "where its file is there",
        ),
        "five_by_200": ("none", "none, or a published list (.json or .csv): its images are test"),
    },
)
