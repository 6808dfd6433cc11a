"""PadChest: 160,000 images of 67,000 patients of one Spanish hospital, 174 findings in English.

Licence: PadChest Dataset Research Use Agreement: research, no sharing, no re-identification.
Access: registration, https://bimcv.cipf.es/bimcv-projects/padchest. Labels of 27 % of the reports
are physicians', the others a recurrent network's. Reports are Spanish, cut to the stems of words.
Sex is its column PatientSex_DICOM, the age the year of StudyDate_DICOM (YYYYMMDD) less PatientBirth
(a year), so it may be one too many.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from mlip.dataloading.datasets.rows import (
    Collected,
    Dataset,
    DatasetError,
    Row,
    first_of,
    read_csv,
    relative,
    require_choice,
    split_by_patient,
)
from mlip.dataloading.demographics import PatientCells
from mlip.dataloading.view_position import is_frontal

ACCESS = "PadChest, https://bimcv.cipf.es/bimcv-projects/padchest (registration and agreement)"
BY_PHYSICIANS = "physician"  # subset of the images whose labels physicians read in the report
_TABLES = [
    f"PADCHEST_chest_x_ray_images_labels_160K{name}"
    for name in ("_01.02.19.csv", "_01.02.19.csv.gz", ".csv", ".csv.gz")
]
_COLUMNS = [
    *("ImageID", "ImageDir", "StudyID", "PatientID", "Projection"),
    *("PhotometricInterpretation_DICOM", "Report", "MethodLabel", "Labels"),
]
# words of the labels column that name no finding
_NORMAL, _UNCHANGED, _EXCLUDE = "normal", "unchanged", "exclude"
_NO_FINDINGS = frozenset({_NORMAL, _UNCHANGED, "suboptimal study"})
_NAME = r"""'([^']*)'|"([^"]*)\""""
_LIST = re.compile(rf"\[\s*(?:(?:{_NAME}|nan|None)[\s,]*)*\]")
_NO_TEXT = frozenset({"", "nan", "None"})


def collect(root: Path, options: dict[str, str]) -> Collected:
    """Frontal images; split 80/10/10 by patient, or the physicians' labels kept as test.

    An image with labels has none of the findings that they do not name; one of which is said that
    it is unchanged, and nothing else, says nothing of any.
    """
    require_choice(options, "views", ("frontal", "all"))
    require_choice(options, "split", ("hash", BY_PHYSICIANS))
    require_choice(options, "report", ("none", "stems"))
    table = first_of(root, _TABLES, ACCESS)
    kept, excluded = _kept_lines(root, table, options["views"] == "frontal")
    is_test_kept = options["split"] == BY_PHYSICIANS
    test_patients = {r["PatientID"] for _, r in kept if _is_by_physicians(r)}
    rows, unsaid = [], 0
    cells = PatientCells()
    for path, row in kept:
        patient, by_physicians = row["PatientID"], _is_by_physicians(row)
        if is_test_kept and patient in test_patients:
            if not by_physicians:
                excluded["other_image_of_test_patient"] += 1
                continue
            split = "test"
        elif is_test_kept:
            split = split_by_patient(patient, "padchest", 0.1)
        else:
            split = split_by_patient(patient, "padchest", 0.1, 0.1)
        labels = _labels(row, table)
        findings = [name for name in labels if name not in _NO_FINDINGS]
        if not findings and _NORMAL in labels:
            findings = [_NORMAL]
        unsaid += not findings
        has_report = options["report"] == "stems" and row["Report"] not in _NO_TEXT
        rows.append(
            Row(
                image=path,
                patient_id=patient,
                study_id=row["StudyID"],
                image_id=row["ImageID"],
                split=split,
                view=row["Projection"],
                sex=cells.sex(row.get("PatientSex_DICOM", "")),
                age=cells.age_between(row.get("PatientBirth", ""), row.get("StudyDate_DICOM", "")),
                report=row["Report"] if has_report else "",
                labels="|".join(findings),
                subset=BY_PHYSICIANS if by_physicians else "",
            )
        )
    physicians = sum(row.subset == BY_PHYSICIANS for row in rows)
    notes = [
        f"labels by physicians: {physicians} images, by a network: {len(rows) - physicians}; of "
        f"all, {unsaid} name no finding and not normal"
    ]
    return Collected(rows, excluded, notes + cells.notes())


def _kept_lines(
    root: Path, table: Path, only_frontal: bool
) -> tuple[list[tuple[str, dict[str, str]]], Counter[str]]:
    """Image path and line of each image that stays, and why others do not."""
    paths = sorted(relative(path, root) for path in root.rglob("*.png"))
    if not paths:
        raise DatasetError(f"{root}: no .png here or below. The images are part of {ACCESS}")
    there, path_of = set(paths), {path.rpartition("/")[2]: path for path in paths}
    excluded: Counter[str] = Counter()
    kept = []
    for row in read_csv(table, _COLUMNS, ACCESS):
        own = f"{row['ImageDir']}/{row['ImageID']}"  # archives may be unpacked into one folder
        path = own if own in there else path_of.get(row["ImageID"])
        if reason := _reason(row, only_frontal, table):
            excluded[reason] += 1
        elif path is None:
            excluded["listed_but_not_there"] += 1
        else:
            kept.append((path, row))
    return kept, excluded


def _reason(row: dict[str, str], only_frontal: bool, table: Path) -> str | None:
    """Why an image is left out, whatever the split."""
    if not row["PatientID"]:
        return "no_patient"
    # the publisher's own rule: the header is often wrong, so nobody knows which ones are inverted
    if row["PhotometricInterpretation_DICOM"] == "MONOCHROME1":
        return "monochrome1"
    if row["Projection"] == "EXCLUDE" or _EXCLUDE in _labels(row, table):
        return "excluded_by_publisher"
    return "view_not_frontal" if only_frontal and not is_frontal(row["Projection"]) else None


def _is_by_physicians(row: dict[str, str]) -> bool:
    return row["MethodLabel"] == "Physician"


def _labels(row: dict[str, str], table: Path) -> list[str]:
    """Names of a list as Python writes it, without blanks around them and repeats."""
    cell = row["Labels"]
    if cell in _NO_TEXT:
        return []
    if not _LIST.fullmatch(cell):
        raise DatasetError(
            f"{table}: column Labels of image {row['ImageID']}: expected a list as ['pleural "
            "effusion', 'pneumonia']; fetch the file again"
        )
    names = ("".join(pair) for pair in re.findall(_NAME, cell))
    return list(dict.fromkeys(" ".join(name.split()) for name in names if name.strip()))


DATASET = Dataset(
    title="PadChest",
    licence="PadChest Dataset Research Use Agreement",
    access=ACCESS,
    collect=collect,
    options={
        "views": ("frontal", "frontal (PA, AP and AP_horizontal) or all"),
        "split": ("hash", "hash, or physician: images with physicians' labels are test"),
        "report": ("none", "none, or stems: the Spanish stems of the reports' words"),
    },
)
