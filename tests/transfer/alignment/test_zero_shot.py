"""Zero-shot scores by hand."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from mlip.transfer.alignment.zero_shot import (
    Prompts,
    combine,
    evaluate_zero_shot,
    finding_scores,
    prompt_texts,
)
from mlip.transfer.measures.interval import patient_resamples

TWO = [
    Prompts("a", "Finding A", ("a is seen", "there is a"), ("no a",)),
    Prompts("b", "Finding B", ("b is seen",), ("no b", "b is absent")),
]


def test_a_score_is_mean_positive_minus_mean_negative_wording() -> None:
    similarity = np.array([[0.2, 0.4, 0.1, 0.9, 0.3, 0.5]])
    assert prompt_texts(TWO) == [
        "a is seen",
        "there is a",
        "no a",
        "b is seen",
        "no b",
        "b is absent",
    ]
    np.testing.assert_allclose(finding_scores(similarity, TWO), [[0.3 - 0.1, 0.9 - 0.4]])


def test_wordings_and_columns_must_agree() -> None:
    with pytest.raises(ValueError, match="expected 6 wordings, got 5"):
        finding_scores(np.zeros((1, 5)), TWO)


def test_a_finding_needs_both_kinds_of_wording() -> None:
    with pytest.raises(ValueError, match="'c'.*got 1 and 0"):
        Prompts("c", "C", ("c",), ())


def test_naming_a_finding_is_not_enough() -> None:
    """A model that only sees the finding's name scores both wordings alike: AUROC 0.5."""
    labels = np.array([[1], [0], [1], [0]])
    named = np.array([[0.9, 0.9], [0.1, 0.1], [0.8, 0.8], [0.3, 0.3]])
    prompts = [Prompts("a", "A", ("a",), ("no a",))]
    found = evaluate_zero_shot(
        {"global": finding_scores(named, prompts)},
        labels,
        prompts,
        patient_resamples(range(4), 20, 0),
    )
    assert found["macro"]["global"]["value"] == 0.5


def test_combined_weighs_each_score_by_its_own_learned_scale() -> None:
    assert combine(np.array([0.5]), np.array([0.2]), 10.0, 20.0)[0] == pytest.approx(9.0)


def test_scores_are_scikit_learns_and_unlabelled_rows_and_absent_findings_leave() -> None:
    generator = np.random.default_rng(0)
    scores = generator.standard_normal((60, 3))
    labels = (generator.random((60, 3)) < 0.5).astype(int)
    labels[:10, 0] = -1  # not said
    labels[:, 2] = 0  # never present
    prompts = [Prompts(n, n.upper(), (n,), (f"no {n}",)) for n in "abc"]
    found = evaluate_zero_shot(
        {"local": scores}, labels, prompts, patient_resamples(range(60), 100, 0)
    )
    a, b, c = found["findings"]
    assert a["n"] == 50 and b["n"] == 60
    expected = [
        roc_auc_score(labels[10:, 0], scores[10:, 0]),
        roc_auc_score(labels[:, 1], scores[:, 1]),
    ]
    assert [a["local"]["value"], b["local"]["value"]] == pytest.approx(expected)
    assert c["local"]["value"] is None and "0 of 60" in c["local"]["reason"]
    assert found["macro"]["local"]["value"] == pytest.approx(np.mean(expected))
    assert found["worst"]["local"]["value"] == pytest.approx(min(expected))
    assert found["worst"]["local"]["finding"] == "ab"[int(np.argmin(expected))]
    assert a["local"]["low"] < a["local"]["value"] < a["local"]["high"]


def test_without_any_scorable_finding_there_is_no_mean() -> None:
    found = evaluate_zero_shot(
        {"global": np.zeros((3, 2))}, np.zeros((3, 2)), TWO, patient_resamples(range(3), 5, 0)
    )
    assert found["macro"]["global"]["value"] is None
    assert found["worst"]["global"]["finding"] is None


def test_a_rare_finding_does_not_cost_the_mean_its_interval() -> None:
    generator = np.random.default_rng(0)
    labels = (generator.random((40, 2)) < 0.5).astype(int)
    labels[:, 1] = 0
    labels[3, 1] = 1  # lost by a third of the resamples
    found = evaluate_zero_shot(
        {"global": generator.standard_normal((40, 2))},
        labels,
        [Prompts(n, n, (n,), (f"no {n}",)) for n in "ab"],
        patient_resamples(range(40), 200, 0),
    )
    macro = found["macro"]["global"]
    assert (macro["classes"], macro["classes_asked"]) == (2, 2)
    assert macro["low"] < macro["value"] < macro["high"]


def test_rates_use_the_threshold_of_val_and_never_of_test() -> None:
    from sklearn.metrics import f1_score, precision_score, recall_score

    from mlip.transfer.alignment.zero_shot import at_thresholds, choose_thresholds

    rng = np.random.default_rng(0)
    val_labels = (rng.random((50, 2)) < 0.4).astype(np.int8)
    val_scores = {"global": val_labels + rng.normal(0, 0.4, (50, 2))}
    labels = (rng.random((80, 2)) < 0.4).astype(np.int8)
    labels[:3, 0] = -1  # not said: in no rate
    scores = {"global": labels + rng.normal(0, 0.4, (80, 2))}
    weights = np.ones((10, 80))
    cuts = choose_thresholds(val_scores, val_labels, "f1")
    one = at_thresholds(scores, labels, {"global": [cuts["global"][0], None]}, weights)
    over = one["macro"]["global"]["f1"]
    assert (over["classes"], over["classes_asked"]) == (1, 2)
    found = at_thresholds(scores, labels, cuts, weights)
    for f in range(2):
        row, known = found["findings"][f]["global"], labels[:, f] >= 0
        several = np.unique(val_scores["global"][:, f])
        on_val = [f1_score(val_labels[:, f], val_scores["global"][:, f] >= c) for c in several]
        assert row["threshold"] == pytest.approx(several[int(np.argmax(on_val))])
        truth, called = labels[known, f], scores["global"][known, f] >= row["threshold"]
        assert row["f1"]["value"] == pytest.approx(f1_score(truth, called))
        assert row["sensitivity"]["value"] == pytest.approx(recall_score(truth, called))
        assert row["specificity"]["value"] == pytest.approx(recall_score(1 - truth, ~called))
        assert row["ppv"]["value"] == pytest.approx(precision_score(truth, called))
        assert row["npv"]["value"] == pytest.approx(precision_score(1 - truth, ~called))
        assert row["ppv"]["n"] == called.sum() and row["npv"]["n"] == (~called).sum()
    mean = np.mean([row["global"]["sensitivity"]["value"] for row in found["findings"]])
    assert found["macro"]["global"]["sensitivity"]["value"] == pytest.approx(mean)
    none = choose_thresholds(val_scores, np.zeros_like(val_labels), "f1")
    assert none == {"global": [None, None]}
    found = at_thresholds(scores, labels, none, weights)
    assert found["macro"]["global"]["f1"]["value"] is None
    assert found["macro"]["global"]["f1"]["classes"] == 0
    assert "val does not carry" in found["findings"][0]["global"]["npv"]["reason"]


def test_a_rate_of_nothing_is_stated_with_its_reason() -> None:
    from mlip.transfer.alignment.zero_shot import at_thresholds

    labels = np.array([[1], [0], [0], [1]], dtype=np.int8)
    scores = {"global": np.zeros((4, 1))}
    row = at_thresholds(scores, labels, {"global": [1.0]}, np.ones((3, 4)))["findings"][0]["global"]
    assert row["sensitivity"]["value"] == 0.0 and row["specificity"]["value"] == 1.0
    assert row["ppv"]["value"] is None and row["ppv"]["reason"] == "no row is called positive"


def test_accuracy_of_exclusive_findings_is_stated_with_and_without_normalising() -> None:
    from mlip.transfer.alignment.zero_shot import exclusive_accuracy

    labels = np.array([[1, 0], [1, 0], [0, 1], [0, 1], [1, 1]], dtype=np.int8)
    # the second finding scores high on everything: normalising over the test set mends that
    scores = {"global": np.array([[1.0, 5], [1, 5], [0, 6], [0, 6], [9, 9]])}
    found = exclusive_accuracy(scores, labels, np.ones((4, 5)))["global"]
    assert found["plain"]["value"] == 0.5 and found["z_normalised"]["value"] == 1.0
    assert found["plain"]["n"] == 4
