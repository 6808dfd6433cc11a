"""Means of scores over findings and over fits, and differences of two, each with its interval.

One draw of patients serves all of them, so they are joined resample by resample. Sums and
differences take each end from draws for that end: a perfect score is up to 1, so draws below it may
not pull the upper end of a mean down (Fay, Proschan and Brittain, Biometrics 2015, "melding").
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mlip.transfer.array import Array
from mlip.transfer.measures.interval import (
    Estimate,
    Measured,
    defined_mean,
    estimate,
    not_available,
)


def mean_over(measured: Sequence[Measured], n: int) -> Measured:
    """The mean over findings, which one draw of patients serves.

    A finding so rare that a resample lost it leaves that resample's mean.
    Source:  units of a sum of spreads: Satterthwaite 1946
    """
    if len(measured) == 1:
        return measured[0]._replace(n=n)
    value = float(np.mean([m.value for m in measured]))
    below, above = joined_ends(measured, defined_mean)
    # a perfect score's draws need no widening, and hide none that the others need
    spread = [min(_variance(draws) for draws in m.ends) for m in measured]
    lost = sum(
        s**2 / max(1.0, m.units - 1.0)
        for s, m in zip(spread, measured, strict=True)
        if m.units is not None
    )
    found = Measured(value, below, n, 1.0 + sum(spread) ** 2 / lost if lost else None, above)
    return found._replace(apart=apart_of(measured, lambda each: mean_over(each, n)))


def over_findings(measured: Sequence[Measured | None], reason: str) -> dict[str, Any]:
    """The mean over the findings that have the score; `reason` where none has.

    Returns: Estimate with "classes", over how many of "classes_asked" it is: means over others do
             not compare
    """
    found = [m for m in measured if m is not None]
    counted = {"classes": len(found), "classes_asked": len(measured)}
    if not found:
        return {**not_available(reason), **counted}
    return {**estimate(*mean_over(found, max(m.n for m in found))), **counted}


def apart_of(
    measured: Sequence[Measured], join: Callable[[Sequence[Measured]], Measured | None]
) -> Measured | None:
    """`apart` of what joins these; None where each of them stands for itself."""
    if all(m.apart is None for m in measured):
        return None
    return join([m.apart or m for m in measured])


def joined_ends(
    measured: Sequence[Measured], mean: Callable[[Array], Array]
) -> tuple[Array, Array | None]:
    """resampled and above of a mean of these.  Shapes:  mean [scores, R] -> [R]"""
    below = mean(np.stack([m.resampled for m in measured]))
    if all(m.above is None for m in measured):
        return below, None
    return below, mean(np.stack([m.ends[1] for m in measured]))


def _variance(draws: Array) -> float:
    kept = draws[np.isfinite(draws)]
    return float(kept.var()) if len(kept) else 0.0


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
