"""CheXpert, full or small: train.csv and valid.csv with uncertain labels kept apart.

Licence: Stanford University Dataset Research Use Agreement. Access: registration,
https://stanfordaimi.azurewebsites.net (data set CheXpert-v1.0). Sex and age are its columns Sex
(Male, Female, Unknown) and Age, in which all over 89 are 90. An Age of 0 counts as not stated: the
publisher does not explain it, public loaders (torchxrayvision) read it so.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path

from mlip.dataloading.datasets.rows import (
    Collected,
    Dataset,
    DatasetError,
    Row,
    csv_lines,
    label_states,
    read_csv,
    read_text,
    require,
    require_choice,
    split_by_patient,
)
from mlip.dataloading.demographics import PatientCells

ACCESS = "CheXpert-v1.0, https://stanfordaimi.azurewebsites.net (registration and agreement)"
FIVE = ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion")
_MUST_BE_ABSENT = (
    "Enlarged Cardiomediastinum",
    "Lung Lesion",
    "Lung Opacity",
    "Pneumonia",
    "Pneumothorax",
    "Pleural Other",
    "Fracture",
    "Support Devices",
)
_OTHER = ("Path", "Sex", "Age", "Frontal/Lateral", "AP/PA")
# 5,000 of the 223,414 training images, which published protocols hold out, as a share of patients
VAL_SHARE = 5_000 / 223_414


def collect(root: Path, options: dict[str, str]) -> Collected:
    """train.csv split by patient, valid.csv as test; 5x200 images set apart with their patients."""
    require_choice(options, "views", ("frontal", "all"))
    base = root if (root / "train.csv").is_file() else _base(root)
    required = ["Path", "Frontal/Lateral", "AP/PA", *FIVE]
    tables = {
        name: list(read_csv(require(base / f"{name}.csv", ACCESS), required, ACCESS))
        for name in ("train", "valid")
    }
    prefix = "" if base == root else base.relative_to(root).as_posix() + "/"
    chosen, notes = _five_by_200(tables["train"], options["five_by_200"])
    patients_5x200 = {_patient(path, "train.csv") for path in chosen}
    excluded: Counter[str] = Counter()
    rows: list[Row] = []
    cells = PatientCells()
    for name, table in tables.items():
        for row in table:
            path = _inside(row["Path"])
            patient = _patient(path, f"{name}.csv")
            frontal = row["Frontal/Lateral"] == "Frontal"
            if options["views"] == "frontal" and not frontal:
                excluded["view_not_frontal"] += 1
                continue
            listed = name == "train" and path in chosen
            if name == "train" and patient in patients_5x200 and not listed:
                excluded["other_image_of_5x200_patient"] += 1
                continue
            positive, uncertain, negative = label_states(row, _OTHER, base / f"{name}.csv")
            official_test = name == "valid" or listed
            rows.append(
                Row(
                    image=prefix + path,
                    patient_id=patient,
                    study_id="/".join(path.split("/")[1:3]),
                    image_id=path,
                    split="test"
                    if official_test
                    else split_by_patient(patient, "chexpert", VAL_SHARE),
                    view=row["AP/PA"] if frontal else "LATERAL",
                    sex=cells.sex(row.get("Sex", "")),
                    age=cells.age(row.get("Age", ""), zero_years=""),
                    labels=positive,
                    uncertain=uncertain,
                    negative=negative,
                    subset="5x200" if listed else "valid" if name == "valid" else "",
                )
            )
    return Collected(rows, excluded, notes + cells.notes())


def _base(root: Path) -> Path:
    for name in ("CheXpert-v1.0", "CheXpert-v1.0-small"):
        if (root / name / "train.csv").is_file():
            return root / name
    hint = ""
    if next(root.glob("CheXpert-v1.0 batch*"), None) is not None:
        hint = (
            ". The archives in batches make one folder: move the content of batch 1 into "
            "CheXpert-v1.0/ and the patients of the others into CheXpert-v1.0/train/"
        )
    raise DatasetError(
        f"{root}: no train.csv here or in CheXpert-v1.0/. It is part of {ACCESS}{hint}"
    )


def _inside(path: str) -> str:
    """The Path column without its first component, the folder's published name."""
    parts = path.split("/")
    return "/".join(parts[1:]) if parts[0].startswith("CheXpert") else path


def _patient(path: str, file: str) -> str:
    parts = path.split("/")
    if len(parts) < 4 or not parts[1].startswith("patient"):
        raise DatasetError(
            f"{file}: column Path: expected "
            "CheXpert-v1.0/train/patient00001/study1/view1_frontal.jpg"
        )
    return parts[1]


def _five_by_200(table: list[dict[str, str]], choice: str) -> tuple[set[str], list[str]]:
    """Paths of the 5x200 images: none, by our rule, or a published list."""
    if choice == "none":
        return set(), []
    if choice != "rule":
        paths, digest = read_five_by_200(choice)
        known = {_inside(row["Path"]) for row in table}
        if not paths <= known:
            raise DatasetError(
                f"{choice}: {len(paths - known)} of {len(paths)} paths are not in train.csv"
            )
        counts = [len(paths & set(_showing_alone(table, finding))) for finding in FIVE]
        return paths, [
            f"5x200 list: {len(paths)} images, SHA-256 {digest}",
            "of them show one finding alone, as the rule of 5x200 wants: "
            + ", ".join(f"{name} {n}" for name, n in zip(FIVE, counts, strict=True)),
        ]
    chosen: set[str] = set()
    for finding in FIVE:
        eligible = _showing_alone(table, finding)
        # an order that depends on the path alone, not on the file's order or a generator
        eligible.sort(key=lambda path: hashlib.sha256(f"5x200 {path}".encode()).digest())
        if len(eligible) < 200:
            raise DatasetError(
                f"5x200: only {len(eligible)} images show {finding} alone, 200 are needed; set "
                "--option five_by_200=none"
            )
        chosen.update(eligible[:200])
    digest = hashlib.sha256("\n".join(sorted(chosen)).encode()).hexdigest()
    return chosen, [f"5x200 by rule: {len(chosen)} images, SHA-256 of the sorted list {digest}"]


def read_five_by_200(option: str) -> tuple[set[str], str]:
    """Paths below CheXpert-v1.0/ of a published list of 5x200, and the file's SHA-256.

    Raises:  DatasetError naming the file where it is not there, or holds no paths.
    """
    publisher = "the project that published it"
    path = require(Path(option), publisher)
    paths = {_inside(listed) for listed in _listed(read_text(path, publisher), option)}
    return paths, hashlib.sha256(path.read_bytes()).hexdigest()


def _showing_alone(table: list[dict[str, str]], finding: str) -> list[str]:
    """Paths of the frontal images where one finding is 1 and all others are 0 or blank."""
    return [
        _inside(row["Path"])
        for row in table
        if row["Frontal/Lateral"] == "Frontal"
        and _number(row[finding]) == 1.0
        and all(
            _number(row.get(other, "")) == 0.0
            for other in (*FIVE, *_MUST_BE_ABSENT)
            if other != finding
        )
    ]


def _number(text: str) -> float:
    return float(text) if text else 0.0


def _listed(text: str, name: str) -> list[str]:
    """Paths of a JSON list or mapping, or of a CSV's Path column or only column.

    Published forms: {"73906": {"image_path": "train/...", "label": [0, 1, 0, 0, 0]}, ...},
    {"Edema": ["train/...", ...], ...}, ["train/...", ...], a CSV with a Path column.
    Raises:  DatasetError where it holds none.
    """
    if name.endswith(".json"):
        try:
            content = json.loads(text)
            items = list(content.values()) if isinstance(content, dict) else list(content)
            if not items:
                raise ValueError
            if all(isinstance(item, list) for item in items):
                items = [path for item in items for path in item]
            return [
                str(item.get("image_path") or item["Path"]) if isinstance(item, dict) else str(item)
                for item in items
            ]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise DatasetError(
                f"{name}: expected JSON with paths, as a list, by finding, or as image_path"
            ) from None
    lines = [line for line in csv_lines(text, name) if line]
    place = lines[0].index("Path") if lines and "Path" in lines[0] else None
    listed = [line[place or 0] for line in lines[place is not None :] if len(line) > (place or 0)]
    if not listed:
        raise DatasetError(f"{name}: expected paths, one a line; there is none")
    return listed


DATASET = Dataset(
    title="CheXpert",
    licence="Stanford University Dataset Research Use Agreement (no redistribution)",
    access=ACCESS,
    collect=collect,
    options={
        "views": ("frontal", "frontal or all"),
        "five_by_200": ("none", "none, rule, or a published list (.json or .csv)"),
    },
)
