"""The normal chest of a phantom, drawn tissue by tissue from its body.

What does not live here: how bodies vary (body.py), findings (findings.py) and the
film (study.py). Source: ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.random import Generator

from mlip.dataloading.phantom.body import SIGNS, Body
from mlip.dataloading.phantom.canvas import CIRCLE, Canvas, Density, Mask, Points, curve, ribbon

LUNG_DEPTH = 0.36  # density that aerated lung takes away: contrast 1 puts all of it back


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
    torso = canvas.soft(canvas.fill(_torso(body)), 0.012)
    layers.add(torso, 0.52)
    layers.add(canvas.soft(canvas.fill(_belly(body)), 0.05) * torso, 0.14)
    layers.add(central, 0.10)
    if body.has_breasts:
        _add_breasts(layers, body, rng)
    layers.add(air, -LUNG_DEPTH)
    layers.add(air * texture, 0.04 * LUNG_DEPTH)
    _add_spine(layers, body)
    _add_bones(layers, body, rng)
    layers.vessels = _vessels(layers, body, rng)
    if body.has_leads:
        _add_leads(layers, rng)
    if body.has_sternotomy:
        _add_sternotomy(layers, rng)
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
        layers.canvas.fill(centre + size * CIRCLE * (1.05, 1.0), into=shade)
    layers.add(layers.canvas.soft(shade, 0.015), rng.uniform(0.03, 0.08))


def _mediastinum(canvas: Canvas, body: Body, rng: Generator) -> Mask:
    """Great vessels and aorta: what hides the lung beside the spine, the heart left out."""
    half = rng.uniform(0.05, 0.062)
    bend = float(body.midline(0.42))
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
    return canvas.fill(np.array([0.55, 0.305]) + body.knob_radius * CIRCLE, 235, into=image)


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
        head = np.array([0.5 + s * 0.455, 0.215]) + 0.055 * CIRCLE
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
        canvas.fill(root + CIRCLE * (0.028, 0.05), 120, image)
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


def _add_leads(layers: Layers, rng: Generator) -> None:
    """Monitoring wires and their electrodes: thin lines and dense discs that are no finding."""
    canvas, wires = layers.canvas, layers.canvas.blank()
    exit_x = rng.uniform(0.25, 0.75)
    spots = [(0.22, 0.22), (0.78, 0.22), (0.72, 0.66)]
    for x, y in spots[: int(rng.integers(2, 4))]:
        spot = np.array([x, y]) + rng.uniform(-0.05, 0.05, 2)
        bulge = np.array([rng.uniform(-0.12, 0.12), rng.uniform(0.05, 0.15)])
        path = curve([spot, 0.5 * (spot + [exit_x, 0.8]) + bulge, (exit_x, 1.1)])
        canvas.line(path, 0.0075, 200, wires)
        canvas.fill(spot + rng.uniform(0.012, 0.022) * CIRCLE, 255, wires)
    layers.add(wires, rng.uniform(0.16, 0.36))


def _add_sternotomy(layers: Layers, rng: Generator) -> None:
    heights = np.arange(0.27, 0.62, 0.062)
    centres = np.stack([0.5 + rng.uniform(-0.006, 0.006, heights.size), heights], 1)
    loops = centres[:, None] + CIRCLE * (0.017, 0.010)
    layers.add(layers.canvas.line(loops, 0.0075, closed=True), rng.uniform(0.22, 0.32))
