"""Retrieval on hand-made score matrices with known ranks."""

from __future__ import annotations

import numpy as np
import pytest

from mlip.transfer.alignment import retrieval


def run(matrix: np.ndarray, pair_id: np.ndarray, pool: int) -> dict:
    return retrieval.evaluate_retrieval(
        lambda rows: {"global": matrix[np.ix_(rows, rows)]},
        pair_id,
        np.arange(len(pair_id)),
        pool=pool,
        bootstrap=50,
        seed=0,
    )


def test_perfect_scores_find_everything_first() -> None:
    found = run(np.eye(20), np.arange(20), pool=20)
    for direction in retrieval.DIRECTIONS:
        row = found["scores"]["global"][direction]
        told = row["recall@1"]
        assert (told["value"], told["high"], told["n"]) == (1.0, 1.0, 20)
        assert 0.8 < told["low"] < 0.9  # the rule of three: 1 - 3 / 20, and a little less
        assert row["median_rank"]["value"] == 1.0


def test_collapsed_features_score_as_the_worst_and_not_as_perfect() -> None:
    found = run(np.ones((20, 20)), np.arange(20), pool=20)
    row = found["scores"]["global"]["image_to_text"]
    assert row["recall@10"]["value"] == 0.0
    assert row["median_rank"]["value"] == 20.0


def test_directions_are_told_apart() -> None:
    # image 0 is far from its text, but no other image is nearer to text 0
    matrix = np.array([[0.1, 0.9, 0.8], [0.0, 0.7, 0.1], [0.0, 0.2, 0.6]])
    pair = np.arange(3)
    assert retrieval.first_right_rank(matrix, pair, pair).tolist() == [3, 1, 1]
    assert retrieval.first_right_rank(matrix.T, pair, pair).tolist() == [1, 2, 2]


def test_the_best_of_several_right_answers_counts() -> None:
    scores = np.array([[0.1, 0.9, 0.5, 0.4]])
    rank = retrieval.first_right_rank(scores, np.array([7]), np.array([7, 3, 7, 5]))
    assert rank.tolist() == [2]


def test_rows_of_one_study_are_right_answers_for_each_other() -> None:
    matrix = np.array([[0.0, 1.0], [1.0, 0.0]])  # each finds the other's text
    assert (
        run(matrix, np.array([4, 4]), pool=2)["scores"]["global"]["image_to_text"]["recall@1"][
            "value"
        ]
        == 1.0
    )
    assert (
        run(matrix, np.array([4, 5]), pool=2)["scores"]["global"]["image_to_text"]["recall@1"][
            "value"
        ]
        == 0.0
    )


def test_pools_are_disjoint_equal_and_leave_the_rest_out() -> None:
    pools = retrieval.make_pools(70, 32, seed=1)
    assert [len(p) for p in pools] == [32, 32]
    assert len(np.unique(np.concatenate(pools))) == 64
    found = run(np.eye(70), np.arange(70), pool=32)
    assert (found["pool"], found["pools"], found["n"], found["left_out"]) == (32, 2, 64, 6)


def test_fewer_rows_than_a_pool_are_one_smaller_pool_and_its_chance_follows() -> None:
    found = run(np.eye(12), np.arange(12), pool=256)
    assert (found["pool"], found["n"]) == (12, 12)
    assert found["chance"]["recall@5"] == pytest.approx(5 / 12)


def test_chance_recall_is_what_random_orders_reach() -> None:
    generator = np.random.default_rng(0)
    right = np.array([1, 3])
    hits = []
    for _ in range(4000):
        order = generator.permutation(16)
        hits.append([(order[:5] < r).any() for r in right])
    assert retrieval.chance_recall(16, right, 5) == pytest.approx(np.mean(hits), abs=0.015)


def test_nan_scores_are_an_error_that_names_the_score() -> None:
    with pytest.raises(ValueError, match="the global scores hold NaN"):
        run(np.full((4, 4), np.nan), np.arange(4), pool=4)


def test_one_row_has_no_retrieval() -> None:
    assert run(np.eye(1), np.arange(1), pool=4)["scores"] == {}


@pytest.mark.parametrize(("patients", "has_interval"), [(5, False), (6, True)])
def test_the_median_rank_of_few_patients_has_no_interval(patients: int, has_interval: bool) -> None:
    """Of five patients the least and the greatest rank hold the median in 15 of 16 draws alone."""
    matrix = np.eye(2 * patients)  # every answer at rank 1
    found = retrieval.evaluate_retrieval(
        lambda rows: {"global": matrix[np.ix_(rows, rows)]},
        np.arange(2 * patients),
        np.repeat(np.arange(patients), 2),
        pool=2 * patients,
        bootstrap=50,
        seed=0,
    )
    row = found["scores"]["global"]["image_to_text"]
    assert row["median_rank"]["value"] == 1.0 and row["recall@1"]["low"] < 1.0
    assert row["median_rank"]["low"] == (1.0 if has_interval else None)
    assert row["median_rank"]["reason"] == (None if has_interval else "fewer than 6 patients")
