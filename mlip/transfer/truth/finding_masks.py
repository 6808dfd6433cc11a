"""Masks of findings on the pixels a model sees: for grounding that boxes are too coarse for.

Generated studies bring a mask for each finding and side; a manifest's mask column one mask a row,
named by the row's one label.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mlip.dataloading.manifest import Manifest
from mlip.dataloading.phantom.dataset import read_truth
from mlip.dataloading.pipelines.transforms import Transform
from mlip.settings.config import Config
from mlip.transfer.array import Array
from mlip.transfer.truth.annotations import Annotations
from mlip.transfer.truth.finding_boxes import SIDES, sized_rows
from mlip.transfer.truth.generated import phantom_size, truth_of
from mlip.transfer.truth.mask_file import INSIDE, resize_mask


@dataclass(frozen=True)
class Mask:
    """Where a finding lies in one image, bit by bit: a thousand images are kept at once."""

    finding: str
    side: str | None
    bits: Array  # [crop * crop / 8] uint8
    crop_px: int

    def pixels(self) -> Array:
        """[crop, crop] bool"""
        count = self.crop_px * self.crop_px
        flat = np.unpackbits(self.bits, count=count)
        return flat.reshape(self.crop_px, self.crop_px).astype(bool)


def load_masks(config: Config, manifest: Manifest, rows: Iterable[int]) -> dict[int, list[Mask]]:
    """Masks of the rows through the evaluation's letterbox and crop; {} where the data has none.

    A mask that the crop leaves less than half of is dropped, as a box is: it cannot be pointed at.
    """
    if phantom_size(manifest) is not None:
        return _of_phantoms(config, manifest, rows)
    if config.transfer.columns.mask is not None:
        return _of_column(config, manifest, rows)
    return {}


def _of_phantoms(config: Config, manifest: Manifest, rows: Iterable[int]) -> dict[int, list[Mask]]:
    row_of = {Path(manifest.image_path(row)).stem: row for row in rows}
    transform = Transform(config.data, train=False, seed=config.run.seed)
    found: dict[int, list[Mask]] = {}
    with truth_of(manifest) as folder:
        truth = read_truth(folder, only=row_of)
    for image_id, findings in truth.items():
        for finding in findings:
            side = finding["side"] if finding["side"] in SIDES else None
            mask = _to_model(finding["mask"], finding["concept_id"], side, transform)
            if mask is not None:
                found.setdefault(row_of[image_id], []).append(mask)
    return found


def _of_column(config: Config, manifest: Manifest, rows: Iterable[int]) -> dict[int, list[Mask]]:
    annotations = Annotations(config, manifest)
    transform = Transform(config.data, train=False, seed=config.run.seed)
    looked_at = [
        row
        for row in rows
        if len(manifest.labels(row)) == 1
        and (not annotations.masks_are_files or annotations.has_mask(row))
    ]
    found: dict[int, list[Mask]] = {}
    for row, size in sized_rows(config, annotations, looked_at):
        label = manifest.labels(row)[0]
        mask = _to_model(annotations.mask(row, size) == INSIDE, label, None, transform)
        if mask is not None:
            found[row] = [mask]
    return found


def _to_model(pixels: Array, finding: str, side: str | None, transform: Transform) -> Mask | None:
    """A mask of the source image -> of the evaluation crop, by nearest neighbour."""
    place = transform.placement(*pixels.shape)
    whole = np.zeros((transform.resize_px, transform.resize_px), dtype=np.uint8)
    whole[place.top : place.top + place.height, place.left : place.left + place.width] = (
        resize_mask(pixels.astype(np.uint8), place.height, place.width)
    )
    margin = transform.margin
    crop = whole[margin : margin + transform.crop_px, margin : margin + transform.crop_px]
    if int(crop.sum()) == 0 or 2 * int(crop.sum()) < int(whole.sum()):
        return None
    return Mask(finding, side, np.packbits(crop.reshape(-1)), transform.crop_px)
