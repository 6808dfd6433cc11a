"""SIIM-ACR Pneumothorax Segmentation, stages 1 and 2: DICOM images with run-length masks.

Licence: competition rules, non-commercial use. Access: Kaggle account and accepted rules,
https://www.kaggle.com/c/siim-acr-pneumothorax-segmentation (stage 1 also by Google Healthcare).
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from mlip.dataloading.datasets.rows import (
    PLACING,
    Collected,
    Dataset,
    DatasetError,
    Row,
    first_of,
    place_images,
    read_csv,
    relative,
)

ACCESS = (
    "https://www.kaggle.com/c/siim-acr-pneumothorax-segmentation (Kaggle account, accepted rules)"
)
_TABLES = ["stage_2_train.csv", "train-rle.csv"]
_FOLDERS = ("dicom-images-train", "dicom-images-test", "stage_2_images")


def collect(root: Path, options: dict[str, str]) -> Collected:
    """One row an image; all its masks, which stand in separate lines, joined by "|".

    Both tables are read alike: header names are stripped (stage 1 writes " EncodedPixels") and
    "-1" with or without a blank means no pneumothorax. 70/15/15 by patient, or by list.
    """
    table = first_of(root, _TABLES, ACCESS)
    masks: dict[str, list[str]] = {}
    for row in read_csv(table, ["ImageId", "EncodedPixels"], ACCESS):
        found = masks.setdefault(row["ImageId"], [])
        if row["EncodedPixels"] != "-1":
            numbers = row["EncodedPixels"].split()
            if not numbers or len(numbers) % 2 or not all(map(str.isdecimal, numbers)):
                raise DatasetError(f"{table}: EncodedPixels: expected -1 or pairs of numbers")
            found.append(" ".join(numbers))
    path_of = _images(root)
    place, notes = place_images(options, masks, "siim", val=0.15, test=0.15)
    excluded: Counter[str] = Counter(image_without_label=len(path_of.keys() - masks.keys()))
    rows = []
    for image, found in masks.items():
        patient, split = place(image)
        if image not in path_of:
            excluded["label_without_image"] += 1
            continue
        if not split:
            excluded["not_in_split_lists"] += 1
            continue
        rows.append(
            Row(
                image=path_of[image],
                patient_id=patient,
                study_id="",
                image_id=image,
                split=split,
                labels="Pneumothorax" if found else "",
                negative="" if found else "Pneumothorax",
                mask="|".join(found),
            )
        )
    several = sum(len(m) > 1 for m in masks.values())
    notes.append(f"table {table.name}; {several} images have more than one mask")
    return Collected(rows, +excluded, notes)


def _images(root: Path) -> dict[str, str]:
    """Image id -> path below the folders of images, at any depth.

    stage_2_train.csv labels stage 1's test images too: 12,047 images lie in two folders.
    """
    found: dict[str, str] = {}
    for folder in _FOLDERS:
        for path in sorted((root / folder).rglob("*.dcm")):
            if found.setdefault(path.stem, relative(path, root)) != relative(path, root):
                raise DatasetError(f"{root}: image {path.name} lies in two places; keep one")
    if not found:
        raise DatasetError(
            f"{root}: no .dcm file below {'/, '.join(_FOLDERS)}/. It is part of {ACCESS}"
        )
    return found


DATASET = Dataset(
    title="SIIM-ACR Pneumothorax Segmentation",
    licence="competition rules: non-commercial use",
    access=ACCESS,
    collect=collect,
    options=PLACING,
)
