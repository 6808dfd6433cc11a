"""How low an AUROC near 1 may truly be where few carry the finding.

Resamples of few patients that are nearly all ranked right hold hardly an error, so their
percentiles lie too high. A limit that asks how far a true value lies from its own spread does not.
"""

from __future__ import annotations

import numpy as np
from scipy.special import ndtri

from mlip.transfer.measures.interval import CONFIDENCE, Measured, estimate

# of so many wrongly ranked carriers' worth the resamples can tell their own spread
_ENOUGH_ERRORS = 10.0


def spread_at(value: float, carriers: int, others: int) -> float:
    """Standard deviation of an AUROC whose true value this is.

    Source:  Hanley and McNeil 1982 for exponential scores, with both kinds' numbers in the place of
             either's: Newcombe, Statistics in Medicine 2006, part 2, method 5
    """
    many = 0.5 * (carriers + others) - 1.0
    shared = (1.0 - value) / (2.0 - value) + value / (1.0 + value)
    return float(np.sqrt(value * (1.0 - value) * (1.0 + many * shared) / (carriers * others)))


def lower_limit(value: float, carriers: int, others: int) -> float:
    """The true value above which 2.5 % of samples reach `value`.  Source:  as spread_at"""
    from scipy.optimize import brentq  # as in auroc.auroc

    far = float(-ndtri((1.0 - CONFIDENCE) / 2.0))

    def beyond(true: float) -> float:
        return value - true - far * spread_at(true, carriers, others)

    least = 1e-9
    if value <= least or beyond(least) <= 0.0:
        return 0.0
    return float(brentq(beyond, least, value))


def with_careful_end(measured: Measured, carriers: int, others: int) -> Measured:
    """The same AUROC, its draws for the end away from 1 (or from 0) stretched towards that limit.

    In full where no carrier's worth of error stands behind the score, not at all from ten on. In a
    difference it is as it was: there both ends are of the spread of two scores.
    carriers, others  patients
    Source:  ours
    """
    value = measured.value
    is_high = value >= 0.5
    errors = min(carriers, others) * (1.0 - value if is_high else value)
    found = estimate(*measured)
    end = found["low" if is_high else "high"]
    if measured.above is not None or end is None or end == value or errors >= _ENOUGH_ERRORS:
        return measured
    near = value if is_high else 1.0 - value
    limit = lower_limit(near, carriers, others)
    gap, wanted = abs(value - end), near - limit
    if wanted <= gap:
        return measured
    factor = 1.0 + (1.0 - errors / _ENOUGH_ERRORS) * (wanted / gap - 1.0)
    stretched = np.clip(value + (measured.resampled - value) * factor, 0.0, 1.0)
    if is_high:
        return measured._replace(resampled=stretched, above=measured.resampled, apart=measured)
    return measured._replace(above=stretched, apart=measured)
