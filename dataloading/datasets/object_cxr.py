"""Object-CXR (MIDL 2020): foreign objects on chest X-rays as boxes, ellipses and polygons.

Licence: as its publisher states, non-commercial. Access: the challenge's own links are dead;
Academic Torrents fdc91f11d7010f7259a05403fc9d00079a09f5d5.
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
    place_images,
    read_csv,
    require,
)

ACCESS = "Object-CXR, Academic Torrents fdc91f11d7010f7259a05403fc9d00079a09f5d5"
_SHAPES = {"0": "rectangle", "1": "ellipse", "2": "polygon"}


def parse_annotation(text: str) -> list[list[float | str]]:
    """[x, y, width, height, shape] of each object.

    Grammar: objects between ";", each "TYPE x1 y1 x2 y2 ..."; type 0 rectangle and 1 ellipse give
    two corners, 2 a polygon's points, whose extent is taken. Empty = no object.
    Raises:  ValueError for anything else, without a word of it.
    """
    boxes: list[list[float | str]] = []
    for one in filter(str.strip, text.split(";")):
        kind, *coordinates = one.split()
        try:
            numbers = [float(n) for n in coordinates]
        except ValueError:
            numbers = []
        if kind not in _SHAPES or len(numbers) < 4 or len(numbers) % 2:
            raise ValueError("annotation: expected a type of 0, 1 or 2 and pairs of numbers")
        across, down = numbers[::2], numbers[1::2]
        left, top = min(across), min(down)
        boxes.append([left, top, max(across) - left, max(down) - top, _SHAPES[kind]])
    return boxes


def collect(root: Path, options: dict[str, str]) -> Collected:
    """train.csv split 80/20 by patient into train and val, dev.csv as test; or all by list."""
    tables = {}
    for name in ("train", "dev"):
        table = require(root / f"{name}.csv", ACCESS)
        require(root / name, ACCESS, folder=True)
        tables[name] = list(read_csv(table, ["image_name", "annotation"], ACCESS))
    images = [row["image_name"] for table in tables.values() for row in table]
    place, notes = place_images(options, images, "object-cxr", val=0.2)
    excluded: Counter[str] = Counter()
    rows = []
    for name, lines in tables.items():
        for row in lines:
            image = row["image_name"]
            try:
                boxes = parse_annotation(row["annotation"])
            except ValueError as error:
                raise DatasetError(f"{root / name}.csv: {error}") from None
            patient, split = place(image)
            if name == "dev" and not options["split_lists"]:
                split = "test"
            if not split:
                excluded["not_in_split_lists"] += 1
                continue
            rows.append(
                Row(
                    image=f"{name}/{image}",
                    patient_id=patient,
                    study_id="",
                    image_id=image,
                    split=split,
                    labels="Foreign Object" if boxes else "",
                    negative="" if boxes else "Foreign Object",
                    boxes=json.dumps(boxes) if boxes else "",
                )
            )
    return Collected(rows, excluded, notes)


DATASET = Dataset(
    title="Object-CXR",
    licence="as its publisher states: non-commercial use",
    access=ACCESS,
    collect=collect,
    options=PLACING,
)
