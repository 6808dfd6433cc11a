"""Scores of some test rows of a classifier, for groups of patients.

Oracle: label_scores and exclusive_scores of those rows alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mlip.transfer.fits.classification_scores import (
    IGNORED,
    exclusive_measures,
    exclusive_scores,
    label_measures,
    label_scores,
)
from mlip.transfer.measures.interval import estimate

N, CLASSES = 60, list("ABC")
RNG = np.random.default_rng(4)
TARGETS = (RNG.random((N, 3)) < 0.4).astype(np.int8)
TARGETS[::7, 0] = IGNORED
VAL = (RNG.random((N, 3)) < 0.4).astype(np.int8)
VAL[:9, 0] = IGNORED
VAL[:, 2] = 0  # val knows no positive of the last class: no threshold
WEIGHTS = RNG.integers(0, 3, (40, N))
PATIENTS = np.arange(N) // 2
INSIDE = RNG.random(N) < 0.6


def _prediction(*learnt: bool) -> dict[str, np.ndarray]:
    def logits(targets: np.ndarray) -> np.ndarray:
        # in halves: some rows have the very score that val chose
        return np.round(2 * targets.clip(0) + RNG.normal(0, 2, targets.shape)) / np.float32(2)

    return {"val": logits(VAL), "test": logits(TARGETS), "learnt": np.array(learnt)}


PREDICTIONS = [_prediction(True, True, True), _prediction(True, False, True)]


def _rows(predictions: list[dict[str, np.ndarray]]) -> list[dict[str, np.ndarray]]:
    return [{**p, "test": p["test"][INSIDE]} for p in predictions]


def test_a_group_scores_what_its_rows_alone_score_at_the_thresholds_of_all() -> None:
    for rule in ("f1", "specificity=0.8"):
        given = (VAL, WEIGHTS, CLASSES, rule)
        found = label_measures(PREDICTIONS, TARGETS, *given, PATIENTS)(INSIDE)
        alone = label_scores(
            _rows(PREDICTIONS), TARGETS[INSIDE], VAL, WEIGHTS[:, INSIDE], CLASSES, rule
        )
        assert found.whole == {} and list(found.classes) == list(found.counts) == CLASSES
        for row in alone["classes"]:
            assert found.counts[row["class"]] == (row["n"], row["positives"])
            told = found.classes[row["class"]]
            # F1 asks for a positive of val, specificity for none
            has_cut = row["class"] != "C" or rule != "f1"
            rates = {"sensitivity", "specificity"} if has_cut else set()
            assert told.keys() == {"auroc"} | rates
            for key, measured in told.items():
                own: Any = estimate(*measured)
                assert own["value"] == pytest.approx(row[key]["value"])
                assert (own["low"], own["n"]) == (pytest.approx(row[key]["low"]), row[key]["n"])


def test_of_exclusive_classes_accuracy_is_of_all_rows_and_of_two_one_is_told() -> None:
    targets = np.eye(3, dtype=np.int8)[RNG.integers(0, 3, N)]
    predictions = [{**p, "test": targets + RNG.normal(0, 1, targets.shape)} for p in PREDICTIONS]
    found = exclusive_measures(predictions, targets, WEIGHTS, CLASSES, PATIENTS)(INSIDE)
    alone = exclusive_scores(_rows(predictions), targets[INSIDE], WEIGHTS[:, INSIDE], CLASSES)
    accuracy = estimate(*found.whole["accuracy"])
    for key in ("value", "low", "high", "n"):
        assert accuracy[key] == pytest.approx(alone["macro"]["accuracy"][key])
    for row in alone["classes"]:
        assert found.counts[row["class"]] == (row["n"], row["positives"])
        own: Any = estimate(*found.classes[row["class"]]["auroc"])
        for key in ("value", "low", "high", "n"):
            assert own[key] == pytest.approx(row["auroc"][key])
    two = [{**p, "test": p["test"][:, :2], "learnt": p["learnt"][:2]} for p in predictions]
    targets = np.eye(2, dtype=np.int8)[RNG.integers(0, 2, N)]
    found = exclusive_measures(two, targets, WEIGHTS, CLASSES[:2], PATIENTS)(INSIDE)
    assert list(found.classes) == ["B"] and found.classes["B"]["auroc"][2] == INSIDE.sum()


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_a_class_that_no_fit_learnt_or_few_patients_have_has_no_score() -> None:
    silent = [{**p, "learnt": np.array([True, False, True])} for p in PREDICTIONS]
    few = PATIENTS.clip(max=8)
    labels = label_measures(silent, TARGETS, VAL, WEIGHTS, CLASSES, "f1", PATIENTS)
    assert labels(INSIDE).classes["B"] == {} and labels(INSIDE).classes["A"]
    everybody, first = np.ones(N, bool), np.arange(N) < 10
    targets = np.eye(3, dtype=np.int8)[RNG.integers(0, 3, N)]
    exclusive = exclusive_measures(silent, targets, WEIGHTS, CLASSES, PATIENTS)
    assert exclusive(everybody).classes["B"] == {} and exclusive(everybody).classes["A"]
    # four patients in the first rows, two rows each
    for measure in (
        label_measures(PREDICTIONS, TARGETS, VAL, WEIGHTS, CLASSES, "f1", few.clip(1)),
        exclusive_measures(PREDICTIONS, targets, WEIGHTS, CLASSES, few.clip(1)),
    ):
        assert not any(measure(first).classes.values())
        assert measure(first).counts["A"][0] in (8, 10)
    # nobody is in the group: nothing is scored, nothing fails
    nobody = exclusive(np.zeros(N, bool))
    assert nobody.whole == {} and not any(nobody.classes.values())
