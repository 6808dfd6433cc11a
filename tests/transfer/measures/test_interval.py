"""Scores and their intervals, against scikit-learn and closed forms."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from scipy.stats import beta, norm, t

from mlip.transfer.alignment import retrieval
from mlip.transfer.alignment.retrieval import rank_summary
from mlip.transfer.measures import auroc, interval
from mlip.transfer.measures.means import less, mean_over


def test_patients_are_drawn_whole() -> None:
    patients = ["a", "b", "a", "c", "b", "a"]
    weights = interval.patient_resamples(patients, 50, seed=3)
    np.testing.assert_array_equal(weights[:, 0], weights[:, 2])
    np.testing.assert_array_equal(weights[:, 0], weights[:, 5])
    np.testing.assert_array_equal(weights[:, 1], weights[:, 4])
    # three patients are drawn each time
    np.testing.assert_array_equal(weights[:, [0, 1, 3]].sum(axis=1), 3)


def test_rows_of_one_patient_do_not_make_an_interval_narrower() -> None:
    generator = np.random.default_rng(1)
    values = (generator.random(40) < 0.5).astype(float)
    alone = interval.mean_estimate(values, interval.patient_resamples(range(40), 2000, seed=0))
    repeated = interval.mean_estimate(
        np.repeat(values, 25), interval.patient_resamples(np.repeat(range(40), 25), 2000, seed=0)
    )
    assert repeated["n"] == 1000 and alone["n"] == 40
    assert repeated["low"] == pytest.approx(alone["low"])
    assert repeated["high"] == pytest.approx(alone["high"])


def test_interval_of_a_mean_has_the_normal_theory_width() -> None:
    generator = np.random.default_rng(2)
    values = generator.standard_normal(400)
    found = interval.mean_estimate(values, interval.patient_resamples(range(400), 4000, seed=0))
    width = 2 * 1.96 * values.std() / np.sqrt(400)
    assert found["high"] - found["low"] == pytest.approx(width, rel=0.1)


def test_no_interval_from_a_handful_of_defined_resamples() -> None:
    found = interval.estimate(0.7, np.array([0.7] + [np.nan] * 9), 12)
    assert found["value"] == 0.7 and found["low"] is None and found["high"] is None
    half = interval.estimate(0.7, np.array([0.7] * 5 + [np.nan] * 5), 12)
    assert half["low"] == half["high"] == 0.7
    assert interval.estimate(0.7, np.zeros(0), 12)["low"] is None


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_value_that_is_no_number_is_not_available(value: float) -> None:
    # hits over those of swapped images, of which there may be none
    found = interval.estimate(value, np.array([0.7, 0.8]), 12)
    assert found == {"value": None, "low": None, "high": None, "n": 12, "reason": "undefined"}


def test_no_copy_of_all_resamples_is_made_beside_them(monkeypatch: pytest.MonkeyPatch) -> None:
    patients = np.arange(4_000) // 2
    whole = interval.patient_resamples(patients, 200, seed=1)
    values = np.random.default_rng(2).random(len(patients))
    mean = interval.weighted_mean(values, whole)
    ranks = np.random.default_rng(3).integers(1, 99, len(patients))
    summary = rank_summary(ranks, whole)
    monkeypatch.setattr(interval, "AT_ONCE", 5)
    monkeypatch.setattr(retrieval, "AT_ONCE", 5)
    tracemalloc.start()
    made = interval.patient_resamples(patients, 200, seed=1)
    assert (made == whole).all()
    tracemalloc.reset_peak()
    np.testing.assert_allclose(interval.weighted_mean(values, made), mean, rtol=1e-15)
    assert rank_summary(ranks, made) == summary
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1.4 * made.nbytes  # 3.0 where they are copied as numbers of 64 bits


@pytest.mark.parametrize("units", [2.0, 5.0, 20.0, 20.5, 400.0])
def test_few_units_put_the_percentiles_where_student_s_t_asks(units: float) -> None:
    resampled = np.linspace(-1.0, 1.0, 100_001)
    found = interval.estimate(0.0, resampled, 9, units)
    tail = norm.cdf(-np.sqrt(units / (units - 1)) * t.ppf(0.975, units - 1))
    assert found["low"] == pytest.approx(-1 + 2 * tail, abs=1e-4)
    assert found["high"] == pytest.approx(1 - 2 * tail, abs=1e-4)
    plain = interval.estimate(0.0, resampled, 9)
    assert plain["low"] == pytest.approx(-0.95) and found["low"] < plain["low"]
    # one patient's answer says nothing of how the next one's would differ
    alone = interval.estimate(0.0, resampled, 9, 1.0)
    assert alone == {**plain, "low": None, "high": None}


def test_an_interval_holds_its_value() -> None:
    assert interval.estimate(0.9, np.linspace(0.2, 0.6, 99), 9)["high"] == 0.9
    assert interval.estimate(0.1, np.linspace(0.2, 0.6, 99), 9)["low"] == 0.1


def test_patients_are_counted_by_their_weights() -> None:
    patients = np.random.default_rng(0).integers(0, 3000, 9000)
    weights = interval.patient_resamples(patients, 40, seed=1)
    chosen = np.random.default_rng(1).random(9000) < 0.2
    assert interval.patients_in(weights[:, chosen]) == len(np.unique(patients[chosen]))
    assert interval.patients_in(np.zeros((40, 5))) == 1
    assert interval.patients_in(weights[:, :0]) == 0


@pytest.mark.parametrize("count", [1, 5, 30])
def test_a_score_without_an_error_has_the_interval_of_clopper_and_pearson(count: int) -> None:
    rows = np.arange(100)
    weights = interval.patient_resamples(rows, 20_000, seed=0)[:, :count]
    for right in (1.0, 0.0):
        found = interval.mean_estimate(np.full(count, right), weights)
        limit = beta.ppf(0.025, count, 1)
        ends = (limit, 1.0) if right else (0.0, 1.0 - limit)
        assert (found["low"], found["high"]) == pytest.approx(ends, abs=0.02)
        assert found["value"] == right and found["n"] == count
    # three rows a patient are no three patients
    weights = interval.patient_resamples(np.repeat(np.arange(100), 3), 20_000, seed=0)
    thrice = interval.mean_estimate(np.ones(3 * count), weights[:, : 3 * count])
    assert thrice["low"] == pytest.approx(beta.ppf(0.025, count, 1), abs=0.02)


def test_a_group_of_few_without_an_error_is_not_told_apart_from_the_others() -> None:
    """Five of five found here and 85 of 100 there: 44 of 100 such groups have no miss."""
    labels, answers = np.ones(105, bool), np.ones(105)
    answers[5:20] = 0.0
    weights = interval.patient_resamples(np.arange(105), 2000, seed=0)
    own, others = (
        interval.measured_mean(answers[s], weights[:, s]) for s in (np.s_[:5], np.s_[5:])
    )
    apart = less(own, others)
    assert apart is not None and labels.all()
    told = interval.estimate(*apart)
    assert told["value"] == pytest.approx(0.15) and told["low"] < 0.0 < told["high"]


def test_a_perfect_score_that_most_resamples_lost_has_no_interval() -> None:
    resampled = np.array([1.0] + [np.nan] * 9)
    found = interval.bounded(1.0, resampled, 3, np.ones((10, 3)))
    assert found.resampled is resampled and interval.estimate(*found)["low"] is None


def test_the_mean_over_findings_rests_on_the_patients_that_its_spread_comes_from() -> None:
    generator = np.random.default_rng(0)
    wide, narrow = generator.normal(0, 1.0, 4000), generator.normal(0, 0.1, 4000)
    rare, common = interval.Measured(0.5, wide, 9, 6), interval.Measured(0.7, narrow, 30, 400)
    found = mean_over([rare, common], 30)
    assert found.value == pytest.approx(0.6) and found.n == 30
    np.testing.assert_allclose(found.resampled, (wide + narrow) / 2)
    lost = wide.var() ** 2 / 5 + narrow.var() ** 2 / 399
    assert found.units == pytest.approx(1 + (wide.var() + narrow.var()) ** 2 / lost)
    assert 6 <= found.units < 6.2
    assert mean_over([rare._replace(units=None)] * 2, 30).units is None
    assert mean_over([rare._replace(units=1)] * 2, 30).units == pytest.approx(3.0)
    assert mean_over([rare], 30) == rare._replace(n=30)
    gaps = mean_over([rare._replace(resampled=np.full(4000, np.nan)), common], 30)
    np.testing.assert_allclose(gaps.resampled, narrow)


@pytest.mark.parametrize("best", [1.0, 0.0])
def test_perfect_findings_do_not_pull_the_far_end_of_a_mean(best: float) -> None:
    """Of 14 findings of five carriers, all found nine times in ten, eight are found by chance
    without a miss: their draws below 1 are no evidence that the mean is below its value."""
    away, widths = 0, []
    for seed in range(100):
        hits = (np.random.default_rng(seed).random((14, 5)) < 0.9) == (best == 1.0)
        weights = interval.patient_resamples(np.arange(120), 200, seed)
        each = [
            interval.measured_mean(own * 1.0, weights[:, 5 * k : 5 * k + 5])
            for k, own in enumerate(hits)
        ]
        told = interval.estimate(*mean_over(each, 70))
        truth = abs(1.0 - best - 0.9)
        assert told["low"] is not None and told["high"] is not None and told["value"] is not None
        assert 0.0 <= told["low"] <= told["value"] <= told["high"] <= 1.0
        away += told["low"] > truth or told["high"] < truth
        widths.append(told["high"] - told["low"])
    assert away <= 6 and np.mean(widths) < 0.3  # 40 where perfect scores pull both ends


def test_a_mean_takes_each_end_from_draws_for_it() -> None:
    plain = interval.Measured(0.5, np.linspace(0.3, 0.7, 101), 9, 8)
    sure = interval.Measured(1.0, np.linspace(0.4, 1.0, 101), 9, None, np.ones(101))
    found = mean_over([plain, sure], 12)
    np.testing.assert_allclose(found.resampled, np.linspace(0.35, 0.85, 101))
    assert found.above is not None
    np.testing.assert_allclose(found.above, np.linspace(0.65, 0.85, 101))
    # the widening that the plain one needs is not hidden by the other's spread
    assert found.units == pytest.approx(8) and found.n == 12
    assert mean_over([plain, plain], 9).above is None


def test_a_difference_takes_its_lower_end_from_the_first_s_lower_and_the_second_s_upper() -> None:
    plain = interval.Measured(0.5, np.linspace(0.3, 0.7, 101), 9, 8)
    sure = interval.Measured(1.0, np.linspace(0.4, 1.0, 101), 7, None, np.ones(101))
    found, back = less(sure, plain), less(plain, sure)
    assert found is not None and back is not None
    assert found.above is not None and back.above is not None
    assert (found.value, found.n, found.units) == (0.5, 7, 8)
    assert (back.value, back.n, back.units) == (-0.5, 9, 8)
    np.testing.assert_allclose(found.resampled, np.linspace(0.1, 0.3, 101))
    np.testing.assert_allclose(found.above, np.linspace(0.7, 0.3, 101))
    np.testing.assert_allclose(back.resampled, -found.above)
    np.testing.assert_allclose(back.above, -found.resampled)
    both = less(plain._replace(units=30), plain)
    assert both is not None and both.above is None and both.units == 8
    assert less(None, sure) is less(sure, None) is None


def test_two_groups_of_the_same_patients_without_an_error_are_not_surely_alike() -> None:
    """Two views of each of eight patients, all found in both."""
    weights = interval.patient_resamples(np.repeat(np.arange(50), 2), 4000, seed=0)
    views = [
        auroc.measured_auroc(np.arange(50) < 8, np.arange(50) < 8, weights[:, k::2]) for k in (0, 1)
    ]
    told = less(*views)
    assert told is not None
    found = interval.estimate(*told)
    bound = 1 - beta.ppf(0.025, 8, 1)
    assert (found["low"], found["value"], found["high"]) == pytest.approx(
        (-bound, 0.0, bound), abs=0.02
    )


def test_a_score_that_misses_1_by_a_last_digit_is_perfect() -> None:
    """As the COCO tool's precision of one box, hits / (shown + eps)."""
    nearly = 1.0 / (1.0 + np.spacing(1))
    assert nearly < 1.0
    weights = interval.patient_resamples(np.arange(40), 400, seed=0)
    resampled = np.where(np.arange(400) % 2, nearly, 1.0)
    for value in (nearly, 1.0):
        found = interval.estimate(*interval.bounded(value, resampled, 40, weights[:, :5]))
        assert found["low"] == pytest.approx(beta.ppf(0.025, 5, 1), abs=0.05)
    # an error is an error, in a resample or in the score alone
    assert interval.bounded(0.99, resampled, 40, weights[:, :5]).resampled is resampled
    resampled[0] = 0.999
    assert interval.bounded(1.0, resampled, 40, weights[:, :5]).resampled is resampled
