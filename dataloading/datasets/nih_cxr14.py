"""NIH ChestX-ray14: 112,120 frontal images with labels mined from reports, and 984 boxes.

Licence: use unrestricted with a link to the source, acknowledgement of the NIH Clinical Center and
citation of Wang et al., CVPR 2017. Access: https://nihcc.app.box.com/v/ChestXray-NIHCC, open.
Sex and age are its columns Patient Gender (M, F) and Patient Age: "058Y" in the first table, some
over 120 years, "58" in that of 2020.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from mlip.dataloading.datasets.rows import (
    Collected,
    Dataset,
    DatasetError,
    Row,
    first_of,
    numbers_of,
    read_csv,
    read_text,
    relative,
    require,
    split_by_patient,
)
from mlip.dataloading.demographics import PatientCells

ACCESS = "NIH ChestX-ray14, https://nihcc.app.box.com/v/ChestXray-NIHCC (open)"
FINDINGS = (
    "Atelectasis Cardiomegaly Consolidation Edema Effusion Emphysema Fibrosis Hernia Infiltration "
    "Mass Nodule Pleural_Thickening Pneumonia Pneumothorax"
).split()
_TABLES = ["Data_Entry_2017_v2020.csv", "Data_Entry_2017.csv"]
_BOXES = "BBox_List_2017.csv"
_BOX_NAMES = {"Infiltrate": "Infiltration"}  # the box file's own word


def collect(root: Path, options: dict[str, str]) -> Collected:
    """Official test list; 10 % of the other patients are val; labels not named are negative."""
    table = first_of(root, _TABLES, ACCESS)
    columns = ["Image Index", "Finding Labels", "Patient ID", "View Position"]
    listed = {
        name: set(read_text(require(root / f"{name}_list.txt", ACCESS), ACCESS).split())
        for name in ("train_val", "test")
    }
    path_of = {path.name: relative(path, root) for path in sorted(root.glob("images*/**/*.png"))}
    if not path_of:
        raise DatasetError(f"{root}: no .png below images*/. It is part of {ACCESS}")
    boxes = _boxes(root)
    excluded: Counter[str] = Counter()
    rows = []
    cells = PatientCells()
    for row in read_csv(table, columns, ACCESS):
        name = row["Image Index"]
        if name not in path_of:
            excluded["listed_but_not_there"] += 1
            continue
        if name in listed["test"]:
            split = "test"
        elif name in listed["train_val"]:
            split = split_by_patient(row["Patient ID"], "nih", 0.1)
        else:
            excluded["not_in_split_lists"] += 1
            continue
        found = [label for label in row["Finding Labels"].split("|") if label != "No Finding"]
        unknown = set(found) - set(FINDINGS)
        if unknown:
            raise DatasetError(f"{table}: unknown finding {sorted(unknown)[0]!r}")
        rows.append(
            Row(
                image=path_of[name],
                patient_id=row["Patient ID"],
                study_id="",
                image_id=name,
                split=split,
                view=row["View Position"],
                sex=cells.sex(row.get("Patient Gender", "")),
                age=cells.age(row.get("Patient Age", "")),
                labels="|".join(found),
                negative="|".join(label for label in FINDINGS if label not in found),
                boxes=json.dumps(boxes[name]) if name in boxes else "",
            )
        )
    without = [] if boxes else [f"no {_BOXES} in the root: no boxes"]
    return Collected(rows, excluded, without + cells.notes())


def _boxes(root: Path) -> dict[str, list[list[float | str]]]:
    """BBox_List_2017.csv, whose header splits "[x y w h]" over four columns; absent = none.

    Raises:  DatasetError where its header was put into quotation marks: read by it, a row would
             have a box of two numbers.
    """
    path = root / _BOXES
    boxes: dict[str, list[list[float | str]]] = {}
    if path.is_file():
        for row in read_csv(path, ["Image Index", "Finding Label"], ACCESS):
            values = list(row.values())
            if len(values) < 6:
                raise DatasetError(
                    f"{path}: expected the header as published, Image Index,Finding Label,"
                    "Bbox [x,y,w,h],,, without quotation marks: x, y, w and h are four columns"
                )
            label = _BOX_NAMES.get(row["Finding Label"], row["Finding Label"])
            numbers = numbers_of(values[2:6], "Bbox [x,y,w,h]", path)
            boxes.setdefault(row["Image Index"], []).append([*numbers, label])
    return boxes


DATASET = Dataset(
    title="NIH ChestX-ray14",
    licence="unrestricted with link, acknowledgement of the NIH Clinical Center and citation",
    access=ACCESS,
    collect=collect,
)
