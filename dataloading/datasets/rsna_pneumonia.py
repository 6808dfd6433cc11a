"""RSNA Pneumonia Detection Challenge, stage 2: DICOM images with boxes of opacities.

Licence: competition rules, research and non-commercial use. Access: Kaggle account and accepted
rules, https://www.kaggle.com/c/rsna-pneumonia-detection-challenge.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from mlip.dataloading.datasets.rows import (
    PLACING,
    Collected,
    Dataset,
    DatasetError,
    Row,
    numbers_of,
    place_images,
    read_csv,
    require,
)

ACCESS = (
    "the stage 2 data of https://www.kaggle.com/c/rsna-pneumonia-detection-challenge "
    "(Kaggle account, accepted rules)"
)


def collect(root: Path, options: dict[str, str]) -> Collected:
    """One row an image; boxes in px of the 1024 x 1024 source. 60/20/20 by patient, or by list."""
    require(root / "stage_2_train_images", ACCESS, folder=True)
    table = require(root / "stage_2_train_labels.csv", ACCESS)
    boxes: dict[str, list[list[float | str]]] = {}
    for row in read_csv(table, ["patientId", "x", "y", "width", "height", "Target"], ACCESS):
        found = boxes.setdefault(row["patientId"], [])
        if row["Target"] == "1":
            cells = [row[name] for name in ("x", "y", "width", "height")]
            numbers = numbers_of(cells, "x, y, width and height", table)
            found.append([*numbers, "Lung Opacity"])
        elif row["Target"] != "0":
            raise DatasetError(f"{table}: Target: expected 0 or 1")
    place, notes = place_images(options, boxes, "rsna", val=0.2, test=0.2)
    excluded: Counter[str] = Counter()
    rows = []
    for image, found in boxes.items():
        patient, split = place(image)
        if not split:
            excluded["not_in_split_lists"] += 1
            continue
        rows.append(
            Row(
                image=f"stage_2_train_images/{image}.dcm",
                patient_id=patient,
                study_id="",
                image_id=image,
                split=split,
                labels="Pneumonia" if found else "",
                negative="" if found else "Pneumonia",
                boxes=json.dumps(found) if found else "",
            )
        )
    if not options["patients"]:
        notes.append(
            "the challenge publishes no patient numbers: every image counts as a patient; images "
            "come from NIH ChestX-ray14, so do not train on one and test on the other"
        )
    return Collected(rows, excluded, notes)


DATASET = Dataset(
    title="RSNA Pneumonia Detection Challenge (stage 2)",
    licence="competition rules: research and non-commercial use",
    access=ACCESS,
    collect=collect,
    options=PLACING,
)
