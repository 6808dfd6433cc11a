"""Scores with their uncertainty: AUROC, means and their patient-level bootstrap intervals.

Every score of an evaluation is an Estimate: value, 95 % interval, and the n it rests on. A score
that cannot be computed is value None with a reason, never 0.5.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

Array = NDArray[Any]
CONFIDENCE = 0.95
AT_ONCE = 64  # resamples: what is computed of a million rows stays in half a GB


class Estimate(TypedDict):
    """value in [low, high] at 95 %; all three None where the score does not exist."""

    value: float | None
    low: float | None
    high: float | None
    n: int
    reason: str | None


def not_available(reason: str, n: int = 0) -> Estimate:
    return {"value": None, "low": None, "high": None, "n": n, "reason": reason}


def estimate(value: float, resampled: Array, n: int) -> Estimate:
    """A value with the percentile interval of its bootstrap resamples (NaN = undefined there)."""
    if not np.isfinite(value):
        return not_available("undefined", n)
    kept = resampled[np.isfinite(resampled)]
    low, high = (None, None)
    # an interval from a handful of defined resamples would look surer than it is
    if len(kept) >= max(1, len(resampled) // 2):
        tail = (1.0 - CONFIDENCE) / 2.0
        low, high = (float(q) for q in np.quantile(kept, [tail, 1.0 - tail]))
    return {"value": float(value), "low": low, "high": high, "n": n, "reason": None}


def patient_resamples(patient_ids: Sequence[Any] | Array, resamples: int, seed: int) -> Array:
    """How often each row counts in each bootstrap resample of patients, [resamples, rows].

    Patients are drawn with replacement, all rows of a patient together: rows of one patient are
    not independent, so drawing rows would make intervals too narrow.
    """
    _, patient = np.unique(np.asarray(patient_ids, dtype=str), return_inverse=True)
    count = int(patient.max()) + 1 if len(patient) else 0
    if count < 2:
        # one patient drawn again and again would look like certainty: no weight, no interval
        return np.zeros((resamples, len(patient)), dtype=np.int32)
    generator = np.random.default_rng(seed)
    chance = np.full(count, 1.0 / count)
    weights = np.empty((resamples, len(patient)), dtype=np.int32)
    # some at a time, of the same stream: the draws of a million patients would be 4 GB beside them
    for first in range(0, resamples, AT_ONCE):
        part = weights[first : first + AT_ONCE]
        part[:] = generator.multinomial(count, chance, size=len(part))[:, patient]
    return weights


def require_finite_scores(scores: Array) -> None:
    """Raise ValueError where a score is NaN or infinite: it has no place among the others."""
    if not np.isfinite(scores).all():
        raise ValueError(
            f"{int((~np.isfinite(scores)).sum())} of {len(scores)} scores are NaN or infinite: "
            "the model's features are broken; check the checkpoint"
        )


def auroc(scores: Array, labels: Array) -> float | None:
    """Area under the ROC curve through scikit-learn; None where a class is absent.

    Raises:  ValueError on a score that is not finite.
    """
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
    for first in range(0, len(weights), AT_ONCE):
        part = weights[first : first + AT_ONCE]
        own = part[:, few].astype(np.float64)
        up_to = np.zeros((len(part), len(many) + 1))
        np.cumsum(part[:, many], axis=1, out=up_to[:, 1:])
        # sums of whole and half numbers: exact, whichever class is looked up
        beaten = 0.5 * (up_to[:, low] + up_to[:, high])
        if not has_few_positives:
            beaten = up_to[:, -1:] - beaten
        wins = (own * beaten).sum(axis=1)
        pairs = own.sum(axis=1) * up_to[:, -1]
        with np.errstate(invalid="ignore", divide="ignore"):
            result[first : first + AT_ONCE] = np.where(pairs > 0, wins / pairs, np.nan)
    return result


def defined_mean(resampled: Array) -> Array:
    """Mean over the first axis of the values that exist, NaN where none does.

    A class so rare that a resample lost it leaves that resample's mean over classes.

    Shapes:  resampled [classes, R] -> [R]
    """
    defined = np.isfinite(resampled)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(defined, resampled, 0.0).sum(axis=0) / defined.sum(axis=0)


def weighted_sum(values: Array, weights: Array) -> Array:
    """Sum of values [N] under each row of weights [R, N] -> [R]; integers are not copied whole."""
    wide = values.astype(np.float64)
    sums = [weights[i : i + AT_ONCE] @ wide for i in range(0, len(weights), AT_ONCE)]
    return np.concatenate([*sums, np.zeros(0)])


def weighted_mean(values: Array, weights: Array) -> Array:
    """Mean of values [N] under each row of weights [R, N] -> [R]; NaN where nothing weighs."""
    total = weights.sum(axis=1).astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(total > 0, weighted_sum(values, weights) / total, np.nan)


def auroc_estimate(scores: Array, labels: Array, weights: Array) -> Estimate:
    """AUROC with its interval, or "n/a" with the reason."""
    value = auroc(scores, labels)
    if value is None:
        present = int(labels.sum())
        return not_available(f"{present} of {len(labels)} rows carry the finding", len(labels))
    return estimate(value, weighted_auroc(scores, labels, weights), len(labels))


def mean_estimate(values: Array, weights: Array) -> Estimate:
    if len(values) == 0:
        return not_available("no rows")
    return estimate(float(np.mean(values)), weighted_mean(values, weights), len(values))
