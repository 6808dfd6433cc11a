"""COVIDx CXR with the three-class label files of version 9A.

Licence: as stated on the data set's page; its sources have terms of their own. Access: images
https://www.kaggle.com/datasets/andyczhao/covidx-cxr2, label files
https://github.com/lindawangg/COVID-Net (labels/train_COVIDx9A.txt, test_COVIDx9A.txt).
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from mlip.dataloading.datasets.rows import (
    Collected,
    Dataset,
    DatasetError,
    Row,
    read_text,
    require,
    split_by_patient,
)

ACCESS = (
    "COVIDx: images of https://www.kaggle.com/datasets/andyczhao/covidx-cxr2 and label files of "
    "https://github.com/lindawangg/COVID-Net/tree/master/labels"
)
CLASSES = ("normal", "pneumonia", "COVID-19")


def parse_line(line: str) -> tuple[str, str, str, str]:
    """(patient, file name, class, source); file names may hold blanks, the other three not."""
    words = line.split()
    if len(words) < 4 or words[-2] not in CLASSES:
        raise ValueError(
            "expected `patient file class source` with a class of normal, pneumonia or COVID-19"
        )
    patient, rest = line.strip().split(maxsplit=1)
    return patient, rest.rsplit(maxsplit=2)[0], words[-2], words[-1]


def collect(root: Path, options: dict[str, str]) -> Collected:
    """Official test file; train file split 80/20 by patient; no patient on both sides.

    Patient numbers of different sources may be equal by chance, so a patient is (source, number).
    """
    excluded: Counter[str] = Counter()
    rows: list[Row] = []
    test_patients: set[str] = set()
    for name in ("test", "train"):
        table = require(root / f"{name}_COVIDx{options['version']}.txt", ACCESS)
        require(root / name, ACCESS, folder=True)
        for number, line in enumerate(read_text(table, ACCESS).splitlines(), start=1):
            if not line.strip():
                continue
            try:
                number_of_patient, image, label, source = parse_line(line)
            except ValueError as error:
                raise DatasetError(f"{table}: line {number}: {error}") from None
            patient = f"{source}:{number_of_patient}"
            if name == "test":
                test_patients.add(patient)
                split = "test"
            elif patient in test_patients:
                excluded["patient_in_test"] += 1
                continue
            else:
                split = split_by_patient(patient, "covidx", 0.2)
            if not (root / name / image).is_file():
                excluded["listed_but_not_there"] += 1
                continue
            rows.append(
                Row(
                    image=f"{name}/{image}",
                    patient_id=patient,
                    study_id="",
                    image_id=f"{name}/{image}",
                    split=split,
                    labels=label,
                    negative="|".join(other for other in CLASSES if other != label),
                )
            )
    return Collected(rows, excluded)


DATASET = Dataset(
    title="COVIDx CXR",
    licence="as stated on its page; its sources have terms of their own",
    access=ACCESS,
    collect=collect,
    options={"version": ("9A", "of the label files; 9A has three classes, later ones two")},
)
