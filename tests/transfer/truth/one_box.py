"""A manifest of one image with one bright box and a boxes.csv that frames it."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from mlip.dataloading.manifest import Manifest, load_manifest
from mlip.settings.config import Config, load


def write_manifest(folder: Path, box: str, labels: str = "Pneumonia") -> tuple[Config, Manifest]:
    image = np.zeros((300, 200), np.uint8)
    image[90:150, 50:130] = 255
    cv2.imwrite(str(folder / "one.png"), image)
    (folder / "manifest.csv").write_text(
        f"image,report,patient_id,split,labels\none.png,there is pneumonia here,p1,test,{labels}\n"
    )
    (folder / "boxes.csv").write_text(f"path,label,x,y,w,h\none.png,Left_Lung,{box}\n")
    config = load(
        [],
        [
            f"data.manifest={folder / 'manifest.csv'}",
            "data.columns.study_id=null",
            "data.columns.labels=labels",
            "data.resize_px=256",
            "data.crop_px=224",
        ],
    )
    return config, load_manifest(config.data)
