"""Pictures for a trained task's page: what it got most wrong, with truth and prediction drawn."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np

from mlip.dataloading.manifest import Manifest
from mlip.settings.config import Config
from mlip.transfer.array import Array
from mlip.transfer.frames import Crops, normalise
from mlip.transfer.png_text import png_text
from mlip.transfer.truth.mask_file import INSIDE


def example_pictures(
    config: Config, manifest: Manifest, task: Any, prediction: Any, test: Array
) -> list[dict[str, Any]]:
    """The worst test cases of a fit, each {"study", "caption", "image", and what to draw on it}.

    "truth_lines" and "predicted_lines" are outlines [[x, y], ...], "truth_boxes" and
    "predicted_boxes" [[x0, y0, x1, y1], ...], in shares of the picture's side. Studies appear under
    a salted hash, never under their id.
    """
    if config.evaluate.examples == 0:
        return []
    shown = []
    for case in task.worst(prediction, test, config.evaluate.examples):
        row = case["row"]
        grey = _grey(config, task, row)
        side = float(grey.shape[0])
        entry: dict[str, Any] = {
            "study": manifest.image_hash(row),
            "caption": case["caption"],
            "image": png_text(grey),
            "truth_lines": [],
            "predicted_lines": [],
            "truth_boxes": [],
            "predicted_boxes": [],
        }
        if "predicted" in case:
            entry["truth_lines"] = outlines(task.mask(row) == INSIDE)
            entry["predicted_lines"] = outlines(case["predicted"])
        if "predicted_boxes" in case:
            entry["truth_boxes"] = (task.truth(row).corners / side).round(4).tolist()
            entry["predicted_boxes"] = (
                (np.array(case["predicted_boxes"]).reshape(-1, 4) / side).round(4).tolist()
            )
        shown.append(entry)
    return shown


def _grey(config: Config, task: Any, row: int) -> Array:
    """The picture as the encoder saw it, uint8."""
    if hasattr(task, "frame"):
        pixels = normalise(task.images.read(row)[0], config)
    else:
        crops = Crops(config, task.images, train=False, seed=0)
        pixels = crops.batch(np.array([row]), 0)[0, 0].numpy()
    grey = (pixels * config.data.std + config.data.mean) * 255.0
    return grey.clip(0, 255).round().astype(np.uint8)


def outlines(mask: Array) -> list[list[list[float]]]:
    """Contours of a mask [S, S] in shares of its side."""
    found, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    side = float(mask.shape[0])
    return [((c[:, 0, :] + 0.5) / side).round(4).tolist() for c in found if len(c) >= 3]
