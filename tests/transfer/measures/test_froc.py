"""FROC; oracle: the marks counted threshold by threshold, and cases made by hand."""

from __future__ import annotations

import numpy as np
import pytest

from mlip.transfer.measures.average_precision import Found, Truth
from mlip.transfer.measures.froc import RATES, froc_scores, marks_of, sensitivities

BOX = [[0.0, 0.0, 10.0, 10.0]]
ELSEWHERE = [[40.0, 40.0, 50.0, 50.0]]


def true(*corners: list[float], labels: list[int] | None = None) -> Truth:
    boxes = np.array(corners, dtype=float).reshape(-1, 4)
    return Truth(boxes, np.array(labels or [0] * len(boxes), dtype=np.int64))


def found(*corners: list[float], scores: list[float], labels: list[int] | None = None) -> Found:
    boxes = np.array(corners, dtype=float).reshape(-1, 4)
    return Found(boxes, np.array(scores), np.array(labels or [0] * len(boxes), dtype=np.int64))


def at(truth: list[Truth], predictions: list[Found]) -> list[float]:
    return sensitivities(marks_of(truth, predictions), np.ones((1, len(truth))))[0].tolist()


def test_perfect_all_wrong_and_silent_by_hand() -> None:
    truth = [true(*BOX), true(*BOX), true(), true()]
    perfect = [found(*BOX, scores=[0.9]), found(*BOX, scores=[0.8]), *[found(scores=[])] * 2]
    assert at(truth, perfect) == [1.0] * len(RATES)
    assert at(truth, [found(*ELSEWHERE, scores=[0.9])] * 4) == [0.0] * len(RATES)
    assert at(truth, [found(scores=[])] * 4) == [0.0] * len(RATES)


def test_false_marks_on_images_without_a_box_count() -> None:
    """One false mark better than the second hit: that hit costs a quarter of a false mark."""
    truth = [true(*BOX), true(*BOX), true(), true()]
    shown = [
        found(*BOX, scores=[0.9]),
        found(*BOX, scores=[0.5]),
        found(*ELSEWHERE, scores=[0.7]),
        found(scores=[]),
    ]
    assert at(truth, shown) == [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]


def test_a_second_mark_in_a_box_is_neither_a_hit_nor_false_and_labels_must_agree() -> None:
    truth = [true(*BOX, labels=[0])]
    twice = found(*BOX, *BOX, scores=[0.9, 0.8])
    marks = marks_of(truth, [twice])
    assert marks.is_hit.tolist() == [True]
    other = marks_of(truth, [found(*BOX, scores=[0.9], labels=[1])])
    assert other.is_hit.tolist() == [False]
    # one mark in two boxes finds one of them
    both = marks_of([true(*BOX, [2.0, 2, 12, 12])], [found([3.0, 3, 7, 7], scores=[0.9])])
    assert both.is_hit.tolist() == [True] and both.positives.tolist() == [2]


def test_equal_scores_stand_or_fall_together() -> None:
    truth = [true(*BOX), true()]
    shown = [found(*BOX, scores=[0.5]), found(*ELSEWHERE, scores=[0.5])]
    assert at(truth, shown) == [0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0]


def test_resampling_is_repeating_the_images() -> None:
    """Oracle: marks counted threshold by threshold on a list with images repeated."""
    rng = np.random.default_rng(0)
    truth, shown = [], []
    for _ in range(12):
        corners = rng.uniform(0, 80, (rng.integers(0, 3), 2))
        truth.append(true(*np.concatenate([corners, corners + 20], axis=1).tolist()))
        where = rng.uniform(0, 80, (rng.integers(0, 9), 2))
        boxes = np.concatenate([where, where + 18], axis=1).tolist()
        shown.append(found(*boxes, scores=(rng.random(len(boxes)) * 8).round().tolist()))
    weights = rng.integers(0, 3, (5, 12))
    ours = sensitivities(marks_of(truth, shown), weights)
    for weight, row in zip(weights, ours, strict=True):
        index = np.repeat(np.arange(12), weight)
        marks = marks_of([truth[i] for i in index], [shown[i] for i in index])
        for rate, value in zip(RATES, row, strict=True):
            best = 0.0
            for threshold in np.unique(marks.score):
                over = marks.score >= threshold
                if (over & ~marks.is_hit).sum() / len(index) <= rate:
                    best = max(best, (over & marks.is_hit).sum() / marks.positives.sum())
            assert value == pytest.approx(best)


def test_marks_beyond_the_highest_rate_are_left_out_without_a_difference() -> None:
    """Oracle: all marks counted. Some weights lie on images whose marks come last, or are few."""
    rng = np.random.default_rng(4)
    truth, shown = [], []
    for i in range(30):
        corners = rng.uniform(0, 80, (2, 2))
        truth.append(true(*np.concatenate([corners, corners + 20], axis=1).tolist()))
        where = rng.uniform(0, 80, (2 if i == 3 else 60, 2))
        boxes = np.concatenate([where, where + 18], axis=1).tolist()
        scores = rng.integers(1, 4000, len(boxes)) + (0 if i in (3, 4) else 4000)
        shown.append(found(*boxes, scores=scores.tolist()))
    marks = marks_of(truth, shown)
    weights = np.concatenate([rng.multinomial(30, np.ones(30) / 30, 20), np.eye(30, dtype=int)])
    ours = sensitivities(marks, weights)
    ends = np.flatnonzero(np.r_[np.diff(marks.score) != 0, True])
    assert len(ends) > 2 * (2 * RATES[-1] * 30)  # twice what is counted at first
    for weight, row in zip(weights, ours, strict=True):
        each = weight[marks.image].astype(float)
        false = np.cumsum(each * ~marks.is_hit)[ends] / weight.sum()
        hits = np.cumsum(each * marks.is_hit)[ends] / (weight @ marks.positives)
        expected = [max([0.0, *hits[false <= rate * (1 + 1e-12)]]) for rate in RATES]
        assert row.tolist() == expected


def test_without_a_true_box_there_is_no_score_and_broken_scores_are_an_error() -> None:
    scores = froc_scores([true()], [[found(*BOX, scores=[0.4])]], np.ones((3, 1)))
    assert scores["mean"]["value"] is None and "true box" in scores["mean"]["reason"]
    with pytest.raises(ValueError, match="NaN"):
        marks_of([true()], [found(*BOX, scores=[np.nan])])
