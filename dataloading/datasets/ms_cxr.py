"""MS-CXR: boxes that radiologists drew around what phrases of MIMIC-CXR's reports describe.

1,162 pairs of a phrase and its boxes, eight findings. Licence: PhysioNet Credentialed Health Data
License 1.5.0. Access: credentialed account, https://physionet.org/content/ms-cxr/.
Source: Boecking et al. 2022, "Making the most of text semantics to improve biomedical
vision-language processing" (BioViL). Its images are MIMIC-CXR's (mimic_cxr.py).
"""

from __future__ import annotations

from pathlib import Path

from mlip.dataloading.datasets.rows import numbers_of, read_csv, require

ACCESS = "MS-CXR, https://physionet.org/content/ms-cxr/ (credentialed account and agreement)"
_COLUMNS = ["dicom_id", "category_name", "label_text", "x", "y", "w", "h"]


def read_boxes(option: str) -> dict[str, list[list[float | str]]]:
    """Image -> [x, y, width, height, finding, phrase] of each box, px of the source image.

    option  path of MS_CXR_Local_Alignment_v1.1.0.csv (or 1.0.0); "" = none
    Raises:  DatasetError naming the file where it is not there, or a box that is no numbers.
    """
    boxes: dict[str, list[list[float | str]]] = {}
    if not option:
        return boxes
    path = require(Path(option), ACCESS)
    for row in read_csv(path, _COLUMNS, ACCESS):
        corners = numbers_of((row[name] for name in "xywh"), "x, y, w, h", path)
        phrase = " ".join(row["label_text"].split())
        boxes.setdefault(row["dicom_id"], []).append([*corners, row["category_name"], phrase])
    return boxes
