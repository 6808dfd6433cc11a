"""Scores and their intervals, against scikit-learn and closed forms."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from mlip.transfer import interval, retrieval
from mlip.transfer.retrieval import rank_summary


def test_weighted_auroc_is_scikit_learns_with_sample_weights_and_ties() -> None:
    generator = np.random.default_rng(0)
    scores = generator.integers(0, 6, 80).astype(float)  # few values: many ties
    labels = generator.random(80) < 0.4
    weights = generator.integers(0, 4, (70, 80))  # more rows than one block of the code
    ours = interval.weighted_auroc(scores, labels, weights)
    theirs = [roc_auc_score(labels, scores, sample_weight=w) for w in weights]
    np.testing.assert_allclose(ours, theirs, atol=1e-12)


def test_weighted_auroc_is_nan_where_a_class_has_no_weight() -> None:
    scores, labels = np.array([0.1, 0.9]), np.array([False, True])
    found = interval.weighted_auroc(scores, labels, np.array([[1, 1], [1, 0], [0, 3]]))
    assert found[0] == 1.0
    assert np.isnan(found[1:]).all()


def test_an_absent_class_is_not_available_and_never_one_half() -> None:
    found = interval.auroc_estimate(np.arange(5.0), np.zeros(5, bool), np.ones((3, 5), int))
    assert found["value"] is None and found["low"] is None
    assert found["reason"] == "0 of 5 rows carry the finding"


def test_scores_that_are_not_finite_are_an_error() -> None:
    with pytest.raises(ValueError, match="1 of 3 scores are NaN"):
        interval.auroc(np.array([0.0, np.nan, 1.0]), np.array([True, False, True]))


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
