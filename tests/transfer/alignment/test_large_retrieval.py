"""Chunked retrieval; oracles: the pool's own ranks on whole matrices, and counting."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchmetrics.functional.retrieval import retrieval_precision

from mlip.transfer.alignment import large_retrieval
from mlip.transfer.alignment.large_retrieval import (
    class_precision,
    ranks_both_ways,
    top_candidates,
    whole_retrieval,
)
from mlip.transfer.alignment.retrieval import evaluate_retrieval, first_right_rank


def _unit(rows: int, seed: int) -> torch.Tensor:
    made = torch.randn(rows, 8, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(made, dim=1)


@pytest.fixture
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large_retrieval, "_chunks", lambda queries, candidates: (7, 11))


def test_chunks_give_the_ranks_of_the_whole_matrix(_small_chunks: None) -> None:
    q, c = _unit(40, 1), _unit(53, 2)
    c[20] = c[3]  # a tie
    pair_c = np.arange(53) % 20  # several right answers
    pair_q = np.arange(40) % 20
    scores, same = (q @ c.T).numpy(), pair_q[:, None] == pair_c[None]
    images, texts = ranks_both_ways(q, c, pair_q, pair_c)
    np.testing.assert_array_equal(images.rank, first_right_rank(scores, pair_q, pair_c))
    np.testing.assert_array_equal(texts.rank, first_right_rank(scores.T, pair_c, pair_q))
    np.testing.assert_array_equal(images.right, same.sum(axis=1))
    np.testing.assert_array_equal(texts.right, same.sum(axis=0))
    order = np.argsort(-(q @ c.T).numpy(), axis=1, kind="stable")[:, :9]
    np.testing.assert_array_equal(top_candidates(q, c, 9), order)


def test_chunks_are_exact_where_most_scores_are_tied(_small_chunks: None) -> None:
    """Small whole numbers: every score is exact and shared by many. Oracle: a stable sort."""
    made = torch.Generator().manual_seed(3)
    q = torch.randint(-1, 2, (40, 3), generator=made).float()
    c = torch.randint(-1, 2, (300, 3), generator=made).float()
    scores = (q @ c.T).numpy()
    for most in (1, 4, 10, 299, 300):
        order = np.argsort(-scores, axis=1, kind="stable")[:, :most]
        np.testing.assert_array_equal(top_candidates(q, c, most), order)
    pair_q, pair_c = np.arange(40) % 7, np.arange(300) % 7
    images, texts = ranks_both_ways(q, c, pair_q, pair_c)
    np.testing.assert_array_equal(images.rank, first_right_rank(scores, pair_q, pair_c))
    np.testing.assert_array_equal(texts.rank, first_right_rank(scores.T, pair_c, pair_q))


def test_single_pairs_beside_shared_ones_and_rows_without_a_right_answer(
    _small_chunks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Most pairs are of one image and one text; a few are shared, and a few have no partner."""
    monkeypatch.setattr(large_retrieval, "CHUNK_BYTES", 96)  # several slices of every kind
    q, c = _unit(40, 1), _unit(53, 2)
    made = np.random.default_rng(0)
    pair_q, pair_c = made.permutation(40), made.permutation(53)
    pair_q[:9], pair_c[:11] = 7, 7
    pair_q[30:33] = [100, 101, 102]
    images, texts = ranks_both_ways(q, c, pair_q, pair_c)
    for found, scores, own, other in (
        (images, (q @ c.T).numpy(), pair_q, pair_c),
        (texts, (c @ q.T).numpy(), pair_c, pair_q),
    ):
        known = np.isin(own, other)
        assert 0 < known.sum() < len(own)
        np.testing.assert_array_equal(
            found.rank[known], first_right_rank(scores[known], own[known], other)
        )
        assert (found.rank[~known] == len(other) + 1).all() and (found.right[~known] == 0).all()


def test_scores_that_float32_does_not_tell_apart_are_ties() -> None:
    """Two texts of different pairs that say the same: neither image has its own one first."""
    made = _unit(2, 3)
    q = torch.cat([made[:1], made])
    c = torch.cat([made[:1], made[:1] * (1 - 5e-7), made[1:]])
    images, texts = ranks_both_ways(q, c, np.arange(3), np.arange(3))
    assert images.rank.tolist() == texts.rank.tolist() == [2, 2, 1]
    c[1] = made[0] * (1 - 1e-5)
    images, _ = ranks_both_ways(q, c, np.arange(3), np.arange(3))
    assert images.rank.tolist() == [1, 2, 1]


def test_the_whole_pool_equals_one_pool_of_all_rows() -> None:
    q, c, pairs = _unit(30, 3), _unit(30, 4), np.arange(30) // 2
    ours = whole_retrieval(q, c, pairs, np.arange(30), bootstrap=20, seed=0)
    pool = evaluate_retrieval(
        lambda m: {"global": (q[m] @ c[m].T).numpy()},
        pairs,
        np.arange(30),
        pool=30,
        bootstrap=20,
        seed=0,
    )
    for direction, scores in pool["scores"]["global"].items():
        for key, estimate in scores.items():
            assert ours["scores"][direction][key]["value"] == estimate["value"]
    assert ours["chance"] == pytest.approx(pool["chance"])


def test_class_precision_equals_torchmetrics_and_names_what_is_missing() -> None:
    q, c = _unit(12, 5), _unit(40, 6)
    query_class = np.array(list("abc") * 4)
    candidate_class = np.array(list("abbc") * 10)
    found = class_precision(q, c, query_class, candidate_class, np.arange(12), bootstrap=20, seed=0)
    scores = q @ c.T
    for k in (5, 10):
        each = [
            float(
                retrieval_precision(
                    scores[i], torch.tensor(candidate_class == query_class[i]), top_k=k
                )
            )
            for i in range(12)
        ]
        assert found[f"precision@{k}"]["value"] == pytest.approx(np.mean(each))
    assert found["precision@50"]["value"] is None and "40 candidates" in str(found["precision@50"])
    assert found["chance"] == pytest.approx((0.25 + 0.5 + 0.25) / 3)
    # 10, 20 and 10 candidates of a, b and c: of 100 answers no more can be right
    assert found["best"]["precision@10"] == 1.0
    assert found["best"]["precision@50"] == pytest.approx((10 + 20 + 10) / 3 / 50)
    assert found["classes"]["b"]["candidates"] == 20


def test_broken_embeddings_are_errors() -> None:
    q = _unit(4, 7)
    broken = q.clone()
    broken[1, 1] = torch.nan
    with pytest.raises(ValueError, match="image embeddings hold NaN"):
        ranks_both_ways(broken, q, np.arange(4), np.arange(4))
    with pytest.raises(ValueError, match="text embeddings hold NaN"):
        ranks_both_ways(q, broken, np.arange(4), np.arange(4))


def test_memory_does_not_grow_with_all_pairs() -> None:
    rows, columns = large_retrieval._chunks(1_000_000, 1_000_000)
    assert 4 * rows * columns <= large_retrieval.CHUNK_BYTES
