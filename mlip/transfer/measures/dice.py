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

from mlip.transfer.array import Array
from mlip.transfer.measures.interval import Measured, bounded, measured_mean, weighted_sum
from mlip.transfer.measures.means import mean_of_fits, over_seeds
from mlip.transfer.measures.subgroups import Measure, Measures, enough
from mlip.transfer.truth.mask_file import IGNORED, INSIDE

FORMS = ("published", "positive_only", "pooled")


@dataclass(frozen=True)
class Counts:
    """Pixels of each image: in both masks, in the prediction, in the truth; [n] each."""

    both: Array
    predicted: Array
    truth: Array

    def of(self, inside: Array) -> Counts:
        """Those of some of the images.  Shapes:  inside [n] bool"""
        return Counts(self.both[inside], self.predicted[inside], self.truth[inside])


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
    each = [_measured(counts, weights) for counts in by_seed]
    reason = "no test image has anything to find"
    return {key: over_seeds([found.get(key) for found in each], reason) for key in FORMS}


def dice_measures(by_seed: Sequence[Counts], weights: Array, patients: Array) -> Measure:
    """What some of the test images score over the seeds' fits, for subgroup_scores.

    Shapes:  weights [R, images], patients [images]
    """
    has_truth = by_seed[0].truth > 0

    def measure(inside: Array) -> Measures:
        if not enough(patients[inside & has_truth]):
            return Measures()
        each = [_measured(counts.of(inside), weights[:, inside]) for counts in by_seed]
        joined = {key: mean_of_fits([found.get(key) for found in each]) for key in FORMS}
        return Measures(whole={key: found for key, found in joined.items() if found is not None})

    return measure


def _measured(counts: Counts, weights: Array) -> dict[str, Measured]:
    """FORMS of one fit; empty where no image has anything to find."""
    positive = counts.truth > 0
    if not positive.any():
        return {}
    each, n = dice_per_image(counts), len(counts.truth)
    pooled = pooled_dice(counts, np.ones((1, n)))
    return {
        "published": measured_mean(each, weights),
        "positive_only": measured_mean(each[positive], weights[:, positive]),
        "pooled": bounded(float(pooled[0]), pooled_dice(counts, weights), n, weights[:, positive]),
    }
