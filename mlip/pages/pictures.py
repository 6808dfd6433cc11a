"""Radiographs and heat maps as data URIs for the report.

Maps are drawn in one direction only: bright = match. Maps of one row share one colour scale, so
that "the same words on another image" can look as cold as it is.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence

import cv2
import numpy as np
from markupsafe import Markup

from mlip.transfer.array import Array

UNSEEN = 'aria-hidden="true"'  # a layer's picture says in its own words what lies over it
HEAT = cv2.COLORMAP_INFERNO  # perceptually even, readable in any colour vision and in grey


def decode_png(text: str) -> Array:
    image = cv2.imdecode(
        np.frombuffer(base64.b64decode(text), dtype=np.uint8), cv2.IMREAD_GRAYSCALE
    )
    if image is None:
        raise ValueError("an example picture in the results is no PNG")
    return image


def picture_uri(image: Array, *, least_px: int = 288) -> str:
    """A grey image as a JPEG data URI, enlarged where it is small: pixels must not show."""
    return _jpeg_uri(_enlarge(image, least_px))


def heat_uri(image: Array, heat: Array, low: float, high: float, *, least_px: int = 288) -> str:
    """A radiograph under its map; where the map is low the radiograph stays as it is."""
    grey = _enlarge(image, least_px)
    height, width = grey.shape
    smooth = cv2.resize(
        np.asarray(heat, dtype=np.float32), (width, height), interpolation=cv2.INTER_CUBIC
    )
    share = np.clip((smooth - low) / max(high - low, 1e-6), 0.0, 1.0)
    colour = cv2.applyColorMap((share * 255).astype(np.uint8), HEAT).astype(np.float32)
    # the lowest third is left clear, so that anatomy can be read beside the heat
    opacity = 0.72 * np.clip((share - 0.33) / 0.5, 0.0, 1.0)[..., None]
    mixed = grey[..., None].astype(np.float32) * (1.0 - opacity) + colour * opacity
    return _jpeg_uri(mixed.round().astype(np.uint8))


def outline(boxes: Sequence[Sequence[float]], size: Sequence[int]) -> Markup:
    """Truth boxes as an SVG layer over a picture of `size` (height, width) model pixels."""
    drawn = []
    for x0, y0, x1, y1 in boxes:
        at = f'x="{x0:.1f}" y="{y0:.1f}" width="{x1 - x0:.1f}" height="{y1 - y0:.1f}"'
        drawn.append(f'<rect {at} class="truth-under"/><rect {at} class="truth"/>')
    return _layer("".join(drawn), size)


def crosshair(point: Sequence[float], size: Sequence[int]) -> Markup:
    """Where a map points."""
    x, y, r = point[0], point[1], size[0] / 28.0
    d = f"M{x - r:.1f},{y:.1f}H{x + r:.1f}M{x:.1f},{y - r:.1f}V{y + r:.1f}"
    return _layer(f'<path d="{d}" class="point-under"/><path d="{d}" class="point"/>', size)


def _layer(drawn: str, size: Sequence[int]) -> Markup:
    return Markup(f'<svg class="layer" viewBox="0 0 {size[1]} {size[0]}" {UNSEEN}>{drawn}</svg>')


def _enlarge(image: Array, least_px: int) -> Array:
    factor = max(1, -(-least_px // max(image.shape)))
    if factor == 1:
        return image
    size = (image.shape[1] * factor, image.shape[0] * factor)
    return cv2.resize(image, size, interpolation=cv2.INTER_CUBIC)


def _jpeg_uri(image: Array) -> str:
    done, data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 88])
    if not done:
        raise ValueError(f"an image of shape {image.shape} could not be written as JPEG")
    return "data:image/jpeg;base64," + base64.b64encode(data.tobytes()).decode("ascii")
