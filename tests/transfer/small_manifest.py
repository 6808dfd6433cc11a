"""A manifest of thirty patients with planted secrets, and `mlip evaluate` on it.

Shared by the tests of what users get wrong.
"""

from __future__ import annotations

import csv
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from mlip.cli import main
from tests.small_run import small_export
from tests.temporary import shared_folder

ROWS, HEIGHT, WIDTH = 30, 40, 60
SPLITS = ("train", "train", "val", "test", "test")
SECRETS = ("PATIENT-SECRET", "Secretword")
SMALL = [
    *("data.resize_px=112", "data.crop_px=96", "data.channels=1", "data.max_tokens=64"),
    *("data.columns.study_id=null", "data.columns.labels=labels"),
    *("transfer.fractions=[100]", "transfer.seeds=[1]", "transfer.epochs=1", "transfer.batch=8"),
    *("transfer.decoder_width=4", "transfer.image_px=32"),
    *("evaluate.bootstrap=20", "evaluate.examples=1"),
]
LABELS = ["transfer.task=classification", "transfer.classes={Edema: zero}"]
MASKS = ["transfer.task=segmentation", "transfer.columns.mask=mask"]
BOXES = ["transfer.task=detection", "transfer.columns.boxes=boxes"]


@cache
def pictures() -> Path:
    folder = shared_folder("bad-input")
    generator = np.random.default_rng(0)
    for i in range(ROWS):
        pixels = generator.integers(0, 255, (HEIGHT, WIDTH)).astype(np.uint8)
        cv2.imwrite(str(folder / f"{i}.png"), pixels)
    cv2.imwrite(str(folder / "mask.png"), (generator.random((HEIGHT, WIDTH)) < 0.3) * 255)
    cv2.imwrite(str(folder / "small.png"), np.zeros((10, 10), np.uint8))
    return folder


def write(folder: Path, **columns: Any) -> list[str]:
    """A manifest of thirty patients in `folder`, and the settings that lead to it.

    A column is row -> cell, or a cell for all rows.
    """
    rows = []
    for i in range(ROWS):
        row: dict[str, Any] = {
            "image": f"{i}.png",
            "patient_id": f"PATIENT-SECRET-{i:03d}",
            "split": SPLITS[i % 5],
            "report": f"Secretword {i}. " + ("There is edema." if i % 3 else "No edema."),
            "labels": "Edema" if i % 3 else "Mass",
        }
        for name, cell in columns.items():
            row[name] = cell(i) if callable(cell) else cell
        rows.append(row)
    path = folder / "manifest.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return [*SMALL, f"data.manifest={path}", f"data.root={pictures()}"]


def evaluate(folder: Path, settings: list[str], checkpoint: Path | None = None) -> int:
    where = [f"checkpoint={checkpoint or small_export()}"]
    if "transfer.start=imagenet" in settings:
        where = []  # which reads no checkpoint
    return main(["evaluate", *settings, *where, "--out", str(folder / "out")])


def require_silence(folder: Path, said: str) -> None:
    files = [path for path in (folder / "out").glob("*") if path.is_file()]
    texts = [said, *(path.read_text(errors="replace") for path in files)]
    for secret in SECRETS:
        assert not [text for text in texts if secret in text], secret
