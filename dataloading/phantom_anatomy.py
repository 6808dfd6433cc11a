"""The normal chest of a phantom: how a body varies, and how its tissues are drawn.

Coordinates are shares of the image's side in a body upright and centred; `Canvas` carries them
into pixels. sign -1 is the patient's right (left in the image), +1 the patient's left. What does
not live here: findings (phantom_findings.py) and words (phantom_reports.py).
Source: ours; proportions follow the radiographic anatomy of a PA film.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import ArrayLike, NDArray

Points = NDArray[np.float64]
Mask = NDArray[np.uint8]
Density = NDArray[np.float32]

LUNG_DEPTH = 0.36  # density that aerated lung takes away: contrast 1 puts all of it back
SIGNS = {"right": -1, "left": 1}
_SHIFT = 4  # OpenCV's fixed-point bits: sub-pixel edges
_ANGLE = np.linspace(0, 2 * np.pi, 20, endpoint=False)
_CIRCLE = np.stack([np.cos(_ANGLE), np.sin(_ANGLE)], axis=1)


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
        self._linear = np.array([[cos, sin], [-sin, cos]])
        self._offset = np.array([0.5, 0.5]) - np.array([0.5, 0.5]) @ self._linear + shift

    def to_pixels(self, points: Points) -> Points:
        return (points @ self._linear + self._offset) * self.px - 0.5

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


@dataclass(frozen=True)
class Body:
    """One person's chest in one study; lengths are shares of the image's side."""

    half_chest: float  # midline to the inner chest wall at the base
    apex_y: float
    dome_y: dict[str, float]  # top of each hemidiaphragm
    cardiothoracic_ratio: float
    heart_cover: float  # share of the lung's air that the heart hides: its contrast
    heart_lean: float  # share of the heart that lies left of the midline
    knob_radius: float
    spine_bend: float  # sideways offset of the spine at its middle, positive = patient's left
    wall: float  # soft tissue outside the ribs
    has_breasts: bool
    has_sternotomy: bool
    has_leads: bool
    canvas_angle: float
    canvas_scale: float
    canvas_shift: tuple[float, float]

    def midline(self, y: ArrayLike) -> NDArray[np.float64]:
        """x of the midline at heights y: the bend of a scoliosis is largest at y = 0.45."""
        return 0.5 + self.spine_bend * np.exp(-(((np.asarray(y) - 0.45) / 0.22) ** 2))

    def base_y(self, side: str) -> float:
        """Depth of the costophrenic angle."""
        return self.dome_y[side] + 0.105

    def hilum(self, side: str) -> Points:
        y = 0.43 if side == "right" else 0.41
        return np.array([0.5 + SIGNS[side] * 0.085, y])

    def canvas(self, px: int) -> Canvas:
        return Canvas(px, angle=self.canvas_angle, scale=self.canvas_scale, shift=self.canvas_shift)

    def lung(self, side: str) -> Points:
        """Outline of a lung, closed, from the apex down the chest wall and up the midline."""
        s, w, apex = SIGNS[side], self.half_chest, self.apex_y
        dome, base = self.dome_y[side], self.base_y(side)
        lateral = curve(
            [
                (0.5 + s * 0.065, apex + 0.055),
                (0.5 + s * 0.12, apex),
                (0.5 + s * 0.205, apex + 0.035),
                (0.5 + s * (0.13 + 0.45 * w), apex + 0.13),
                (0.5 + s * 0.92 * w, 0.44),
                (0.5 + s * 0.99 * w, 0.60),
                (0.5 + s * w, base),
            ]
        )
        floor = curve(
            [
                (0.5 + s * w, base),
                (0.5 + s * (w - 0.045), dome + 0.045),
                (0.5 + s * (0.10 + 0.32 * w), dome),
                (0.5 + s * 0.10, dome + 0.022),
                (0.5 + s * 0.045, dome + 0.05),
            ]
        )
        inner = curve(
            [
                (0.5 + s * 0.045, dome + 0.05),
                (self.midline(0.45) + s * 0.05, 0.45),
                (0.5 + s * 0.045, 0.30),
                (0.5 + s * 0.065, apex + 0.055),
            ]
        )
        return np.concatenate([lateral, floor[1:], inner[1:-1]])

    def heart(self) -> Points:
        """Outline of the heart: its width is the cardiothoracic ratio times the chest's."""
        width = self.cardiothoracic_ratio * 2 * self.half_chest
        left, right = width * self.heart_lean, width * (1 - self.heart_lean)
        base = 0.5 * (self.dome_y["left"] + self.dome_y["right"]) + 0.035
        top = 0.375
        tall = base - top
        return curve(
            [
                (0.47, top),
                (0.5 - 0.75 * right, top + 0.35 * tall),
                (0.5 - right, top + 0.62 * tall),
                (0.5 - 0.72 * right, base),
                (0.5 + 0.25 * left, base + 0.03),
                (0.5 + 0.80 * left, base + 0.015),
                (0.5 + left, base - 0.06),
                (0.5 + 0.80 * left, top + 0.50 * tall),
                (0.5 + 0.42 * left + 0.02, top + 0.16 * tall),
            ],
            closed=True,
        )


def draw_body(
    rng: Generator, person: Generator, ratio: float, heart_cover: float
) -> tuple[Body, dict[str, str]]:
    """A body and its visible descriptors: `person` draws what stays the same between studies.

    `ratio` is the cardiothoracic ratio, `heart_cover` the heart's contrast. The draws come in a
    fixed order, so a study is repeatable.
    """
    half_chest = person.uniform(0.33, 0.385)
    apex_y = person.uniform(0.125, 0.165)
    is_bent = person.random() < 0.22
    bend_sign = 1 if person.random() < 0.5 else -1
    bend = bend_sign * (person.uniform(0.035, 0.055) if is_bent else person.uniform(0, 0.006))
    is_prominent = person.random() < 0.28
    knob = person.uniform(0.047, 0.058) if is_prominent else person.uniform(0.026, 0.034)
    lean = person.uniform(0.64, 0.73)
    wall = person.uniform(0.03, 0.085)
    has_breasts, has_sternotomy = person.random() < 0.4, person.random() < 0.2

    volume = ("low", "normal", "high")[int(rng.choice(3, p=(0.3, 0.4, 0.3)))]
    centre = {"low": 0.615, "normal": 0.70, "high": 0.785}[volume]
    level = centre + rng.uniform(-0.022, 0.022)
    raised = ("none", "right", "left")[int(rng.choice(3, p=(0.72, 0.14, 0.14)))]
    dome_y = {"right": level - 0.008, "left": level + 0.008}
    if raised != "none":
        # averaged so that the level itself still shows the volume
        lift = rng.uniform(0.065, 0.095)
        other = "left" if raised == "right" else "right"
        dome_y = {raised: level - 0.5 * lift, other: level + 0.5 * lift}
    has_leads = rng.random() < 0.35
    body = Body(
        half_chest=half_chest,
        apex_y=apex_y,
        dome_y=dome_y,
        cardiothoracic_ratio=ratio,
        heart_cover=heart_cover,
        heart_lean=lean,
        knob_radius=knob,
        spine_bend=bend,
        wall=wall,
        has_breasts=has_breasts,
        has_sternotomy=has_sternotomy,
        has_leads=has_leads,
        canvas_angle=float(np.deg2rad(rng.uniform(-4.0, 4.0))),
        canvas_scale=rng.uniform(0.90, 1.04),
        canvas_shift=(rng.uniform(-0.025, 0.025), rng.uniform(-0.02, 0.025)),
    )
    anatomy = {
        "lung_volume": volume,
        "heart_size": "small" if ratio < 0.41 else "normal" if ratio < 0.5 else "enlarged",
        "diaphragm": raised,
        "scoliosis": ("left" if bend_sign > 0 else "right") if is_bent else "none",
        "aorta": "prominent" if is_prominent else "normal",
        "sternotomy": "present" if has_sternotomy else "absent",
        "leads": "present" if has_leads else "absent",
    }
    return body, anatomy


@dataclass(eq=False)
class Layers:
    """The drawn chest before it becomes a film; findings add to these.

    Shapes:  each [H, W]; uint8 masks 0 to 255, float32 shares 0 to 1
    """

    canvas: Canvas
    density: Density
    vessels: Density  # added at the end, so that a pneumothorax can take them away
    lung: dict[str, Mask]  # whole lungs, the part behind the heart included
    heart: Mask
    air: Density  # share of the ray's lung that is not hidden by heart and great vessels
    texture: Density  # smooth noise around 0, about unit variance

    def add(self, shade: Density | Mask, amount: float) -> None:
        """density += amount * share"""
        if shade.dtype == np.uint8:
            amount /= 255.0
        self.density += shade * np.float32(amount)


def draw_layers(body: Body, px: int, rng: Generator) -> Layers:
    """Tissue by tissue: what absorbs adds, what holds air takes away."""
    canvas = body.canvas(px)
    lung_of = {side: canvas.fill(body.lung(side)) for side in SIGNS}
    heart = canvas.fill(body.heart())
    central = canvas.soft(_mediastinum(canvas, body, rng), 0.007)
    cv2.max(central, body.heart_cover * canvas.soft(heart, 0.009), dst=central)
    air = canvas.soft(cv2.max(lung_of["left"], lung_of["right"]), 0.006)
    air *= 1 - central
    density = np.zeros((px, px), np.float32)
    texture = _smooth_noise(px, 20, rng)
    layers = Layers(canvas, density, density, lung_of, heart, air, texture)
    layers.add(canvas.soft(canvas.fill(_torso(body)), 0.012), 0.52)
    layers.add(canvas.soft(canvas.fill(_belly(body)), 0.05), 0.14)
    layers.add(central, 0.10)
    if body.has_breasts:
        _add_breasts(layers, body, rng)
    layers.add(air, -LUNG_DEPTH)
    layers.add(air * texture, 0.04 * LUNG_DEPTH)
    _add_spine(layers, body)
    _add_bones(layers, body, rng)
    layers.vessels = _vessels(layers, body, rng)
    if body.has_leads:
        _add_leads(layers, body, rng)
    if body.has_sternotomy:
        _add_sternotomy(layers, body, rng)
    return layers


def _smooth_noise(px: int, cells: int, rng: Generator) -> Density:
    coarse = rng.standard_normal((cells, cells), dtype=np.float32)
    return cv2.resize(coarse, (px, px), interpolation=cv2.INTER_CUBIC) * 1.3


def _torso(body: Body) -> Points:
    outer = body.half_chest + body.wall
    half = [
        (0.085, -0.15),
        (0.09, 0.03),
        (0.20, 0.085),
        (0.36, 0.12),
        (0.46, 0.20),
        (0.485, 0.34),
        (max(outer - 0.02, 0.40), 0.45),
        (outer, 0.65),
        (outer + 0.01, 1.2),
    ]
    left = curve([(0.5 + x, y) for x, y in half])
    right = curve([(0.5 - x, y) for x, y in half])
    return np.concatenate([left, right[::-1]])


def _belly(body: Body) -> Points:
    top_r, top_l = body.dome_y["right"] + 0.05, body.dome_y["left"] + 0.05
    return np.array([(0.02, top_r), (0.5, top_r), (0.5, top_l), (0.98, top_l), (1, 1.2), (0, 1.2)])


def _add_breasts(layers: Layers, body: Body, rng: Generator) -> None:
    shade = layers.canvas.blank()
    size = rng.uniform(0.10, 0.15)
    for s in SIGNS.values():
        centre = np.array([0.5 + s * 0.6 * body.half_chest, 0.60 + 0.5 * size])
        layers.canvas.fill(centre + size * _CIRCLE * (1.05, 1.0), into=shade)
    layers.add(layers.canvas.soft(shade, 0.015), rng.uniform(0.03, 0.08))


def _mediastinum(canvas: Canvas, body: Body, rng: Generator) -> Mask:
    """Great vessels and aorta: what hides the lung beside the spine, the heart left out."""
    half = rng.uniform(0.05, 0.062)
    bend = body.midline(0.42)
    column = curve(
        [
            (0.5 - half * 0.9, -0.1),
            (0.5 - half, 0.2),
            (bend - half * 1.1, 0.42),
            (0.5 - half, 0.78),
            (0.5 + half, 0.78),
            (bend + half * 1.1, 0.42),
            (0.5 + half, 0.2),
            (0.5 + half * 0.9, -0.1),
        ]
    )
    image = canvas.fill(column, 215)
    descending = curve([(0.53, 0.33), (0.565, 0.45), (0.56, 0.60), (0.53, 0.8)])
    canvas.line(descending, 0.035, 150, into=image)
    return canvas.fill(np.array([0.55, 0.305]) + body.knob_radius * _CIRCLE, 235, into=image)


def _add_spine(layers: Layers, body: Body) -> None:
    """Vertebral bodies and discs, and the air of trachea and main bronchi before them."""
    canvas = layers.canvas
    heights = np.linspace(-0.1, 1.15, 12)
    middle = np.stack([body.midline(heights), heights], 1)
    half = np.array([0.037, 0.0])
    spine = np.concatenate([middle - half, (middle + half)[::-1]])
    layers.add(canvas.soft(canvas.fill(spine), 0.008), 0.07)
    levels = np.arange(0.02, 1.0, 0.062)
    centres = np.stack([body.midline(levels), levels], 1)
    discs = canvas.line(np.stack([centres - half, centres + half], 1), 0.008)
    layers.add(discs, -0.035)
    drift = 0.4 * (float(body.midline(0.3)) - 0.5)
    fork = (0.497 + drift, 0.34)
    air = canvas.line(curve([(0.5, -0.05), (0.5 + drift, 0.2), fork]), 0.030)
    mains = [[fork, body.hilum(side) - [s * 0.035, 0.02]] for side, s in SIGNS.items()]
    canvas.line(np.array(mains), 0.018, 150, into=air)
    layers.add(canvas.soft(air, 0.005), -0.11)


def _add_bones(layers: Layers, body: Body, rng: Generator) -> None:
    canvas, w = layers.canvas, body.half_chest
    gap, slope = rng.uniform(0.068, 0.076), rng.uniform(0.07, 0.11)
    signs = np.array([-1.0, 1.0])[:, None]
    y = body.apex_y - 0.01 + gap * np.arange(10)
    reach = np.minimum(0.20 + 0.055 * np.arange(10), w + 0.01)
    x_posterior = np.stack(
        [
            body.midline(y) + signs * 0.035,
            0.5 + signs * 0.45 * reach,
            0.5 + signs * 0.82 * reach,
            0.5 + signs * reach,
        ],
        axis=-1,
    )
    y_posterior = np.stack([y + 0.01, y - 0.012, y + 0.4 * slope, y + slope], axis=-1)
    posterior = _ribs(x_posterior, y_posterior, 0.0115)
    y = body.apex_y + 0.13 + 1.12 * gap * np.arange(6)
    reach = np.minimum(0.24 + 0.05 * np.arange(6), w)
    x_anterior = 0.5 + (signs * reach)[..., None] * np.array([1.0, 0.72, 0.38])
    anterior = _ribs(x_anterior, y[:, None] + np.array([0.0, 0.075, 0.115]), 0.012)
    bones = canvas.blank()
    canvas.fill_each(anterior, 95, bones)
    canvas.fill_each(posterior, 150, bones)
    canvas.line(posterior, 0.006, 230, bones, closed=True)
    # half as visible where soft tissue is thick: there the film's beam is harder and scattered
    shade = canvas.soft(bones, 0.003) * (0.5 + 0.5 * layers.air)
    layers.add(shade, rng.uniform(0.07, 0.11))
    shoulder = canvas.blank()
    lift = rng.uniform(-0.015, 0.02)
    for s in SIGNS.values():
        head = np.array([0.5 + s * 0.455, 0.215]) + 0.055 * _CIRCLE
        canvas.fill(head, 170, shoulder)
        scapula = [
            (0.5 + s * 0.41, 0.20),
            (0.5 + s * (w - 0.02), 0.24),
            (0.5 + s * (w + 0.005), 0.42),
            (0.5 + s * (w + 0.05), 0.38),
        ]
        canvas.fill(curve(scapula, closed=True), 60, shoulder)
        clavicle = [
            (0.5 + s * 0.035, 0.205 + lift),
            (0.5 + s * 0.13, 0.185 + lift),
            (0.5 + s * 0.25, 0.135 + lift),
            (0.5 + s * 0.40, 0.13 + lift),
        ]
        canvas.fill(ribbon(curve(clavicle), 0.0135), 200, shoulder)
    layers.add(canvas.soft(shoulder, 0.004), rng.uniform(0.13, 0.18))


def _ribs(x: Points, y: Points, half_width: float) -> Points:
    """Outlines [2 R, K, 2] from control points x [2, R, C] and y [R, C]."""
    control = np.stack([x, np.broadcast_to(y, x.shape)], axis=-1).reshape(-1, x.shape[-1], 2)
    return ribbon(curve(control), half_width)


def _vessels(layers: Layers, body: Body, rng: Generator) -> Density:
    """Hila and two generations of branching lung vessels."""
    canvas, count = layers.canvas, 9
    image = canvas.blank()
    for side, s in SIGNS.items():
        root = body.hilum(side)
        canvas.fill(root + _CIRCLE * (0.028, 0.05), 120, image)
        heading = np.linspace(-1.35, 1.35, count) + rng.uniform(-0.12, 0.12, count)
        reach = rng.uniform(0.13, 0.26, count) * (1.0 + 0.35 * np.abs(np.sin(heading)))
        turned = heading + rng.uniform(-0.35, 0.35, (2, count))
        step = 0.5 * reach[:, None]
        middle = root + step * np.stack([s * np.cos(heading), np.sin(heading)], -1)
        tips = middle + step * np.stack([s * np.cos(turned), np.sin(turned)], -1)
        roots = np.broadcast_to(root, tips.shape)
        branches = np.stack([roots, np.broadcast_to(middle, tips.shape), tips], axis=-2)
        canvas.line(curve(branches.reshape(-1, 3, 2), steps=4), 0.008, 95, image)
        canvas.line(np.stack([roots[0], middle], axis=-2), 0.014, 150, image)
    return canvas.soft(image, 0.005)


def _add_leads(layers: Layers, body: Body, rng: Generator) -> None:
    """Monitoring wires and their electrodes: thin lines and dense discs that are no finding."""
    canvas, wires = layers.canvas, layers.canvas.blank()
    exit_x = rng.uniform(0.25, 0.75)
    spots = [(0.22, 0.22), (0.78, 0.22), (0.72, 0.66)]
    for x, y in spots[: int(rng.integers(2, 4))]:
        spot = np.array([x, y]) + rng.uniform(-0.05, 0.05, 2)
        bulge = np.array([rng.uniform(-0.12, 0.12), rng.uniform(0.05, 0.15)])
        path = curve([spot, 0.5 * (spot + [exit_x, 0.8]) + bulge, (exit_x, 1.1)])
        canvas.line(path, 0.0075, 200, wires)
        canvas.fill(spot + 0.013 * _CIRCLE, 255, wires)
    layers.add(wires, rng.uniform(0.16, 0.26))


def _add_sternotomy(layers: Layers, body: Body, rng: Generator) -> None:
    heights = np.arange(0.27, 0.62, 0.062)
    centres = np.stack([0.5 + rng.uniform(-0.006, 0.006, heights.size), heights], 1)
    loops = centres[:, None] + _CIRCLE * (0.017, 0.010)
    layers.add(layers.canvas.line(loops, 0.0075, closed=True), rng.uniform(0.22, 0.32))
