"""Where findings are on the evaluated images: boxes in pixels of the model's input.

They come from a boxes.csv beside the manifest, or from columns of boxes or masks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import cv2
import numpy as np

from mlip.dataloading.images.image_file import decode_grey, read_bytes, read_header
from mlip.dataloading.ledger import BadSample
from mlip.dataloading.manifest import Manifest
from mlip.dataloading.pipelines.samples import SampleReader
from mlip.dataloading.pipelines.transforms import Transform
from mlip.settings.config import Config
from mlip.transfer.array import Array
from mlip.transfer.truth.annotations import INSIDE, Annotations
from mlip.transfer.truth.box_file import box_file, read_box_file
from mlip.transfer.truth.generated import phantom_size
from mlip.transfer.truth.outside import OutsideBoxes

SIDES = ("left", "right")


@dataclass(frozen=True)
class Box:
    """One annotated place of one image, in pixels of the model's input."""

    finding: str
    side: str | None
    corners: tuple[float, float, float, float]  # x0, y0, x1, y1
    phrase: str = ""  # words of the report that it answers


def load_boxes(config: Config, manifest: Manifest, rows: Iterable[int]) -> dict[int, list[Box]]:
    """Boxes of boxes.csv beside the manifest for these rows, cut to the model's crop.

    Columns: path (as in the manifest), label, x, y, w, h in pixels of the file; side and phrase are
    optional.
    Where transfer.columns names a column of boxes or masks, that is read instead (a mask is the
    extents of its parts, named by the row's one label).
    A box that the centre crop leaves less than half of is dropped: it cannot be pointed at.
    Raises:  ManifestError naming the file and what is wrong with it, of boxes outside their images
             all rows at once.
    """
    columns = config.transfer.columns
    if columns.boxes is not None or columns.mask is not None:
        return _annotated(config, manifest, rows)
    drawn = read_box_file(manifest.path) or {}
    transform = Transform(config.data, train=False, seed=config.run.seed)
    fixed = phantom_size(manifest)
    boxes: dict[int, list[Box]] = {}
    outside = OutsideBoxes(f"{box_file(manifest.path)}: of the manifest beside it")
    for row in rows:
        own = drawn.get(manifest.image_path(row), [])
        size = (fixed or _image_size(manifest, row)) if own else None
        if size is None:
            continue
        corners = np.array([box.xywh for box in own])
        corners[:, 2:] += corners[:, :2]
        outside.look(row, corners, size)
        for box, (x0, y0, x1, y1) in zip(own, corners.tolist(), strict=True):
            moved = _to_model((x0, y0, x1, y1), size, transform)
            if moved is not None:
                side = box.side if box.side in SIDES else None
                boxes.setdefault(row, []).append(Box(box.label, side, moved, box.phrase))
    outside.check()
    return boxes


def _image_size(manifest: Manifest, row: int) -> tuple[int, int] | None:
    try:
        name = manifest.image_name(row)
        content = read_bytes(manifest.root, manifest.image_path(row), name)
        header = read_header(content)
        if not header.plain:  # DICOM, or turned by EXIF: the size is that of what is decoded
            height, width = decode_grey(content, header).shape
            return height, width
    except BadSample:
        return None  # the loader has left the image out already
    return header.height, header.width


def sized_rows(
    config: Config, annotations: Annotations, rows: Iterable[int]
) -> Iterator[tuple[int, tuple[int, int]]]:
    """Each row with the (height, width) its annotations are in.

    Rows whose image cannot be read are left out, as the loader has left them out already.
    """
    reader = SampleReader(annotations.manifest, config.data)
    for row in rows:
        size = annotations.source_size(row)
        try:
            if size is None:
                height, width = reader.pixels(row, 0).shape
                size = (int(height), int(width))
        except BadSample:
            continue
        yield row, size


def _annotated(config: Config, manifest: Manifest, rows: Iterable[int]) -> dict[int, list[Box]]:
    """Boxes of the manifest's own columns, through the evaluation crop."""
    annotations = Annotations(config, manifest)
    transform = Transform(config.data, train=False, seed=config.run.seed)
    found: dict[int, list[Box]] = {}
    is_boxed = config.transfer.columns.boxes is not None
    # an image is opened for its size: not where nothing lies on it
    drawn = (row for row in rows if not is_boxed or annotations.boxes(row).names)
    outside = OutsideBoxes(manifest.path)
    for row, size in sized_rows(config, annotations, drawn):
        named: list[tuple[Array, str, str]] = []
        if is_boxed:
            boxes = annotations.boxes(row)
            outside.look(row, boxes.corners, size)
            named = list(zip(boxes.corners, boxes.names, boxes.phrases, strict=True))
        elif len(labels := manifest.labels(row)) == 1:
            _, _, parts, _ = cv2.connectedComponentsWithStats(
                (annotations.mask(row, size) == INSIDE).astype(np.uint8)
            )
            for x, y, w, h, _ in parts[1:].tolist():
                named.append((np.array([x, y, x + w, y + h], dtype=float), labels[0], ""))
        for corners, name, phrase in named:
            x0, y0, x1, y1 = corners.tolist()
            moved = _to_model((x0, y0, x1, y1), size, transform)
            if moved is not None:
                found.setdefault(row, []).append(Box(name, None, moved, phrase))
    outside.check()
    return found


def _to_model(
    corners: tuple[float, float, float, float], size: tuple[int, int], transform: Transform
) -> tuple[float, float, float, float] | None:
    """Corners in file pixels -> corners in the evaluation crop; None if most of the box is cut."""
    place = transform.placement(*size)
    margin = transform.margin
    scale_x, scale_y = place.width / size[1], place.height / size[0]
    x0 = corners[0] * scale_x + place.left - margin
    y0 = corners[1] * scale_y + place.top - margin
    x1 = corners[2] * scale_x + place.left - margin
    y1 = corners[3] * scale_y + place.top - margin
    cut = [min(max(v, 0.0), float(transform.crop_px)) for v in (x0, y0, x1, y1)]
    kept = (cut[2] - cut[0]) * (cut[3] - cut[1])
    if kept < 0.5 * (x1 - x0) * (y1 - y0):
        return None
    return cut[0], cut[1], cut[2], cut[3]
