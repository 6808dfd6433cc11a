"""How each finding changes the drawn chest, and the mask of what it changed.

Every function draws into Layers and returns the region it changed: the truth that boxes and
pointing are judged by. Source: ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from mlip.dataloading.phantom.anatomy import LUNG_DEPTH, Layers
from mlip.dataloading.phantom.body import SIGNS, Body
from mlip.dataloading.phantom.canvas import Mask, curve
from mlip.dataloading.phantom.study_types import SPEC_OF, FindingTruth, Side, Zone, size_tier

METAL = 0.42  # density of contrast 1 for devices


@dataclass(frozen=True)
class Drawn:
    """What a finding's function hands back: its region and what it turned out to be."""

    mask: NDArray[np.bool_]
    zone: Zone | None = None
    variant: str | None = None


def _zone_heights(body: Body, side: str, zone: Zone) -> tuple[float, float]:
    """The middle 76 % of a third of the lung, from its apex to 0.05 below the dome."""
    tall = body.dome_y[side] + 0.05 - body.apex_y
    start = body.apex_y + tall * ("upper", "mid", "lower").index(zone) / 3
    return start + 0.12 * tall / 3, start + 0.88 * tall / 3


def _place(
    body: Body,
    layers: Layers,
    side: str,
    zone: Zone,
    margin: float,
    blocked: NDArray[np.bool_],
    rng: Generator,
) -> NDArray[np.float64] | None:
    """A point of the zone, `margin` inside the lung, clear of heart and of what is blocked."""
    low, high = _zone_heights(body, side, zone)
    canvas, px = layers.canvas, layers.canvas.px
    reach = max(1, round(margin * px))
    for _ in range(12):
        x = 0.5 + SIGNS[side] * rng.uniform(0.09, body.half_chest - 0.03)
        point = np.array([x, rng.uniform(low, high)])
        column, row = np.rint(canvas.to_pixels(point[None])[0]).astype(int)
        top, left = row - reach, column - reach
        if top < 0 or left < 0 or row + reach >= px or column + reach >= px:
            continue
        window = np.s_[top : row + reach + 1, left : column + reach + 1]
        if layers.lung[side][window].min() < 128 or layers.heart[row, column] > 20:
            continue
        if not blocked[window].any():
            return point
    return None


def _half(layers: Layers, side: str) -> NDArray[np.float32]:
    """The air of one lung only, with the whole of its soft edge."""
    reach = 2 * round(0.02 * layers.canvas.px) + 1
    wide = cv2.dilate(layers.lung[side], np.ones((reach, reach), np.uint8))
    return layers.canvas.soft(wide, 0.0) * layers.air


def _effusion(body, layers, side, size, contrast, zone, blocked, rng) -> Drawn | None:
    s, w = SIGNS[side], body.half_chest
    base, canvas = body.base_y(side), layers.canvas
    inner = size * rng.uniform(0.35, 0.6) - 0.02
    dome = body.dome_y[side]
    surface = curve(
        [
            (0.5 + s * (w + 0.03), base - size - 0.01),
            (0.5 + s * (w - 0.03), base - 0.86 * size),
            (0.5 + s * 0.62 * w, min(base - 0.80 * size, dome + 0.11 - inner)),
            (0.5 + s * 0.03, min(base - 0.72 * size, dome + 0.12 - inner)),
        ]
    )
    floor = np.array([(0.5 + s * 0.03, base + 0.1), (0.5 + s * (w + 0.03), base + 0.1)])
    fluid = canvas.fill(np.concatenate([surface, floor]))
    layers.add(canvas.soft(fluid, 0.012) * _half(layers, side), contrast * LUNG_DEPTH)
    return Drawn((cv2.min(fluid, layers.lung[side]) > 127) & (layers.air > 0.5))


def _pneumothorax(body, layers, side, size, contrast, zone, blocked, rng) -> Drawn | None:
    canvas, lung = layers.canvas, body.lung(side)
    hilum = body.hilum(side) + np.array([0.0, 0.08])
    low = body.apex_y + (0.45 + 0.9 * size) * (body.base_y(side) - body.apex_y)
    weight = np.clip((low - lung[:, 1]) / (low - body.apex_y), 0.0, 1.0)[:, None] ** 0.7
    collapsed = lung + size * weight * (hilum - lung)
    kept = canvas.fill(collapsed)
    free = canvas.soft(cv2.subtract(layers.lung[side], kept), 0.002)
    layers.vessels *= 1 - free
    free *= layers.air
    layers.add(free, -contrast * LUNG_DEPTH)
    layers.add(canvas.soft(cv2.min(kept, layers.lung[side]), 0.0) * layers.air, 0.12 * size)
    pleura = canvas.line(collapsed, 0.008, 230, closed=True)
    beside = cv2.dilate(free, np.ones((3, 3), np.uint8))
    layers.add(canvas.soft(pleura, 0.0) * beside * layers.air, 0.35 * LUNG_DEPTH)
    return Drawn(cv2.morphologyEx(free, cv2.MORPH_OPEN, np.ones((2, 2), np.uint8)) > 0.5)


def _consolidation(body, layers, side, size, contrast, zone, blocked, rng) -> Drawn | None:
    centre = _place(body, layers, side, zone, 0.5 * size, blocked, rng)
    if centre is None:
        return None
    canvas, count = layers.canvas, 9
    angle = np.linspace(0, 2 * np.pi, count, endpoint=False)
    radius = size * rng.uniform(0.7, 1.3, count)
    stretch = rng.uniform(0.85, 1.2)
    ring = np.stack([stretch * radius * np.cos(angle), radius * np.sin(angle) / stretch], 1)
    blob = canvas.fill(curve(centre + ring, closed=True, steps=4))
    region = cv2.min(blob, layers.lung[side])
    patchy = np.clip(1.0 + 0.28 * layers.texture, 0.4, 1.6)
    shade = canvas.soft(blob, 0.25 * size) * _half(layers, side)
    layers.add(shade * patchy, contrast * LUNG_DEPTH)
    return Drawn(region > 127, zone=zone)


def _nodule(body, layers, side, size, contrast, zone, blocked, rng) -> Drawn | None:
    centre = _place(body, layers, side, zone, 1.3 * size, blocked, rng)
    if centre is None:
        return None
    canvas = layers.canvas
    angle = np.linspace(0, 2 * np.pi, 14, endpoint=False)
    radius = size * rng.uniform(0.92, 1.08, 14)[:, None]
    disc = canvas.fill(centre + radius * np.stack([np.cos(angle), np.sin(angle)], 1))
    layers.add(canvas.soft(disc, 0.18 * size), contrast * LUNG_DEPTH)
    return Drawn(disc > 127, zone=zone)


def _cardiomegaly(body, layers, side, size, contrast, zone, blocked, rng) -> Drawn | None:
    # the heart itself was drawn with the ratio: nothing is added here
    return Drawn(layers.heart > 127)


def _atelectasis(body, layers, side, size, contrast, zone, blocked, rng) -> Drawn | None:
    centre = _place(body, layers, side, zone, 0.025, blocked, rng)
    if centre is None:
        return None
    canvas, bands = layers.canvas, layers.canvas.blank()
    tilt = rng.uniform(-0.45, 0.45)
    along = np.array([np.cos(tilt), np.sin(tilt)])
    for k in range(int(rng.integers(1, 4))):
        middle = centre + np.array([rng.uniform(-0.02, 0.02), (k - 0.5) * 0.04])
        length = size * (1.0 if k == 0 else rng.uniform(0.5, 0.9))
        t = np.linspace(-0.5, 0.5, 9)
        line = middle + length * t[:, None] * along
        line[:, 1] += rng.uniform(-0.01, 0.01) * np.cos(np.pi * t)
        half = 0.0105 * np.cos(0.9 * np.pi * t)
        offset = np.stack([np.zeros_like(half), half], 1)
        canvas.fill(np.concatenate([line - offset, (line + offset)[::-1]]), into=bands)
    region = cv2.min(bands, layers.lung[side])
    layers.add(canvas.soft(bands, 0.003) * _half(layers, side), contrast * LUNG_DEPTH)
    return Drawn(region > 100, zone=zone)


def _pacemaker(body, layers, side, size, contrast, zone, blocked, rng) -> Drawn | None:
    s, canvas = SIGNS[side], layers.canvas
    centre = np.array([0.5 + s * rng.uniform(0.22, 0.29), rng.uniform(0.20, 0.27)])
    half = 0.5 * size
    turn = rng.uniform(-0.5, 0.5)
    rotate = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    corners = np.array([(-1, -0.7), (0, -0.85), (1, -0.7), (1, 0.6), (0, 0.85), (-1, 0.6)])
    outline = centre + half * corners @ rotate
    case = canvas.fill(curve(outline, closed=True, steps=4))
    is_dual = rng.random() < 0.5
    ratio = body.cardiothoracic_ratio * 2 * body.half_chest * body.heart_lean
    floor = 0.5 * (body.dome_y["left"] + body.dome_y["right"])
    entry = [centre + [-s * half, -0.2 * half], (0.5 + s * 0.10, 0.175)]
    cava = [(0.5 + s * 0.02 - 0.02, 0.24), (0.455, 0.34)]
    ventricle = [(0.445, 0.5), (0.5, floor - 0.04), (0.5 + 0.55 * ratio, floor - 0.03)]
    leads = canvas.line(curve([*entry, *cava, *ventricle]), 0.0085, 220)
    if is_dual:
        atrium = [(0.45, 0.47), (0.425, 0.54), (0.44, 0.50)]
        canvas.line(curve([*entry, *cava, *atrium]), 0.0085, 220, leads)
    layers.add(case, contrast * METAL)
    layers.add(cv2.subtract(leads, case), 0.75 * contrast * METAL)
    return Drawn(cv2.max(case, leads) > 60, variant="dual lead" if is_dual else "single lead")


def _catheter(body, layers, side, size, contrast, zone, blocked, rng) -> Drawn | None:
    s, canvas = SIGNS[side], layers.canvas
    is_jugular = rng.random() < 0.5
    if is_jugular:
        x = 0.5 + s * rng.uniform(0.06, 0.085)
        start = [(x + s * 0.01, -0.04), (x, 0.08)]
    else:
        y = rng.uniform(0.11, 0.15)
        start = [
            (0.5 + s * rng.uniform(0.30, 0.36), y + rng.uniform(0.03, 0.08)),
            (0.5 + s * 0.22, y + 0.025),
            (0.5 + s * 0.12, y + 0.045),
        ]
    tip = rng.uniform(0.38, 0.53)
    shift = rng.uniform(-0.006, 0.006)
    path = curve(
        [*start, (0.5 + s * 0.035 - 0.012, 0.21), (0.458 + shift, 0.30), (0.452 + shift, tip)]
    )
    line = canvas.line(path, 0.0085, 255)
    layers.add(line, contrast * METAL)
    return Drawn(line > 60, variant="jugular" if is_jugular else "subclavian")


_DRAW: dict[str, Callable[..., Drawn | None]] = {
    "pleural_effusion": _effusion,
    "pneumothorax": _pneumothorax,
    "consolidation": _consolidation,
    "lung_nodule": _nodule,
    "cardiomegaly": _cardiomegaly,
    "atelectasis": _atelectasis,
    "pacemaker": _pacemaker,
    "central_venous_catheter": _catheter,
}


@dataclass(frozen=True)
class Plan:
    """A finding that is to be drawn: decided before the body is."""

    concept_id: str
    side: Side | None
    zone: Zone | None
    size: float
    contrast: float


def plan_findings(rng: Generator) -> list[Plan]:
    """Which findings a study has, at most four, with their draws of place, size and contrast.

    Independent of anatomy and exposure, so neither gives a finding away.
    """
    chosen = [spec for spec in SPEC_OF.values() if rng.random() < spec.prevalence]
    if len(chosen) > 4:
        keep = sorted(rng.permutation(len(chosen))[:4].tolist())
        chosen = [chosen[k] for k in keep]
    plans: list[Plan] = []
    for spec in chosen:
        sides: list[Side | None] = [None]
        if spec.has_side:
            left_share = 0.7 if spec.concept_id == "pacemaker" else 0.5
            first: Side = "left" if rng.random() < left_share else "right"
            other: Side = "right" if first == "left" else "left"
            sides = [first]
            if spec.concept_id in ("pleural_effusion", "consolidation") and rng.random() < 0.15:
                sides = [first, other]
        low, high = spec.size_share
        tier = int(rng.integers(3))
        for side in sides:
            # away from the tiers' borders, so that size words are visible truths
            size = low + (high - low) * (tier + rng.uniform(0.12, 0.88)) / 3
            zone = spec.zones[int(rng.integers(len(spec.zones)))] if spec.zones else None
            plans.append(Plan(spec.concept_id, side, zone, size, rng.uniform(*spec.contrast)))
    return plans


def draw_findings(
    plans: list[Plan], body: Body, layers: Layers, rng: Generator
) -> tuple[FindingTruth, ...]:
    """Draws the plans in an order in which nothing visible is covered, and returns the truths.

    A plan that finds no free place in its zone tries the other zones and then is dropped.
    """
    blocked = np.zeros(layers.heart.shape, dtype=bool)
    truths = []
    for plan in plans:
        spec = SPEC_OF[plan.concept_id]
        zones: list[Zone | None] = [plan.zone, *(z for z in spec.zones if z != plan.zone)]
        drawn = None
        for zone in zones:
            drawn = _DRAW[plan.concept_id](
                body, layers, plan.side, plan.size, plan.contrast, zone, blocked, rng
            )
            if drawn is not None:
                break
        if drawn is None or not drawn.mask.any():
            continue
        if spec.zones or plan.concept_id in ("pleural_effusion", "pneumothorax"):
            blocked |= drawn.mask
        low, high = spec.contrast
        words = spec.size_words
        truths.append(
            FindingTruth(
                concept_id=plan.concept_id,
                side=plan.side,
                zone=drawn.zone,
                size=plan.size,
                size_word=words[size_tier(plan.concept_id, plan.size)] if words else None,
                contrast=plan.contrast,
                is_faint=plan.contrast < low + 0.2 * (high - low),
                variant=drawn.variant,
                box=bounding_box(drawn.mask),
                mask=drawn.mask,
            )
        )
    return tuple(truths)


def bounding_box(mask: NDArray[np.bool_] | Mask) -> tuple[int, int, int, int]:
    """x, y, width, height of the pixels that are set."""
    rows = np.flatnonzero(mask.any(axis=1))
    columns = np.flatnonzero(mask.any(axis=0))
    x, y = int(columns[0]), int(rows[0])
    return x, y, int(columns[-1]) - x + 1, int(rows[-1]) - y + 1
