"""The careful end of an AUROC near 1. Oracles: exponential scores, and the equation itself."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import norm

from mlip.transfer.measures.auroc_limit import lower_limit, spread_at, with_careful_end
from mlip.transfer.measures.interval import Measured, estimate
from mlip.transfer.measures.means import less, mean_of_fits, mean_over


@pytest.mark.parametrize("value", [0.6, 0.8, 0.95])
def test_the_spread_is_that_of_exponential_scores(value: float) -> None:
    generator = np.random.default_rng(0)
    count = 20
    scale = value / (1.0 - value)  # P(X > Y) = value for exponentials of these means
    carriers = generator.exponential(scale, (20_000, count, 1))
    others = generator.exponential(1.0, (20_000, 1, count))
    drawn = (carriers > others).mean(axis=(1, 2))
    assert drawn.mean() == pytest.approx(value, abs=3e-3)
    assert spread_at(value, count, count) == pytest.approx(drawn.std(), rel=0.03)


@pytest.mark.parametrize(
    ("value", "carriers", "others"), [(0.9, 5, 100), (0.99, 30, 30), (0.6, 8, 9)]
)
def test_the_limit_lies_as_far_below_as_its_own_spread_allows(
    value: float, carriers: int, others: int
) -> None:
    limit = lower_limit(value, carriers, others)
    assert 0.0 < limit < value
    far = norm.ppf(0.975) * spread_at(limit, carriers, others)
    assert value - limit == pytest.approx(far, rel=1e-6)
    assert lower_limit(0.0, carriers, others) == 0.0 and 0.0 <= lower_limit(1e-3, 2, 2) < 1e-3


def draws_of(value: float, spread: float = 0.01) -> np.ndarray:
    return np.clip(np.random.default_rng(0).normal(value, spread, 2000), 0.0, 1.0)


def test_an_end_near_0_is_that_near_1_turned() -> None:
    draws = draws_of(0.96)
    high = estimate(*with_careful_end(Measured(0.96, draws, 110, 10), 10, 100))
    low = estimate(*with_careful_end(Measured(1 - 0.96, 1 - draws, 110, 10), 10, 100))
    plain = estimate(0.96, draws, 110, 10)
    assert high["low"] == pytest.approx(1 - low["high"]) and high["low"] < plain["low"] - 0.05
    assert high["high"] == plain["high"] == pytest.approx(1 - low["low"])
    turned = with_careful_end(Measured(1 - 0.96, 1 - draws, 110, 10), 10, 100)
    assert turned.apart is not None and turned.apart.above is None
    assert turned.ends[1].min() >= 0.0 and turned.ends[1].max() <= 1.0
    wide = with_careful_end(Measured(0.99, draws_of(0.99, 0.002), 110, 10), 10, 100)
    assert 0.0 <= wide.resampled.min() and wide.resampled.max() == 1.0
    # without an error's worth it is the limit, with half of ten halfway to it
    assert high["low"] == pytest.approx(
        plain["low"] - (1 - 0.4 / 10) * (plain["low"] - lower_limit(0.96, 10, 100)), abs=1e-6
    )


def test_a_difference_knows_nothing_of_it() -> None:
    """Two models that err on the same patients are no more apart for it, nor is their mean."""
    plain = Measured(0.96, draws_of(0.96), 110, 10)
    careful = with_careful_end(plain, 10, 100)
    other = with_careful_end(plain._replace(value=0.95), 10, 100)
    for own, others in ((careful, other), (mean_of_fits([careful] * 2), mean_of_fits([other]))):
        apart = less(own, others)
        assert apart is not None and apart.above is None
        np.testing.assert_allclose(apart.resampled, 0.0, atol=1e-15)
    mean = mean_over([careful, plain], 110)
    expected = less(mean_over([plain, plain], 110), plain)
    apart = less(mean, careful)
    assert apart is not None and expected is not None
    np.testing.assert_array_equal(apart.resampled, expected.resampled)
    assert estimate(*mean)["low"] < estimate(*mean_over([plain, plain], 110))["low"]


@pytest.mark.parametrize(
    ("measured", "carriers", "others"),
    [
        (Measured(0.96, draws_of(0.96), 500, 250), 250, 250),  # ten carriers' worth of errors
        (Measured(0.96, draws_of(0.96, 0.3), 110, 10), 10, 100),  # wide already
        (Measured(0.96, np.full(50, np.nan), 110, 10), 10, 100),  # no interval at all
        (Measured(0.96, np.full(50, 0.96), 110, 10), 10, 100),  # nothing to stretch
        (Measured(1.0, draws_of(0.9), 110, above=np.ones(2000)), 10, 100),  # Clopper and Pearson's
    ],
)
def test_what_needs_no_care_is_left(measured: Measured, carriers: int, others: int) -> None:
    assert with_careful_end(measured, carriers, others) is measured
