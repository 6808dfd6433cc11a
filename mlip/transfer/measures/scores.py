"""Threshold-free and calibration scores of a classifier under patient resampling.

Values come from scikit-learn; the weighted forms serve many bootstrap resamples with one sort and
are tested to give the library's value at weight one.
"""

from __future__ import annotations

import numpy as np

from mlip.transfer.array import Array
from mlip.transfer.measures.interval import AT_ONCE

CALIBRATED_DRAWS = 100
CURVE_POINTS = 120  # a chart 300 px wide shows no more
CALIBRATION_BINS = 15  # Guo et al. 2017, "On calibration of modern neural networks"


def average_precision(scores: Array, labels: Array) -> float | None:
    """Area under the precision-recall curve (steps); None where a class is absent."""
    if labels.all() or not labels.any():
        return None
    from sklearn.metrics import average_precision_score  # as in auroc.auroc

    return float(average_precision_score(labels, scores))


def weighted_average_precision(scores: Array, labels: Array, weights: Array) -> Array:
    """Average precision under each row of weights [R, N] -> [R]; NaN without both classes."""
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    ends = np.flatnonzero(np.r_[ranked[1:] != ranked[:-1], True])
    label = labels[order].astype(bool)
    result = np.full(len(weights), np.nan)
    whole = np.result_type(weights.dtype, np.int32)  # as in auroc.weighted_auroc
    for first in range(0, len(weights), AT_ONCE):
        chosen = weights[first : first + AT_ONCE][:, order]
        hits = np.cumsum(chosen * label, axis=1, dtype=whole)[:, ends]
        shown = np.cumsum(chosen, axis=1, dtype=whole)[:, ends]
        gained = np.diff(hits, axis=1, prepend=0)
        with np.errstate(invalid="ignore", divide="ignore"):
            precision = np.where(shown > 0, hits / shown, 0.0)
            value = (gained * precision).sum(axis=1) / hits[:, -1]
        # a resample without negatives has no precision-recall curve worth the name
        value[(hits[:, -1] == 0) | (hits[:, -1] == shown[:, -1])] = np.nan
        result[first : first + AT_ONCE] = value
    return result


def calibration_error(confidence: Array, right: Array) -> tuple[float, float]:
    """Expected calibration error, and what chance alone would show of it.

    The error is the mean |confidence - share right| over bins, by their mass: never below 0, so
    noise adds to it, the more the fewer rows. The second number is its mean where each row is right
    with the probability that it claims (100 draws), so a model is miscalibrated as far as the first
    is above the second. There is no interval: a bootstrap resample has the noise twice.

    Shapes:  confidence, right [N] in [0, 1]
    """
    edges = np.linspace(0.0, 1.0, CALIBRATION_BINS + 1)
    place = np.clip(np.searchsorted(edges, confidence, side="right") - 1, 0, CALIBRATION_BINS - 1)

    def error(right: Array) -> float:
        gaps = np.bincount(place, confidence - right, minlength=CALIBRATION_BINS)
        return float(np.abs(gaps).sum() / len(confidence))

    generator = np.random.default_rng(0)
    drawn = [generator.random(len(confidence)) < confidence for _ in range(CALIBRATED_DRAWS)]
    return error(right.astype(np.float64)), float(np.mean([error(labels) for labels in drawn]))


def confusion(predicted: Array, truth: Array, classes: int) -> list[list[int]]:
    """Counts by true class (rows) and predicted class (columns)."""
    table = np.zeros((classes, classes), dtype=np.int64)
    np.add.at(table, (truth, predicted), 1)
    return table.tolist()


def curve(scores: Array, labels: Array) -> dict[str, list[float]]:
    """Points of the ROC and precision-recall curves, thinned to CURVE_POINTS.

    Without the library's last point (recall 0, precision 1), which no threshold reaches.
    """
    from sklearn.metrics import precision_recall_curve, roc_curve

    false, true, _ = roc_curve(labels, scores)
    precision, recall, _ = precision_recall_curve(labels, scores)

    def thin(values: Array) -> list[float]:
        at = np.unique(
            np.linspace(0, len(values) - 1, min(CURVE_POINTS, len(values))).round().astype(int)
        )
        return [round(float(v), 4) for v in values[at]]

    return {
        "false_positive_rate": thin(false),
        "true_positive_rate": thin(true),
        "recall": thin(recall[-2::-1]),
        "precision": thin(precision[-2::-1]),
    }
