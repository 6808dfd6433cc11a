"""Images as an encoder sees them, with masks and boxes carried along by the same geometry.

Classification sees what pre-training saw (dataloading/pipelines/transforms.py: letterbox, then
crop), where transfer.image_px says so in more or fewer pixels. Masks and boxes need the whole
image: it is letterboxed (or stretched, as the published protocol does) to the encoder's side,
nothing is cut off, and mask and boxes go through the same scaling.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from mlip.dataloading.ledger import BadSample
from mlip.dataloading.manifest import Manifest
from mlip.dataloading.pipelines.samples import SampleReader
from mlip.dataloading.pipelines.transforms import Placement, Transform, letterbox
from mlip.dataloading.progress import Progress
from mlip.settings.config import Config, Data
from mlip.transfer.array import Array
from mlip.transfer.fingerprint import hash_of_parts
from mlip.transfer.truth.mask_file import resize_mask

# HKU-MedAI/MGCA's segmentation_dataset.py: ShiftScaleRotate(shift 0, scale .1, rotate 10, p .5)
AUGMENT_CHANCE, AUGMENT_SCALE, AUGMENT_DEGREES = 0.5, 0.1, 10.0

AT_ONCE = 512


@dataclass(frozen=True)
class Frame:
    """How an image of any size is laid into a square of `side` px."""

    side: int
    fit: str  # "letterbox" | "stretch"

    def place(self, height: int, width: int) -> Placement:
        if self.fit == "stretch":
            return Placement(self.side, self.side, 0, 0)
        return letterbox(height, width, self.side)

    def image(self, grey: Array) -> Array:
        """[H, W] uint8 or uint16 -> [side, side] of the same type, black around."""
        place = self.place(*grey.shape)
        shrinks = place.height * place.width < grey.size
        scaled = cv2.resize(
            grey,
            (place.width, place.height),
            interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR,
        )
        return self._lay(scaled, place)

    def mask(self, mask: Array) -> Array:
        """[H, W] -> [side, side] by nearest neighbour; the margin is outside."""
        place = self.place(*mask.shape)
        return self._lay(resize_mask(mask, place.height, place.width), place)

    def _lay(self, scaled: Array, place: Placement) -> Array:
        out = np.zeros((self.side, self.side), dtype=scaled.dtype)
        out[place.top : place.top + place.height, place.left : place.left + place.width] = scaled
        return out

    def boxes(self, corners: Array, size: tuple[int, int]) -> Array:
        """[n, 4] corners in px of a (height, width) image -> in px of the square; a new array."""
        place = self.place(*size)
        scale = np.array([place.width / size[1], place.height / size[0]] * 2)
        moved = corners * scale + np.array([place.left, place.top] * 2)
        return moved.clip(0.0, float(self.side))


class Images:
    """Grey images of manifest rows, decoded once and kept while they fit transfer.cache_gib.

    Raises:  BadSample where a file cannot be read, or `mlip prepare` refuses it as too dark; rows
             are checked with `usable` first.
    """

    def __init__(self, config: Config, manifest: Manifest, frame: Frame | None) -> None:
        self.reader = SampleReader(manifest, config.data, refuses_dark=True)
        self.frame = frame
        self._kept: dict[int, tuple[Array, tuple[int, int]]] = {}
        self._sizes: dict[int, tuple[int, int]] = {}  # of all: masks and boxes ask for no pixels
        self._digests: dict[int, bytes] = {}  # of what read gave, for `hash`
        self._room = config.transfer.cache_gib * 2**30
        self._pool = ThreadPoolExecutor(max(1, config.data.workers), "mlip-transfer")
        # without a frame the crop of pre-training follows, and needs no more than its letterbox
        self._square = Frame(crop_of(config).resize_px, "letterbox")

    def read(self, row: int) -> tuple[Array, tuple[int, int]]:
        """The row's image (in its frame where there is one) and the size of its file."""
        if row in self._kept:
            return self._kept[row]
        grey = self.reader.pixels(row, 0)
        self._sizes[row] = size = (int(grey.shape[0]), int(grey.shape[1]))
        if self.frame is not None:
            grey = self.frame.image(grey)
        else:
            place = self._square.place(*size)
            if grey.size > place.height * place.width:
                grey = cv2.resize(grey, (place.width, place.height), interpolation=cv2.INTER_AREA)
        grey = np.ascontiguousarray(grey)
        if row not in self._digests:
            self._digests[row] = hashlib.sha256(grey.data).digest()
        if self._room >= grey.nbytes:
            self._room -= grey.nbytes
            self._kept[row] = (grey, size)
        return grey, size

    def hash(self, rows: Array) -> str:
        """SHA-256 (hex) over the pixels of images that were read, as they were at first."""
        return hash_of_parts(self._digests[row] for row in np.asarray(rows).tolist())

    def size(self, row: int) -> tuple[int, int]:
        """(height, width) of the row's file, which is not read for it again."""
        if row not in self._sizes:
            self.read(row)
        return self._sizes[row]

    def many(self, rows: Sequence[int]) -> list[tuple[Array, tuple[int, int]]]:
        return list(self._pool.map(self.read, rows))

    def usable(self, rows: Array) -> tuple[Array, dict[str, int]]:
        """Rows whose image can be read, and the others counted by reason."""
        bad: dict[str, int] = {}

        def look(row: int) -> str:
            try:
                self.read(row)
            except BadSample as error:
                return error.reason
            return ""

        reasons = self.each(look, rows, "images looked at")
        for reason in filter(None, reasons):
            bad[reason] = bad.get(reason, 0) + 1
        return np.asarray(rows)[[not r for r in reasons]], bad

    def each(self, look: Callable[[int], Any], rows: Array, what: str) -> list[Any]:
        """look(row) of every row, in threads; says how many of `what` are done."""
        asked, found, told = np.asarray(rows).tolist(), list[Any](), Progress(what)
        # some at a time: a thread pool takes a kilobyte for all that is handed to it
        for start in range(0, len(asked), AT_ONCE):
            for one in self._pool.map(look, asked[start : start + AT_ONCE]):
                found.append(one)
                told(len(found), len(asked))
        return found

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


class Crops:
    """Batches as pre-training saw them: letterbox, crop (random while training), normalised.

    The sides are those of `crop_of`.
    """

    def __init__(self, config: Config, images: Images, *, train: bool, seed: int) -> None:
        self.images = images
        self.transform = Transform(crop_of(config), train=train, seed=seed)

    def batch(self, rows: Array, epoch: int) -> Tensor:
        """[B, C, crop, crop] float32"""
        index = np.asarray(rows, dtype=np.int64)
        parameters = self.transform.draw(np.full(len(index), epoch, dtype=np.int64), index)
        side = self.transform.crop_px
        out = np.empty((len(index), 1, side, side), dtype=np.float32)
        for i, (grey, _) in enumerate(self.images.many(index.tolist())):
            self.transform.apply(grey, parameters, i, out[i, 0])
        return torch.from_numpy(out).expand(-1, self.transform.channels, -1, -1)


def normalise(grey: Array, config: Config) -> Array:
    """uint8 or uint16 pixels -> (x - mean) / std, float32."""
    largest = 255.0 if grey.dtype == np.uint8 else 65535.0
    scaled = grey.astype(np.float32) * np.float32(1.0 / (largest * config.data.std))
    return scaled - np.float32(config.data.mean / config.data.std)


def to_tensor(pictures: Sequence[Array], config: Config) -> Tensor:
    """[B, C, H, W] float32 of normalised pictures."""
    stacked = torch.from_numpy(np.stack(pictures))[:, None]
    return stacked.expand(-1, config.data.channels, -1, -1)


def augmentation(side: int, seed: int, epoch: int, row: int) -> Array | None:
    """[2, 3] affine map of a training image about its centre; None half of the time.

    A pure function of its arguments. Never a flip: the heart has a side.
    """
    draw = np.random.default_rng((seed, epoch, row)).random(3)
    if draw[0] >= AUGMENT_CHANCE:
        return None
    degrees = AUGMENT_DEGREES * (2.0 * draw[1] - 1.0)
    scale = 1.0 + AUGMENT_SCALE * (2.0 * draw[2] - 1.0)
    centre = (side - 1) / 2.0
    return cv2.getRotationMatrix2D((centre, centre), degrees, scale)


def warp(image: Array, matrix: Array | None, *, nearest: bool = False, fill: Any = 0) -> Array:
    """An image or mask [S, S] through the same map; masks by nearest neighbour."""
    if matrix is None:
        return image
    return cv2.warpAffine(
        image,
        matrix,
        (image.shape[1], image.shape[0]),
        flags=cv2.INTER_NEAREST if nearest else cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_CONSTANT,
        borderValue=fill,
    )


def frame_of(config: Config) -> Frame | None:
    """The frame of the task: None for classification, which takes the crop of pre-training."""
    transfer = config.transfer
    if transfer.task == "classification":
        return None
    return Frame(transfer.image_px or config.data.crop_px, transfer.fit)


def crop_of(config: Config) -> Data:
    """config.data with the sides of a task that takes the crop of pre-training.

    With transfer.image_px letterbox and crop are scaled alike: the same part of the image, in more
    or fewer pixels. A checkpoint's own evaluation (transfer.task=none) keeps those it was trained
    with.
    """
    data, side = config.data, config.transfer.image_px
    if config.transfer.task != "classification" or side == 0:
        return data
    # the rounding of dataloading/pipelines/transforms.py: half up, in integers
    square = (2 * data.resize_px * side + data.crop_px) // (2 * data.crop_px)
    return dataclasses.replace(data, resize_px=square, crop_px=side)
