"""Smooth shapes, and how they become pixels: curves, bands, antialiased fills, soft edges.

Coordinates are shares of the image's side in a body upright and centred; `Canvas` carries them
into pixels. What does not live here: any anatomy.
"""

from __future__ import annotations

import functools
from typing import Any

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray

Points = NDArray[np.float64]
Mask = NDArray[Any]  # uint8; OpenCV's own annotations know no dtype
Density = NDArray[Any]  # float32

_SHIFT = 4  # OpenCV's fixed-point bits: sub-pixel edges
_ANGLE = np.linspace(0, 2 * np.pi, 20, endpoint=False)
CIRCLE: Points = np.stack([np.cos(_ANGLE), np.sin(_ANGLE)], axis=1)


@functools.cache
def _spline_weights(count: int, closed: bool, steps: int) -> NDArray[np.float64]:
    """Matrix that turns `count` control points into a Catmull-Rom curve."""
    t = np.linspace(0.0, 1.0, steps, endpoint=False)
    basis = 0.5 * np.stack(
        [-t + 2 * t**2 - t**3, 2 - 5 * t**2 + 3 * t**3, t + 4 * t**2 - 3 * t**3, -(t**2) + t**3],
        axis=1,
    )
    segments = count if closed else count - 1
    weights = np.zeros((segments * steps + (not closed), count))
    for segment in range(segments):
        for k in range(4):
            point = segment + k - 1
            point = point % count if closed else min(max(point, 0), count - 1)
            weights[segment * steps : (segment + 1) * steps, point] += basis[:, k]
    if not closed:
        weights[-1, -1] = 1.0
    return weights


def curve(points: ArrayLike, *, closed: bool = False, steps: int = 6) -> Points:
    """Smooth curves [..., M, 2] through control points [..., K, 2]."""
    control = np.asarray(points, dtype=np.float64)
    return _spline_weights(control.shape[-2], closed, steps) @ control


def ribbon(centre: Points, half_width: float | NDArray[np.float64]) -> Points:
    """Outlines [..., 2 K, 2] of bands around centre lines [..., K, 2]; half widths go along y."""
    offset = np.zeros_like(centre)
    offset[..., 1] = half_width
    return np.concatenate([centre - offset, (centre + offset)[..., ::-1, :]], axis=-2)


class Canvas:
    """Draws shapes given in body coordinates into images of px x px."""

    def __init__(self, px: int, *, angle: float, scale: float, shift: tuple[float, float]):
        self.px = px
        cos, sin = np.cos(angle) * scale, np.sin(angle) * scale
        turn = np.array([[cos, sin], [-sin, cos]])
        centre = np.array([0.5, 0.5])
        self._linear = turn * px
        self._offset = (centre - centre @ turn + shift) * px - 0.5

    def to_pixels(self, points: Points) -> Points:
        # one flat product: NumPy multiplies stacks of [K, 2] one by one
        flat = points.reshape(-1, 2) @ self._linear + self._offset
        return flat.reshape(points.shape)

    def _fixed(self, points: Points) -> NDArray[np.int32]:
        return np.rint(self.to_pixels(points) * (1 << _SHIFT)).astype(np.int32)

    def blank(self) -> Mask:
        return np.zeros((self.px, self.px), np.uint8)

    def fill(self, points: Points, value: int = 255, into: Mask | None = None) -> Mask:
        image = self.blank() if into is None else into
        cv2.fillPoly(image, [self._fixed(points)], value, cv2.LINE_AA, _SHIFT)
        return image

    def fill_each(self, shapes: Points, value: int, into: Mask) -> None:
        """Fills shapes [S, K, 2] one by one: where they overlap nothing is cut out."""
        for shape in self._fixed(shapes):
            cv2.fillPoly(into, [shape], value, cv2.LINE_AA, _SHIFT)

    def line(
        self,
        points: Points,
        width: float,
        value: int = 255,
        into: Mask | None = None,
        closed: bool = False,
    ) -> Mask:
        """Curves [K, 2] or [S, K, 2]; below one pixel of width they get fainter, not thinner."""
        image = self.blank() if into is None else into
        pixels = width * self.px
        thickness = max(1, round(pixels))
        level = max(1, round(value * min(1.0, pixels)))
        fixed = self._fixed(points)
        curves = list(fixed) if fixed.ndim == 3 else [fixed]
        cv2.polylines(image, curves, closed, level, thickness, cv2.LINE_AA, _SHIFT)
        return image

    def soft(self, mask: Mask, sigma: float) -> Density:
        """The mask as float32 in 0 to 1 with edges blurred by sigma image shares.

        OpenCV blurs float32 faster than uint8; wide blurs run on a quarter of the grid.
        """
        image = mask.astype(np.float32)
        image *= np.float32(1 / 255)
        pixels = sigma * self.px
        if pixels < 0.5:  # the antialiased edge and the film's own blur are wider
            return image
        if pixels < 4:
            return cv2.GaussianBlur(image, (0, 0), pixels)
        small = cv2.resize(image, None, fx=0.25, fy=0.25, interpolation=cv2.INTER_AREA)
        small = cv2.GaussianBlur(small, (0, 0), pixels / 4)
        return cv2.resize(small, (self.px, self.px), interpolation=cv2.INTER_LINEAR)
