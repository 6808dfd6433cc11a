"""A mask image -> which pixels are inside, and which nobody judged.

What does not live here: run lengths (dataloading/datasets/rle.py), and which file is whose.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from mlip.dataloading.images.image_file import decode_grey, read_header

INSIDE, IGNORED = 255, 127  # values of a mask image, as V7 Labs' lung masks have them
_EXPECTED = "expected one grey channel of 255 inside and 0 outside (127 where nobody judged)"
_SLACK = 3  # JPEG moves a level so far from what was written
_FEW_LEVELS = 8  # more come from smoothed edges or from JPEG
_COLOUR_NOISE = 16  # by which JPEG lets the channels of a grey picture differ


def read_mask(content: bytes) -> NDArray[np.uint8]:
    """[H, W] uint8 of INSIDE, IGNORED and 0 from the bytes of a PNG or JPEG.

    A smoothed edge is cut at half; 16 bits are read as 8.
    Raises:  BadSample for a file that cannot be read; ValueError for colours, transparent pixels,
             other levels than 0, 127 and 255, and a mask whose levels all lie outside.
    """
    header = read_header(content)
    grey = decode_grey(content, header)
    if header.kind != "dicom":
        flags = cv2.IMREAD_UNCHANGED if header.kind == "png" else cv2.IMREAD_COLOR
        picture = cv2.imdecode(np.frombuffer(content, np.uint8), flags)
        assert picture is not None  # it was decoded a moment ago
        _require_grey(picture)
    most = int(grey.max())
    mask = (grey >> 8 if most > 255 else grey).astype(np.uint8)
    levels = _levels(mask)
    middle = _middle_planes(mask, levels)
    # without an area of it, 128 is an edge cut in half
    slack = int(np.abs(middle - IGNORED).max(initial=0))
    # by level: a film has ten million pixels
    each = np.arange(256)
    judged = np.abs(each - IGNORED) > slack
    inside = judged & (each > IGNORED)
    if most and not inside[levels].any():
        which = "outside" if judged[levels].all() else "not judged or outside"
        raise ValueError(
            f"holds values of 0 to {most}, which would all be {which}: expected 255 inside and 0 "
            "outside; multiply a mask of 0 and 1 by 255, write the wanted class of a label map so, "
            "and leave the cell blank where nothing was judged"
        )
    table = np.where(inside, INSIDE, np.where(judged, 0, IGNORED)).astype(np.uint8)
    return cv2.LUT(mask, table).astype(np.uint8, copy=False)


def _levels(mask: NDArray[np.uint8], among: NDArray[np.uint8] | None = None) -> NDArray[np.int64]:
    """The levels that the mask has, rising; those of `among` != 0 alone where it is given."""
    return np.flatnonzero(cv2.calcHist([mask], [0], among, [256], [0, 256]))


def _require_grey(picture: NDArray[Any]) -> None:
    if picture.ndim == 2:
        return
    if picture.shape[2] == 4 and (picture[:, :, 3] != np.iinfo(picture.dtype).max).any():
        raise ValueError(
            "has transparent pixels, and does not say whether those are inside: " + _EXPECTED
        )
    colours = picture[:, :, :3].astype(np.int32)
    if int((colours.max(axis=2) - colours.min(axis=2)).max()) > _COLOUR_NOISE:
        raise ValueError("is in colours, and does not say which of them is inside: " + _EXPECTED)


def _middle_planes(mask: NDArray[np.uint8], levels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Levels of about IGNORED that an area of the mask has.

    Raises:  ValueError for an area of another level than a mask's: no edge, and no noise of JPEG.
    """
    square = np.ones((3, 3), np.uint8)
    is_flat = cv2.erode(mask, square) == cv2.dilate(mask, square)
    planes = _levels(mask, is_flat.astype(np.uint8))
    is_middle = np.abs(planes - IGNORED) <= _SLACK
    if len(levels) <= _FEW_LEVELS:
        is_known = (planes == 0) | is_middle | (planes >= INSIDE - _SLACK)
    else:
        is_known = (planes < 64) | is_middle | (planes >= 192)
    # a mask of 0 and 1 is told by its highest value
    if mask.max() >= 64 and not is_known.all():
        shown = ", ".join(map(str, planes[:10].tolist()))
        raise ValueError(
            f"holds areas of the levels {shown}: {_EXPECTED}; of a label map write the wanted "
            "class so"
        )
    return planes[is_middle]


def resize_mask(mask: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """A mask on another grid by nearest neighbour: values stay INSIDE, IGNORED or 0."""
    if mask.shape == (height, width):
        return mask
    resized = cv2.resize(mask, (width, height), interpolation=cv2.INTER_NEAREST_EXACT)
    return resized.astype(np.uint8, copy=False)
