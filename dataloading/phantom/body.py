"""How a body varies: proportions, lung volume, heart, spine, and the outlines that follow.

sign -1 is the patient's right (left in the image), +1 the patient's left. Drawing lives in
anatomy.py. Source: ours; proportions follow the radiographic anatomy of a PA film.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import ArrayLike, NDArray

from mlip.dataloading.phantom.canvas import Canvas, Points, curve

SIGNS = {"right": -1, "left": 1}


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
                (float(self.midline(0.45)) + s * 0.05, 0.45),
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
