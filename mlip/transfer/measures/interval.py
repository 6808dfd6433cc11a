"""Scores with their uncertainty: patient-level bootstrap intervals.

Every score of an evaluation is an Estimate: value, 95 % interval, and the n it rests on. A score
that cannot be computed is value None with a reason, never 0.5.

Plain percentiles of a bootstrap are too narrow where few patients carry a finding, and have no
width where all answers are right. So the percentiles lie farther out the fewer patients a score
rests on, as far as Student's t and n / (n - 1) ask for (Hesterberg, The American Statistician 2015,
"expanded percentile"), and a perfect score gets the interval of Clopper and Pearson (1934).
What does not live here: means of several scores, and differences (means.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple, TypedDict

import numpy as np
from scipy.special import ndtr, stdtrit

from mlip.transfer.array import Array

CONFIDENCE = 0.95
AT_ONCE = 64  # resamples: what is computed of a million rows stays in half a GB


# two of 100,000 patients agree in so many draws once in a hundred evaluations
_KEYS = np.random.default_rng(0).integers(1, 1 << 63, size=28, dtype=np.uint64)


class Measured(NamedTuple):
    """A score before its interval is taken: differences and means are made of these.

    resampled  [R], NaN = undefined there
    n          rows that it rests on
    units      patients that its spread rests on (of AUROC those of the rarer kind); None = its
               resamples need no widening
    above      [R], draws for the upper end of the interval where resampled is for the lower alone;
               None = resampled is for both
    apart      what stands for it in a difference, where draws for an end are stretched: those of
               two scores would no longer err alike; None = this itself
    """

    value: float
    resampled: Array
    n: int
    units: float | None = None
    above: Array | None = None
    apart: Measured | None = None

    @property
    def ends(self) -> tuple[Array, Array]:
        """Draws for the lower and for the upper end."""
        return self.resampled, self.resampled if self.above is None else self.above


class Estimate(TypedDict):
    """value in [low, high] at 95 %; all three None where the score does not exist."""

    value: float | None
    low: float | None
    high: float | None
    n: int
    reason: str | None


def not_available(reason: str, n: int = 0) -> Estimate:
    return {"value": None, "low": None, "high": None, "n": n, "reason": reason}


def estimate(
    value: float,
    resampled: Array,
    n: int,
    units: float | None = None,
    above: Array | None = None,
    apart: Measured | None = None,
) -> Estimate:
    """The interval of a Measured: percentiles of its resamples, widened for few units (`apart` is
    for differences, and not asked).

    None of one patient, whose answer says nothing of how another's would differ.
    """
    if not np.isfinite(value):
        return not_available("undefined", n)
    ends = [draws[np.isfinite(draws)] for draws in Measured(value, resampled, n, units, above).ends]
    low, high = (None, None)
    # an interval from a handful of defined resamples would look surer than it is
    if _are_enough(ends[0], resampled) and (units is None or units > 1.0):
        tail = _tail(units)
        low = min(value, float(np.quantile(ends[0], tail)))
        high = max(value, float(np.quantile(ends[1], 1.0 - tail)))
    return {"value": float(value), "low": low, "high": high, "n": n, "reason": None}


def _are_enough(kept: Array, resampled: Array) -> bool:
    return len(kept) > 0 and 2 * len(kept) >= len(resampled)


@lru_cache(maxsize=4096)
def _tail(units: float | None) -> float:
    """The share of resamples beyond either end.  Source:  Hesterberg 2015, section 4.6"""
    tail = (1.0 - CONFIDENCE) / 2.0
    if units is None:
        return tail
    return float(ndtr(np.sqrt(units / (units - 1.0)) * stdtrit(units - 1.0, tail)))


def patients_in(weights: Array) -> int:
    """How many patients the rows are of: rows of one weigh the same in every resample.

    Shapes:  weights [R, rows] of patient_resamples, or some of its columns
    """
    return len(np.unique(_codes(weights)))


def marks_of_patients(weights: Array) -> Array:
    """What tells patients apart of weights [R, rows]: its columns are copied in no time."""
    return weights[: len(_KEYS)]


def _codes(weights: Array) -> Array:
    """One number a row, equal for rows of one patient."""
    few = marks_of_patients(weights).astype(np.uint64)
    return np.asarray(_KEYS[: len(few)] @ few)  # wraps around


def bounded(value: float, resampled: Array, n: int, weights: Array) -> Measured:
    """A score in [0, 1] that rests on the rows of these columns of weights.

    Where every resample is perfect too (or all wrong) they say nothing of the next patient: draws
    of U ** (1 / patients) stand for them at the end that is open, whose percentiles are Clopper and
    Pearson's limits; the other end is the bound itself.
    Shapes:  weights [R, rows], or its first rows as marks_of_patients has them
    """
    codes = np.unique(_codes(weights))
    units = len(codes)
    kept = resampled[np.isfinite(resampled)]
    # the COCO tool's precision of one box is 1 but for the last digit
    at = [bound for bound in (0.0, 1.0) if np.allclose([value, *kept], bound, rtol=0, atol=1e-9)]
    if not at or not _are_enough(kept, resampled):
        return Measured(value, resampled, n, units)
    # of other patients other draws: of two groups without an error one may err first
    draws = np.random.default_rng(int(codes.sum())).random(len(resampled)) ** (1.0 / units)
    bound = np.full(len(resampled), value)
    below, above = (draws, bound) if at == [1.0] else (bound, 1.0 - draws)
    return Measured(value, below, n, above=above)


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


def defined_mean(resampled: Array) -> Array:
    """Mean over the first axis of the values that exist, NaN where none does.

    A class so rare that a resample lost it leaves that resample's mean over classes.

    Shapes:  resampled [classes, R] -> [R]
    """
    defined = np.isfinite(resampled)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(defined, resampled, 0.0).sum(axis=0) / defined.sum(axis=0)


def weighted_sum(values: Array, weights: Array) -> Array:
    """Sum of values [N, ...] under each row of weights [R, N] -> [R, ...]; integers are not copied
    whole."""
    wide = values.astype(np.float64)
    sums = [weights[i : i + AT_ONCE] @ wide for i in range(0, len(weights), AT_ONCE)]
    return np.concatenate([*sums, np.zeros((0, *wide.shape[1:]))])


def weighted_mean(values: Array, weights: Array) -> Array:
    """Mean of values [N] under each row of weights [R, N] -> [R]; NaN where nothing weighs."""
    total = weights.sum(axis=1).astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(total > 0, weighted_sum(values, weights) / total, np.nan)


def measured_mean(values: Array, weights: Array) -> Measured:
    """Mean of marks with its resamples, in [0, 1] where they are.  Shapes:  [n], [R, n]"""
    return bounded(float(np.mean(values)), weighted_mean(values, weights), len(values), weights)


def mean_estimate(values: Array, weights: Array) -> Estimate:
    if len(values) == 0:
        return not_available("no rows")
    return estimate(*measured_mean(values, weights))
