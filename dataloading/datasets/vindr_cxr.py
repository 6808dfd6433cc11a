"""VinDr-CXR 1.0.0: 18,000 DICOM images with boxes of three (train) or a consensus of readers.

Licence: PhysioNet Credentialed Health Data License 1.5.0. Access: credentialed account and signed
agreement, https://physionet.org/content/vindr-cxr/1.0.0/.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from pathlib import Path

from mlip.dataloading.datasets.rows import (
    Collected,
    Dataset,
    DatasetError,
    Row,
    numbers_of,
    read_csv,
    require,
    split_by_patient,
)

ACCESS = (
    "VinDr-CXR, https://physionet.org/content/vindr-cxr/1.0.0/ (credentialed account and signed "
    "agreement)"
)


def collect(root: Path, options: dict[str, str]) -> Collected:
    """Official test set; 10 % of the training images are val (no patient numbers are published).

    A training image's label is positive where most of its readers gave it, uncertain where fewer
    did. Boxes of all readers stay, as they are; the test set has a consensus.
    """
    rows = []
    excluded: Counter[str] = Counter()
    for name in ("train", "test"):
        folder = require(root / name, ACCESS, folder=True)
        labels = require(root / "annotations" / f"image_labels_{name}.csv", ACCESS)
        boxes = _boxes(require(root / "annotations" / f"annotations_{name}.csv", ACCESS))
        votes: dict[str, list[dict[str, str]]] = defaultdict(list)
        for row in read_csv(labels, ["image_id"], ACCESS):
            votes[row["image_id"]].append(row)
        for image, readers in votes.items():
            if not (folder / f"{image}.dicom").is_file():
                excluded["listed_but_not_there"] += 1
                continue
            positive, uncertain, negative = _majority(readers, labels)
            rows.append(
                Row(
                    image=f"{name}/{image}.dicom",
                    patient_id=image,
                    study_id="",
                    image_id=image,
                    split="test" if name == "test" else split_by_patient(image, "vindr", 0.1),
                    labels=positive,
                    uncertain=uncertain,
                    negative=negative,
                    boxes=json.dumps(boxes[image]) if image in boxes else "",
                )
            )
    return Collected(rows, excluded)


def _majority(readers: list[dict[str, str]], table: Path) -> tuple[str, str, str]:
    sides: dict[str, list[str]] = {"positive": [], "uncertain": [], "negative": []}
    for finding in readers[0]:
        if finding in ("image_id", "rad_id", "rad_ID"):
            continue
        values = [reader[finding] for reader in readers]
        if not set(values) <= {"0", "1", "0.0", "1.0"}:
            raise DatasetError(f"{table}: column {finding}: expected 0 or 1")
        given = sum(value.startswith("1") for value in values)
        side = "positive" if 2 * given > len(values) else "uncertain" if given else "negative"
        sides[side].append(finding)
    return "|".join(sides["positive"]), "|".join(sides["uncertain"]), "|".join(sides["negative"])


def _boxes(path: Path) -> dict[str, list[list[float | str]]]:
    """[x, y, width, height, class] an image; lines without a box say "No finding"."""
    boxes: dict[str, list[list[float | str]]] = {}
    columns = ["image_id", "class_name", "x_min", "y_min", "x_max", "y_max"]
    for row in read_csv(path, columns, ACCESS):
        if not row["x_min"]:
            continue
        corners = [row[name] for name in columns[2:]]
        left, top, right, bottom = numbers_of(corners, ", ".join(columns[2:]), path)
        box: list[float | str] = [left, top, right - left, bottom - top, row["class_name"]]
        boxes.setdefault(row["image_id"], []).append(box)
    return boxes


DATASET = Dataset(
    title="VinDr-CXR",
    licence="PhysioNet Credentialed Health Data License 1.5.0",
    access=ACCESS,
    collect=collect,
)
