"""Classification scores on hand-made cases; oracles: scikit-learn, torchmetrics, counting."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, confusion_matrix
from torchmetrics.classification import BinaryCalibrationError, MulticlassCalibrationError
from torchmetrics.functional.classification import binary_auroc, binary_average_precision

from mlip.transfer.fits.classification_scores import exclusive_scores, label_scores, macro_auroc
from mlip.transfer.measures.auroc import measured_auroc, weighted_auroc
from mlip.transfer.measures.interval import Measured, patient_resamples
from mlip.transfer.measures.means import over_seeds
from mlip.transfer.measures.scores import (
    average_precision,
    calibration_error,
    confusion,
    curve,
    weighted_average_precision,
)

CASES = {
    "perfect": ([0.9, 0.8, 0.2, 0.1], [1, 1, 0, 0]),
    "all wrong": ([0.1, 0.2, 0.8, 0.9], [1, 1, 0, 0]),
    "all tied": ([0.5, 0.5, 0.5, 0.5], [1, 0, 0, 1]),
    "some tied": ([0.9, 0.5, 0.5, 0.5, 0.1], [1, 1, 0, 0, 1]),
    "one positive": ([0.4, 0.6, 0.3, 0.2], [0, 0, 1, 0]),
}


@pytest.mark.parametrize("case", CASES)
def test_areas_equal_both_libraries_with_and_without_ties(case: str) -> None:
    scores, labels = (np.array(v) for v in CASES[case])
    labels = labels.astype(bool)
    one = np.ones((1, len(scores)))
    t_scores, t_labels = torch.tensor(scores), torch.tensor(labels).long()
    expected = float(binary_auroc(t_scores, t_labels, thresholds=None))
    assert weighted_auroc(scores, labels, one)[0] == pytest.approx(expected)
    expected = float(binary_average_precision(t_scores, t_labels, thresholds=None))
    assert average_precision(scores, labels) == pytest.approx(expected)
    assert weighted_average_precision(scores, labels, one)[0] == pytest.approx(expected)


def test_average_precision_under_weights_equals_the_library_on_repeated_rows() -> None:
    rng = np.random.default_rng(0)
    scores, labels = rng.integers(0, 12, 60) / 12.0, rng.random(60) < 0.3
    weights = rng.integers(0, 4, (5, 60))
    found = weighted_average_precision(scores, labels, weights)
    for row, value in zip(weights, found, strict=True):
        again = np.repeat(np.arange(60), row)
        assert value == pytest.approx(average_precision_score(labels[again], scores[again]))


@pytest.mark.parametrize("labels", [[True] * 4, [False] * 4])
def test_a_class_without_both_kinds_of_rows_has_no_score(labels: list[bool]) -> None:
    scores, truth = np.linspace(0, 1, 4), np.array(labels)
    assert average_precision(scores, truth) is None
    assert np.isnan(weighted_average_precision(scores, truth, np.ones((1, 4)))).all()


def test_calibration_error_equals_torchmetrics() -> None:
    rng = np.random.default_rng(1)
    probability = rng.random(500)
    truth = rng.random(500) < probability**2
    ours = calibration_error(probability, truth)[0]
    theirs = BinaryCalibrationError(n_bins=15, norm="l1")
    t_probability, t_truth = torch.tensor(probability), torch.tensor(truth).long()
    assert ours == pytest.approx(float(theirs(t_probability, t_truth)), abs=1e-6)
    several = rng.dirichlet(np.ones(3), 200)
    label = rng.integers(0, 3, 200)
    ours = calibration_error(several.max(axis=1), several.argmax(axis=1) == label)[0]
    many = MulticlassCalibrationError(num_classes=3, n_bins=15, norm="l1")
    theirs_value = float(many(torch.tensor(several), torch.tensor(label)))
    assert ours == pytest.approx(theirs_value, abs=1e-6)
    assert calibration_error(np.array([1.0, 0.0]), np.array([1, 0]))[0] == 0.0
    assert calibration_error(np.array([1.0, 1.0]), np.array([0, 0]))[0] == 1.0


@pytest.mark.parametrize("n", [100, 3000])
def test_a_calibrated_model_shows_the_error_that_chance_gives(n: int) -> None:
    rng = np.random.default_rng(3)
    confidence = rng.random(n)
    found = [calibration_error(confidence, rng.random(n) < confidence) for _ in range(200)]
    errors, by_chance = np.array(found).T
    assert abs(errors.mean() - by_chance[0]) < 3 * errors.std() / np.sqrt(100)
    assert (by_chance == by_chance[0]).all()  # the same in every process
    assert calibration_error(confidence, rng.random(n) < confidence**3)[0] > 2 * by_chance[0]


def test_confusion_has_true_classes_in_rows_as_scikit_learn() -> None:
    truth, predicted = np.array([0, 0, 1, 2, 2]), np.array([0, 2, 1, 2, 0])
    assert confusion(predicted, truth, 3) == confusion_matrix(truth, predicted).tolist()


def test_curves_start_and_end_where_they_must() -> None:
    points = curve(np.linspace(0, 1, 500), np.arange(500) % 3 == 0)
    assert points["false_positive_rate"][0] == 0.0 and points["false_positive_rate"][-1] == 1.0
    assert points["recall"][0] == 0.0 and points["recall"][-1] == 1.0
    assert len(points["precision"]) <= 120
    # the highest score is of a negative: no point of precision 1 that no threshold reaches
    assert points["precision"][0] == 0.0 and max(points["precision"]) < 0.6


def test_seeds_are_averaged_under_the_same_patients_and_their_spread_is_stated() -> None:
    resampled = np.linspace(0.4, 0.8, 101)
    mean = over_seeds([Measured(0.6, resampled, 9), Measured(0.8, resampled + 0.2, 9), None])
    assert mean["value"] == pytest.approx(0.7) and mean["n"] == 9
    assert mean["seeds"] == [0.6, 0.8, None]
    assert mean["seed_sd"] == pytest.approx(np.std([0.6, 0.8], ddof=1))
    assert mean["low"] == pytest.approx(0.51) and mean["high"] == pytest.approx(0.89)
    # a fit whose rate is a share of nothing is no zero, and takes the others' mean from nobody
    silent = Measured(np.nan, np.full(101, np.nan), 0)
    fits = [Measured(0.6, resampled, 9), silent, Measured(0.8, resampled + 0.2, 7)]
    told = over_seeds(fits)
    assert told == {**mean, "seeds": [0.6, None, 0.8]}
    nothing = over_seeds([None], "why")
    assert nothing["value"] is None and nothing["reason"] == "why"


def _prediction(logits: np.ndarray, learnt: list[bool]) -> dict[str, np.ndarray]:
    return {"test": logits, "val": logits, "learnt": np.array(learnt)}


def test_labels_that_are_ignored_leave_their_class_and_no_class_is_a_silent_half() -> None:
    targets = np.array([[1, 1, 0], [0, 1, 0], [1, 1, 0], [0, 1, 1], [-1, 1, 0]], dtype=np.int8)
    logits = np.array([[2.0, 0, 0], [-1, 0, 0], [1, 0, 0], [-2, 0, 0], [9, 0, 0]])
    weights = patient_resamples(list("abcde"), 20, 0)
    scores = label_scores(
        [_prediction(logits, [True, True, False])], targets, targets, weights, ["A", "B", "C"], "f1"
    )
    a, b, c = scores["classes"]
    assert a["auroc"]["value"] == 1.0 and a["n"] == 4 and a["confusion"] == [[2, 0], [0, 2]]
    assert b["auroc"]["value"] is None and "5 of 5 test rows" in b["auroc"]["reason"]
    assert c["auroc"]["value"] is None and "training draw" in c["auroc"]["reason"]
    assert scores["macro"]["auroc"]["value"] == 1.0


def test_the_confusion_is_what_the_rates_say_where_all_scores_are_equal() -> None:
    targets = np.array([[1], [0]] * 4, dtype=np.int8)
    logits = np.full((8, 1), 0.3, dtype=np.float32)  # a threshold above all is no float32
    (row,) = label_scores(
        *([_prediction(logits, [True])], targets, targets, np.ones((3, 8)), ["A"]),
        "specificity=0.9",
    )["classes"]
    assert row["threshold_logits"][0] > float(logits.max()) and row["specificity"]["value"] == 1.0
    assert row["confusion"] == [[4, 0], [4, 0]]


def test_exclusive_classes_are_scored_by_the_best_one() -> None:
    truth = np.array([0, 1, 2, 2])
    targets = np.eye(3, dtype=np.int8)[truth]
    logits = np.array([[3.0, 0, 0], [0, 3, 0], [0, 0, 3], [3, 0, 0]])
    weights = patient_resamples(list("abcd"), 20, 0)
    scores = exclusive_scores([_prediction(logits, [True] * 3)], targets, weights, list("XYZ"))
    assert scores["macro"]["accuracy"]["value"] == 0.75
    assert scores["confusion"] == [[1, 0, 0], [0, 1, 0], [1, 0, 1]]
    assert scores["classes"][1]["auroc"]["value"] == 1.0


def test_one_patient_gives_a_value_without_an_interval() -> None:
    weights = patient_resamples(["a"] * 4, 50, 0)
    scores, labels = np.array([2.0, 1.0, 3.0, 4.0]), np.array([False, True, False, True])
    found = over_seeds([measured_auroc(scores, labels, weights)])
    assert found["value"] == 0.5 and found["low"] is None


def test_the_score_that_picks_a_fit_is_the_mean_over_classes_of_both_kinds() -> None:
    logits = np.array([[0.9, 0.5, 0.3], [0.2, 0.8, 0.2], [0.1, 0.3, 0.1], [0.5, 0.6, 0.4]])
    targets = np.array([[1, 1, 0], [0, 1, 0], [1, 0, 0], [-1, 0, -1]])
    # pairs in order: one of two without the unknown row, three of four, no positive at all
    assert macro_auroc(logits, targets) == pytest.approx((0.5 + 0.75) / 2)
    assert macro_auroc(logits[:, 2:], targets[:, 2:]) is None
