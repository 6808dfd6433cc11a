"""The area under the ROC curve, its resamples and its interval."""

from __future__ import annotations

import numpy as np

from mlip.transfer.array import Array
from mlip.transfer.measures.auroc_limit import with_careful_end
from mlip.transfer.measures.interval import (
    AT_ONCE,
    Estimate,
    Measured,
    bounded,
    estimate,
    marks_of_patients,
    not_available,
    patients_in,
    require_finite_scores,
)


def auroc(scores: Array, labels: Array) -> float | None:
    """Area under the ROC curve through scikit-learn; None where a class is absent.

    Raises:  ValueError on a score that is not finite.
    """
    from sklearn.metrics import roc_auc_score  # a second that opening a model does not wait for

    require_finite_scores(scores)
    if labels.all() or not labels.any():
        return None
    return float(roc_auc_score(labels, scores))


def weighted_auroc(scores: Array, labels: Array, weights: Array) -> Array:
    """AUROC under each row of integer weights [R, N] -> [R]; NaN where a class has no weight.

    The Mann-Whitney form with half credit for ties: one sort serves all resamples, where a call
    per resample of the library would cost seconds a finding. The rows of the larger class are added
    up once in the order of their scores; each row of the smaller looks its place up, which for rare
    findings is a third of the time of adding up both.
    """
    label = labels.astype(bool)
    has_few_positives = 2 * int(label.sum()) <= len(label)
    few, many = (
        np.flatnonzero(label == side) for side in (has_few_positives, not has_few_positives)
    )
    many = many[np.argsort(scores[many], kind="stable")]
    low, high = (np.searchsorted(scores[many], scores[few], side) for side in ("left", "right"))
    result = np.full(len(weights), np.nan)
    # of 32 bits: a row's sum is the number of rows drawn, and half the memory is a seventh of the
    # time
    whole = np.result_type(weights.dtype, np.int32)
    for first in range(0, len(weights), AT_ONCE):
        part = weights[first : first + AT_ONCE]
        own = part[:, few].astype(np.float64)
        up_to = np.zeros((len(part), len(many) + 1), dtype=whole)
        np.cumsum(part[:, many], axis=1, dtype=whole, out=up_to[:, 1:])
        # sums of whole and half numbers: exact, whichever class is looked up
        beaten = 0.5 * (up_to[:, low] + up_to[:, high])
        if not has_few_positives:
            beaten = up_to[:, -1:] - beaten
        wins = (own * beaten).sum(axis=1)
        pairs = own.sum(axis=1) * up_to[:, -1]
        with np.errstate(invalid="ignore", divide="ignore"):
            result[first : first + AT_ONCE] = np.where(pairs > 0, wins / pairs, np.nan)
    return result


def measured_auroc(scores: Array, labels: Array, weights: Array) -> Measured | None:
    """AUROC with its resamples; None where a class is absent.

    Shapes:  scores, labels [n]; weights [R, n]
    """
    value = auroc(scores, labels)
    if value is None:
        return None
    label = labels.astype(bool)
    marks = marks_of_patients(weights)
    kinds = [marks[:, label], marks[:, ~label]]
    carriers, others = map(patients_in, kinds)
    fewer = kinds[int(others < carriers)]
    found = bounded(value, weighted_auroc(scores, labels, weights), len(labels), fewer)
    return with_careful_end(found, carriers, others)


def auroc_estimate(scores: Array, labels: Array, weights: Array) -> Estimate:
    """AUROC with its interval, or "n/a" with the reason."""
    return auroc_of(measured_auroc(scores, labels, weights), labels)


def auroc_of(measured: Measured | None, labels: Array) -> Estimate:
    """The Estimate of measured_auroc, or "n/a" with the reason."""
    if measured is None:
        present = int(labels.sum())
        return not_available(f"{present} of {len(labels)} rows carry the finding", len(labels))
    return estimate(*measured)
