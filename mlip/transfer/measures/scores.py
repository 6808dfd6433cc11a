"""Threshold-free and calibration scores of a classifier under patient resampling.

Values come from scikit-learn; the weighted forms serve many bootstrap resamples with one sort and
are tested to give the library's value at weight one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mlip.transfer.array import Array
from mlip.transfer.measures.interval import (
    AT_ONCE,
    Estimate,
    Measured,
    apart_of,
    estimate,
    joined_ends,
    not_available,
)

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


def less(own: Measured | None, others: Measured | None) -> Measured | None:
    """The first minus the second, resample by resample: paired where both are of one draw.

    The lower end is of the first's lower and the second's upper end.
    """
    if own is None or others is None:
        return None
    own, others = own.apart or own, others.apart or others
    below, above = own.resampled - others.ends[1], None
    if own.above is not None or others.above is not None:
        above = own.ends[1] - others.resampled
    return Measured(own.value - others.value, below, own.n, _fewest([own, others]), above)


def mean_of_fits(measured: Sequence[Measured | None]) -> Measured | None:
    """The mean over the fits that have the score, None where none has.

    One resample of patients serves all fits. A fit without the score does not count as a zero.
    """
    found = [m for m in measured if m is not None and np.isfinite(m.value)]
    if not found:
        return None
    value = float(np.mean([m.value for m in found]))
    below, above = joined_ends(found, lambda each: np.asarray(each.mean(axis=0)))
    joined = Measured(value, below, found[0].n, _fewest(found), above)
    return joined._replace(apart=apart_of(found, mean_of_fits))


def _fewest(measured: Sequence[Measured]) -> float | None:
    return min((m.units for m in measured if m.units is not None), default=None)


def over_seeds(measured: Sequence[Measured | None], reason: str = "undefined") -> dict[str, Any]:
    """The mean over seeds with an interval over patients, and how much seeds differ.

    One resample of patients serves all seeds, so the interval says what another draw of test
    patients would do to the mean; "seed_sd" says what another seed does.
    Returns: Estimate with "seeds" (each value or None) and "seed_sd" (None for one seed)
    """
    found = mean_of_fits(measured)
    each = [None if m is None or not np.isfinite(m.value) else float(m.value) for m in measured]
    mean: Estimate = not_available(reason) if found is None else estimate(*found)
    values = [v for v in each if v is not None]
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {**mean, "seeds": each, "seed_sd": deviation}


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
