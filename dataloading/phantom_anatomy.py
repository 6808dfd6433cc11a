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


@functools.cache
def _spline_weights(count: int, closed: bool, steps: int) -> NDArray[np.float64]:
    """Matrix that turns `count` control points into a centripetal-free Catmull-Rom curve."""
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
    """A smooth curve through control points [K, 2]."""
    control = np.asarray(points, dtype=np.float64)
    return _spline_weights(len(control), closed, steps) @ control


def ribbon(centre: Points, half_width: float | NDArray[np.float64]) -> Points:
    """The outline of a band around a centre line; half widths are measured along y."""
    offset = np.zeros_like(centre)
    offset[:, 1] = half_width
    return np.concatenate([centre - offset, (centre + offset)[::-1]])


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

    def line(
        self,
        points: Points,
        width: float,
        value: int = 255,
        into: Mask | None = None,
        closed: bool = False,
    ) -> Mask:
        """A curve of `width` image shares; below one pixel it gets fainter, not thinner."""
        image = self.blank() if into is None else into
        pixels = width * self.px
        thickness = max(1, round(pixels))
        level = max(1, round(value * min(1.0, pixels)))
        cv2.polylines(image, [self._fixed(points)], closed, level, thickness, cv2.LINE_AA, _SHIFT)
        return image

    def blur(self, image: Mask, sigma: float) -> Mask:
        return cv2.GaussianBlur(image, (0, 0), max(sigma * self.px, 0.3))


@dataclass(frozen=True)
class Body:
    """One person's chest in one study; lengths are shares of the image's side."""

    half_chest: float  # midline to the inner chest wall at the base
    apex_y: float
    dome_y: dict[str, float]  # top of each hemidiaphragm
    cardiothoracic_ratio: float
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

    def midline(self, y: float) -> float:
        """x of the midline at height y: the bend of a scoliosis is largest at y = 0.45."""
        return 0.5 + self.spine_bend * float(np.exp(-(((y - 0.45) / 0.22) ** 2)))

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


def draw_body(rng: Generator, person: Generator, ratio: float) -> tuple[Body, dict[str, str]]:
    """A body and its visible descriptors: `person` draws what stays the same between studies.

    `ratio` is the cardiothoracic ratio; draws are in a fixed order, so one study's are repeatable.
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

    Shapes:  each [H, W]; masks 0 to 255 with soft edges
    """

    canvas: Canvas
    density: Density
    vessels: Mask  # added at the end, so that a pneumothorax can take them away
    lung: dict[str, Mask]
    heart: Mask
    texture: Density  # smooth noise around 0, about unit variance

    def add(self, mask: Mask, amount: float) -> None:
        self.density += mask * np.float32(amount / 255.0)


def draw_layers(body: Body, px: int, rng: Generator) -> Layers:
    """Tissue by tissue: what absorbs adds, what holds air takes away."""
    canvas = body.canvas(px)
    density = np.zeros((px, px), np.float32)
    lung_of = {side: canvas.fill(body.lung(side)) for side in SIGNS}
    lungs = cv2.max(lung_of["left"], lung_of["right"])
    texture = _smooth_noise(px, 20, rng)
    layers = Layers(canvas, density, canvas.blank(), lung_of, canvas.fill(body.heart()), texture)

    layers.add(canvas.blur(canvas.fill(_torso(body)), 0.012), 0.50)
    layers.add(canvas.blur(canvas.fill(_belly(body)), 0.05), 0.18)
    if body.has_breasts:
        _add_breasts(layers, body, rng)
    layers.add(canvas.blur(lungs, 0.006), -LUNG_DEPTH)
    layers.density += texture * (0.035 * LUNG_DEPTH / 255.0) * lungs
    _add_mediastinum(layers, body, rng)
    heart = canvas.blur(layers.heart, 0.009)
    layers.add(heart, 0.26 + rng.uniform(-0.02, 0.02))
    _add_bones(layers, body, rng)
    _draw_vessels(layers, body, rng)
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
        angle = np.linspace(0, 2 * np.pi, 24, endpoint=False)
        layers.canvas.fill(
            centre + size * np.stack([1.05 * np.cos(angle), np.sin(angle)], 1), into=shade
        )
    layers.add(layers.canvas.blur(shade, 0.015), rng.uniform(0.03, 0.08))


def _add_mediastinum(layers: Layers, body: Body, rng: Generator) -> None:
    canvas = layers.canvas
    heights = np.linspace(-0.1, 1.15, 12)
    spine_x = np.array([body.midline(y) for y in heights])
    spine = np.concatenate(
        [
            np.stack([spine_x - 0.038, heights], 1),
            np.stack([spine_x + 0.038, heights], 1)[::-1],
        ]
    )
    layers.add(canvas.blur(canvas.fill(spine), 0.008), 0.10)
    discs = canvas.blank()
    for y in np.arange(0.02, 1.0, 0.062):
        x = body.midline(y)
        canvas.line(np.array([(x - 0.036, y), (x + 0.036, y)]), 0.008, into=discs)
    layers.add(discs, -0.04)
    half = rng.uniform(0.05, 0.062)
    column = curve(
        [
            (0.5 - half * 0.9, -0.1),
            (0.5 - half, 0.2),
            (body.midline(0.42) - half * 1.1, 0.42),
            (0.5 - half, 0.75),
            (0.5 + half, 0.75),
            (body.midline(0.42) + half * 1.1, 0.42),
            (0.5 + half, 0.2),
            (0.5 + half * 0.9, -0.1),
        ]
    )
    layers.add(canvas.blur(canvas.fill(column), 0.008), 0.15)
    angle = np.linspace(0, 2 * np.pi, 20, endpoint=False)
    circle = np.stack([np.cos(angle), np.sin(angle)], 1)
    knob = np.array([0.5 + 0.05, 0.305]) + body.knob_radius * circle
    aorta = canvas.fill(knob)
    descending = curve([(0.53, 0.33), (0.565, 0.45), (0.56, 0.60), (0.53, 0.8)])
    canvas.line(descending, 0.035, 130, into=aorta)
    layers.add(canvas.blur(aorta, 0.006), 0.13)
    drift = 0.4 * (body.midline(0.3) - 0.5)
    trachea = curve([(0.5, -0.05), (0.5 + drift, 0.2), (0.497 + drift, 0.34)])
    air = canvas.line(trachea, 0.030)
    for side, s in SIGNS.items():
        hilum = body.hilum(side)
        bronchus = np.array([(0.497 + drift, 0.34), (0.5 + s * 0.05, hilum[1] - 0.02)])
        canvas.line(bronchus, 0.018, 150, into=air)
    layers.add(canvas.blur(air, 0.005), -0.11)


def _add_bones(layers: Layers, body: Body, rng: Generator) -> None:
    canvas, w = layers.canvas, body.half_chest
    posterior, anterior, edges = canvas.blank(), canvas.blank(), canvas.blank()
    start, gap = body.apex_y - 0.01, rng.uniform(0.068, 0.076)
    slope = rng.uniform(0.07, 0.11)
    for s in SIGNS.values():
        for k in range(10):
            y = start + k * gap
            reach = min(0.20 + 0.055 * k, w + 0.01)
            centre = curve(
                [
                    (body.midline(y) + s * 0.035, y + 0.01),
                    (0.5 + s * 0.45 * reach, y - 0.012),
                    (0.5 + s * 0.82 * reach, y + 0.4 * slope),
                    (0.5 + s * reach, y + slope),
                ]
            )
            outline = ribbon(centre, 0.0115)
            canvas.fill(outline, 150, posterior)
            canvas.line(outline, 0.006, 200, edges, closed=True)
        for k in range(6):
            y = start + 0.14 + k * gap * 1.12
            reach = min(0.24 + 0.05 * k, w)
            centre = curve(
                [
                    (0.5 + s * reach, y),
                    (0.5 + s * 0.72 * reach, y + 0.075),
                    (0.5 + s * 0.38 * reach, y + 0.115),
                ]
            )
            canvas.fill(ribbon(centre, 0.012), 110, anterior)
    layers.add(canvas.blur(cv2.max(posterior, edges), 0.003), rng.uniform(0.07, 0.11))
    layers.add(canvas.blur(anterior, 0.005), rng.uniform(0.05, 0.09))
    shoulder = canvas.blank()
    lift = rng.uniform(-0.015, 0.02)
    for s in SIGNS.values():
        clavicle = curve(
            [
                (0.5 + s * 0.035, 0.205 + lift),
                (0.5 + s * 0.13, 0.185 + lift),
                (0.5 + s * 0.25, 0.135 + lift),
                (0.5 + s * 0.40, 0.13 + lift),
            ]
        )
        canvas.fill(ribbon(clavicle, 0.0135), 200, shoulder)
        angle = np.linspace(0, 2 * np.pi, 16, endpoint=False)
        head = np.array([0.5 + s * 0.455, 0.215]) + 0.055 * np.stack(
            [np.cos(angle), np.sin(angle)], 1
        )
        canvas.fill(head, 170, shoulder)
        scapula = curve(
            [
                (0.5 + s * 0.41, 0.20),
                (0.5 + s * (w - 0.02), 0.24),
                (0.5 + s * (w + 0.005), 0.42),
                (0.5 + s * (w + 0.05), 0.38),
            ],
            closed=True,
        )
        canvas.fill(scapula, 60, shoulder)
    layers.add(canvas.blur(shoulder, 0.004), rng.uniform(0.13, 0.18))


def _draw_vessels(layers: Layers, body: Body, rng: Generator) -> None:
    canvas, vessels = layers.canvas, layers.vessels
    for side, s in SIGNS.items():
        root = body.hilum(side)
        angle = np.linspace(0, 2 * np.pi, 14, endpoint=False)
        hilar = root + np.stack([0.028 * np.cos(angle), 0.05 * np.sin(angle)], 1)
        canvas.fill(hilar, 120, vessels)
        count = 9
        headings = np.linspace(-1.35, 1.35, count) + rng.uniform(-0.12, 0.12, count)
        lengths = rng.uniform(0.13, 0.26, count)
        bends = rng.uniform(-0.35, 0.35, (count, 2))
        for heading, length, bend in zip(headings, lengths, bends, strict=True):
            reach = length * (1.0 + 0.35 * abs(np.sin(heading)))
            middle = root + 0.5 * reach * np.array([s * np.cos(heading), np.sin(heading)])
            for turn in bend:
                tip = middle + 0.5 * reach * np.array(
                    [s * np.cos(heading + turn), np.sin(heading + turn)]
                )
                canvas.line(curve([root, middle, tip], steps=4), 0.008, 95, vessels)
            canvas.line(np.stack([root, middle]), 0.014, 150, vessels)
    layers.vessels = canvas.blur(vessels, 0.005)


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
        angle = np.linspace(0, 2 * np.pi, 10, endpoint=False)
        canvas.fill(spot + 0.013 * np.stack([np.cos(angle), np.sin(angle)], 1), 255, wires)
    layers.add(wires, rng.uniform(0.16, 0.26))


def _add_sternotomy(layers: Layers, body: Body, rng: Generator) -> None:
    canvas, wires = layers.canvas, layers.canvas.blank()
    angle = np.linspace(0, 2 * np.pi, 12, endpoint=False)
    for y in np.arange(0.27, 0.62, 0.062):
        centre = np.array([0.5 + rng.uniform(-0.006, 0.006), y])
        loop = centre + np.stack([0.017 * np.cos(angle), 0.010 * np.sin(angle)], 1)
        canvas.line(loop, 0.0075, 255, wires, closed=True)
    layers.add(wires, rng.uniform(0.22, 0.32))
