"""One specification of image preparation, read by both input pipelines; parameters drawn by us.

letterbox to resize_px (longest side, centred, black around) -> crop to crop_px (keyed random or
centre) -> optional rotation about the crop's centre -> contrast and brightness -> normalise.
Never a horizontal flip: reports say left and right. DALI's own random operators are keyed by batch
slot, so every parameter comes from (seed, epoch, global index) and is handed over as an argument.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from mlip.dataloading.keyed_draws import keyed_draws
from mlip.dataloading.pipelines.crop import crop_one
from mlip.settings.config import Data

cv2.setNumThreads(0)  # threads are ours: one image a thread

FloatArray = NDArray[np.float32]


@dataclass(frozen=True)
class Parameters:
    """Per-sample parameters of one batch; out = gain * grey + offset, grey in [0, 1]."""

    top: NDArray[np.int64]  # [B] px inside the letterboxed square
    left: NDArray[np.int64]  # [B]
    gain: FloatArray  # [B] brightness, contrast and 1 / std in one factor
    offset: FloatArray  # [B]
    degrees: FloatArray  # [B] counter-clockwise

    def __len__(self) -> int:
        return len(self.top)


@dataclass(frozen=True)
class Placement:
    """Where the scaled image lies in the letterboxed square, in px."""

    height: int
    width: int
    top: int
    left: int


def letterbox(height: int, width: int, side: int) -> Placement:
    """An image's longest side scaled to `side`, centred."""
    longest = max(height, width)
    # integer rounding, half up: the same on every machine
    scaled_h = max(1, (2 * height * side + longest) // (2 * longest))
    scaled_w = max(1, (2 * width * side + longest) // (2 * longest))
    return Placement(scaled_h, scaled_w, (side - scaled_h) // 2, (side - scaled_w) // 2)


class Transform:
    """The specification of a run's images: `train` switches the random part on."""

    def __init__(self, data: Data, *, train: bool, seed: int) -> None:
        self.resize_px, self.crop_px = data.resize_px, data.crop_px
        self.channels = data.channels
        self.mean, self.std = data.mean, data.std
        self.seed = seed
        augment = data.augment
        self.random_crop = train and augment.random_crop
        self.brightness = augment.brightness if train else 0.0
        self.contrast = augment.contrast if train else 0.0
        self.rotation_degrees = augment.rotation_degrees if train else 0.0

    @property
    def margin(self) -> int:
        """Px of the square before the central crop, at its top and at its left."""
        return (self.resize_px - self.crop_px) // 2

    def draw(self, epoch: NDArray[np.int64], global_index: NDArray[np.int64]) -> Parameters:
        """Parameters of a batch, a pure function of (seed, epoch, global index)."""
        count = len(global_index)
        draws = keyed_draws(self.seed, "augment", epoch, global_index, 5)
        if self.random_crop:
            corner = (draws[:, :2] * (self.resize_px - self.crop_px + 1)).astype(np.int64)
        else:
            corner = np.full((count, 2), self.margin, dtype=np.int64)
        brightness = 1.0 + self.brightness * (2.0 * draws[:, 2] - 1.0)
        contrast = 1.0 + self.contrast * (2.0 * draws[:, 3] - 1.0)
        # brightness * (0.5 + contrast * (x - 0.5)), then (x - mean) / std, as one line
        gain = brightness * contrast / self.std
        offset = (brightness * 0.5 * (1.0 - contrast) - self.mean) / self.std
        return Parameters(
            top=corner[:, 0],
            left=corner[:, 1],
            gain=gain.astype(np.float32),
            offset=offset.astype(np.float32),
            degrees=(self.rotation_degrees * (2.0 * draws[:, 4] - 1.0)).astype(np.float32),
        )

    def placement(self, height: int, width: int) -> Placement:
        return letterbox(height, width, self.resize_px)

    def placements(
        self, height: NDArray[np.int64], width: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """`placement` of a batch: heights, widths, tops and lefts."""
        side = self.resize_px
        longest = np.maximum(height, width)
        scaled_h = np.maximum(1, (2 * height * side + longest) // (2 * longest))
        scaled_w = np.maximum(1, (2 * width * side + longest) // (2 * longest))
        return scaled_h, scaled_w, (side - scaled_h) // 2, (side - scaled_w) // 2

    def rotation(self, degrees: float) -> NDArray[np.float64]:
        """[2, 3] map from output to input pixel of the crop, about its centre."""
        angle = np.deg2rad(degrees)
        cos, sin = float(np.cos(angle)), float(np.sin(angle))
        c = (self.crop_px - 1) / 2.0
        return np.array([[cos, -sin, c - cos * c + sin * c], [sin, cos, c - sin * c - cos * c]])

    def apply(
        self,
        image: NDArray[Any],
        parameters: Parameters,
        i: int,
        out: FloatArray,
    ) -> None:
        """One grey image through the specification, written into `out`.

        Shapes:  image [H, W] uint8 or uint16; out [crop_px, crop_px] float32
        """
        place = self.placement(*image.shape)
        if (place.height, place.width) != image.shape:
            shrinks = place.height * place.width < image.size
            image = cv2.resize(
                image,
                (place.width, place.height),
                # area averaging keeps thin lines from aliasing; enlarging wants interpolation
                interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR,
            )
        top = int(parameters.top[i]) - place.top
        left = int(parameters.left[i]) - place.left
        if parameters.degrees[i] != 0.0:
            image = cv2.warpAffine(
                _window(image, top, left, self.crop_px),
                self.rotation(float(parameters.degrees[i])),
                (self.crop_px, self.crop_px),
                flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
                borderMode=cv2.BORDER_CONSTANT,
                borderValue=0,
            )
            top = left = 0
        largest = np.float32(255.0 if image.dtype == np.uint8 else 65535.0)
        crop_one(image, top, left, parameters.gain[i] / largest, parameters.offset[i], out)


def _window(image: NDArray, top: int, left: int, size: int) -> NDArray:
    """image[top : top + size, left : left + size] with black where that lies outside."""
    height, width = image.shape
    if top >= 0 and left >= 0 and top + size <= height and left + size <= width:
        return image[top : top + size, left : left + size]
    window = np.zeros((size, size), dtype=image.dtype)
    y0, y1 = max(0, top), min(height, top + size)
    x0, x1 = max(0, left), min(width, left + size)
    if y0 < y1 and x0 < x1:
        window[y0 - top : y1 - top, x0 - left : x1 - left] = image[y0:y1, x0:x1]
    return window
