"""A film's picture as 768 bits that stay when it is stored anew, and differ between films.

Any two chest films look alike in their large parts, which is why 64 bits of the lowest frequencies
do not tell them apart. Here large parts are taken out first (ranks of grey, then local mean and
local contrast divided out), and the bits are the signs of the next 768 frequencies, about half of
which differ between any two films: the reading of iris codes, by a threshold far below that.
Ranks make them blind to every rising change of grey; a falling one (inverted polarity) turns all
bits round. Measured in docs/datasets.md ("Films that look the same").

Source:  ours; signs of DCT coefficients as in pHash (Zauner 2010), the statistics of Daugman,
         "The importance of being random", Pattern Recognition 36, 2003.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

# raised when any bit of any film would change: hashes of two versions are not compared
VERSION = 1
BITS = 768
HASHES = f"perceptual_hashes_{VERSION}"  # their column in a shard's index
_SIDE = 64  # px; the highest frequency below is 32 half waves
_LOOK = 256  # px, longest side at which borders are looked for
_LEVELS = 4096  # of grey: 12-bit films keep theirs
_LOCAL = 3.2  # px of _SIDE, standard deviation of the neighbourhood
_NEAR = 15  # px of _SIDE, the neighbourhood's width
_FLAT = 0.1  # of the standard deviation of all: noise of a plain background is not blown up
_EMPTY = 0.75  # a picture with this share of one grey is a blank with a mark on it, no film
_PLAIN = 12  # a border's rows have less than 1/12 of the film's range of grey
_LEAST = 2  # px of _LOOK; a thinner border changes fewer bits than a second hash costs


def _frequencies() -> NDArray[np.intp]:
    """The BITS nearest to the lowest ones but those below 5 half waves, which all chests share."""
    down, across = np.mgrid[:_SIDE, :_SIDE]
    square = (down**2 + across**2).ravel()
    order = np.lexsort((down.ravel(), square))
    return order[square[order] >= 25][:BITS]


_PLACES = _frequencies()


def perceptual_hashes(image: NDArray[Any]) -> NDArray[np.uint8]:
    """The hashes of a grey picture: of all of it and, where it has plain borders, of the rest.

    Shapes:  [H, W] uint8 or uint16 -> [0 to 2, BITS / 8]; none where a side is below 64 px or the
             picture is blank
    """
    longest = max(image.shape)
    if longest > _LOOK:
        height, width = (max(1, round(n * _LOOK / longest)) for n in image.shape)
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    parts = [image, *([inner] if (inner := _inside_borders(image)) is not None else [])]
    found = [bits for part in parts if (bits := _hash(part)) is not None]
    return np.stack(found) if found else np.empty((0, BITS // 8), np.uint8)


def _hash(image: NDArray[Any]) -> NDArray[np.uint8] | None:
    if min(image.shape) < _SIDE:
        return None
    if min(image.shape) >= 3 * _SIDE:
        # by exactly 2 OpenCV is ten times as quick, and the rest is then a quarter of the work
        height, width = (n // 2 for n in image.shape)
        even = image[: 2 * height, : 2 * width]
        image = cv2.resize(even, (width, height), interpolation=cv2.INTER_AREA)
    small = cv2.resize(image.astype(np.float32), (_SIDE, _SIDE), interpolation=cv2.INTER_AREA)
    darkest, brightest = float(small.min()), float(small.max())
    if brightest <= darkest:
        return None
    level = ((small - darkest) * ((_LEVELS - 1) / (brightest - darkest)) + 0.5).astype(np.int32)
    counts = np.bincount(level.ravel(), minlength=_LEVELS)
    if counts.max() > _EMPTY * small.size:
        return None
    # the middle of equal ones: turned round exactly where the picture is inverted
    rank = (np.cumsum(counts) - counts / 2).astype(np.float32)[level]
    local = rank - _blurred(rank)
    local /= np.sqrt(_blurred(local * local)) + _FLAT * rank.std()
    return np.packbits(cv2.dct(local).ravel()[_PLACES] > 0)


def _blurred(image: NDArray[np.float32]) -> NDArray[Any]:
    return cv2.GaussianBlur(image, (_NEAR, _NEAR), _LOCAL, borderType=cv2.BORDER_REFLECT)


def _inside_borders(image: NDArray[Any]) -> NDArray[Any] | None:
    """What plain rows and columns surround; None where there is no border, or nothing else."""
    most = (int(image.max()) - int(image.min())) / _PLAIN
    if all(np.ptp(edge) > most for edge in (image[0], image[-1], image[:, 0], image[:, -1])):
        return None  # of most films: the rest takes a fifth of a hash's time
    kept = []
    for axis in (1, 0):
        told = np.flatnonzero(image.max(axis=axis) - image.min(axis=axis) > most)
        if len(told) == 0:
            return None
        kept.append((told[0], told[-1] + 1))
    (top, bottom), (left, right) = kept
    edges = (top, image.shape[0] - bottom, left, image.shape[1] - right)
    return image[top:bottom, left:right] if max(edges) >= _LEAST else None
