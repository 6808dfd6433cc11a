"""Dice of masks in the forms that are published and the ones that say more.

published      per image, an empty truth counting 1 if nothing is predicted and 0 otherwise, then
               the mean: where most images are empty it mostly says how often the model is silent,
               and where all are it has no value
positive_only  the mean over images with something to find
pooled         all pixels of all images as one image
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlip.transfer.interval import Array, weighted_mean, weighted_sum
from mlip.transfer.mask_file import IGNORED, INSIDE
from mlip.transfer.scores import Measured, over_seeds


@dataclass(frozen=True)
class Counts:
    """Pixels of each image: in both masks, in the prediction, in the truth; [n] each."""

    both: Array
    predicted: Array
    truth: Array


def count(predicted: Array, masks: Array) -> Counts:
    """Shapes:  predicted [n, H, W] bool; masks [n, H, W] of INSIDE, IGNORED and 0."""
    seen = masks != IGNORED
    truth = masks == INSIDE
    called = predicted & seen
    axes = (1, 2)
    return Counts(
        both=(called & truth).sum(axis=axes),
        predicted=called.sum(axis=axes),
        truth=truth.sum(axis=axes),
    )


def join(parts: Sequence[Counts]) -> Counts:
    return Counts(
        *(
            np.concatenate([getattr(p, key) for p in parts])
            for key in ("both", "predicted", "truth")
        )
    )


def dice_per_image(counts: Counts) -> Array:
    """Dice of each image [n], with the published credit for an empty truth."""
    total = counts.predicted + counts.truth
    with np.errstate(invalid="ignore", divide="ignore"):
        value = 2.0 * counts.both / total
    return np.where(counts.truth == 0, (counts.predicted == 0).astype(np.float64), value)


def pooled_dice(counts: Counts, weights: Array) -> Array:
    """Dice over the pixels of all images under each row of weights [R, n] -> [R]."""
    both = weighted_sum(counts.both, weights)
    total = weighted_sum(counts.predicted + counts.truth, weights)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(total > 0, 2.0 * both / total, np.nan)


def dice_scores(by_seed: Sequence[Counts], weights: Array) -> dict[str, Any]:
    """The three forms, over seeds and with intervals over patients; None where nothing is there."""
    found: dict[str, list[Measured | None]] = {"published": [], "positive_only": [], "pooled": []}
    ones = np.ones((1, weights.shape[1]))
    for counts in by_seed:
        each, n = dice_per_image(counts), len(counts.truth)
        positive = counts.truth > 0
        if not positive.any():
            for values in found.values():
                values.append(None)
            continue
        found["published"].append((float(each.mean()), weighted_mean(each, weights), n))
        found["positive_only"].append(
            (
                float(each[positive].mean()),
                weighted_mean(each[positive], weights[:, positive]),
                int(positive.sum()),
            )
        )
        pooled = float(pooled_dice(counts, ones)[0])
        found["pooled"].append((pooled, pooled_dice(counts, weights), n))
    reason = "no test image has anything to find"
    return {key: over_seeds(values, reason) for key, values in found.items()}
