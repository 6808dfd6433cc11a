"""Image-report retrieval in both directions, inside pools of a fixed size.

A pool's size decides how hard retrieval is, so it is fixed (evaluate.retrieval_pool) and stated
with the score. Rows of equal pair_id are all right answers for each other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mlip.dataloading.progress import Progress
from mlip.transfer.array import Array
from mlip.transfer.measures.interval import (
    AT_ONCE,
    estimate,
    mean_estimate,
    not_available,
    patient_resamples,
    patients_in,
)
from mlip.transfer.measures.predictions import KeepMarks

CUTS = (1, 5, 10)
# five patients lie on one side of their median once in 16 times: no interval from them holds 95 %
FEWEST_FOR_MEDIAN = 6
DIRECTIONS = ("image_to_text", "text_to_image")
AMONG = " among "  # between the direction and the pool's size, in the name of what was asked


def make_pools(rows: int, size: int, seed: int) -> list[Array]:
    """Disjoint random pools of exactly `size` rows; one pool of all rows where there are fewer."""
    order = np.random.default_rng(seed).permutation(rows)
    if rows <= size:
        return [order] if rows else []
    return [order[i : i + size] for i in range(0, rows - size + 1, size)]


def first_right_rank(scores: Array, query_pair: Array, candidate_pair: Array) -> Array:
    """1-based rank of each query's best right answer [Q] for scores [Q, C].

    Ties count against the right answer: features collapsed to one point score as the worst, not
    as perfect.
    """
    right = query_pair[:, None] == candidate_pair[None, :]
    if not right.any(axis=1).all():
        raise ValueError("a query has no right answer among the candidates")
    best = np.where(right, scores, -np.inf).max(axis=1, keepdims=True)
    return 1 + ((scores >= best) & ~right).sum(axis=1)


def chance_recall(candidates: int, right: Array, cut: int) -> float:
    """Mean probability that a random order puts a right answer among the first `cut`."""
    miss = np.ones(len(right))
    for i in range(min(cut, candidates)):
        miss *= np.clip(candidates - right - i, 0, None) / (candidates - i)
    return float(np.mean(1.0 - miss)) if len(right) else 0.0


def evaluate_retrieval(
    score_matrices: Callable[[Array], Mapping[str, Array]],
    pair_id: Array,
    patient_ids: Sequence[Any] | Array,
    *,
    pool: int,
    bootstrap: int,
    seed: int,
    keep: KeepMarks | None = None,
) -> dict[str, Any]:
    """Recall@1/5/10 and median rank for each score and direction, with intervals and chance.

    score_matrices(rows) gives {name: [n, n]}, images down and texts across, for the rows of one
    pool; `keep` gets what is right of each query.
    Returns {"pool", "pools", "n", "left_out", "scores": {name: {direction: {...}}}}.
    """
    rows = len(pair_id)
    pools = make_pools(rows, pool, seed)
    if not pools or len(pools[0]) < 2:
        return {"pool": 0, "pools": 0, "n": 0, "left_out": rows, "scores": {}, "chance": {}}
    ranks, right = _ranks_in_pools(score_matrices, pools, pair_id)
    members = np.concatenate(pools)
    weights = patient_resamples(np.asarray(patient_ids)[members], bootstrap, seed)
    size = len(pools[0])
    if keep is not None:
        for name, both in ranks.items():
            for direction, rank in both.items():
                for k in CUTS:
                    what = f"{direction.replace('_', ' ')}{AMONG}{size}"
                    keep(name, what, f"recall@{k}", members, (rank <= k).astype(np.float64))
    return {
        "pool": size,
        "pools": len(pools),
        "n": len(members),
        "left_out": rows - len(members),
        "chance": {f"recall@{k}": chance_recall(size, right, k) for k in CUTS},
        "scores": {
            name: {d: rank_summary(both[d], weights) for d in DIRECTIONS}
            for name, both in ranks.items()
        },
    }


def _ranks_in_pools(
    score_matrices: Callable[[Array], Mapping[str, Array]], pools: Sequence[Array], pair_id: Array
) -> tuple[dict[str, dict[str, Array]], Array]:
    """({score: {direction: first_right_rank}}, how many answers are right), of the rows of all
    pools."""
    ranks: dict[str, dict[str, list[Array]]] = {}
    right: list[Array] = []
    told = Progress("pools ranked")
    for done, members in enumerate(pools):
        told(done, len(pools))
        pairs = pair_id[members]
        right.append((pairs[:, None] == pairs[None, :]).sum(axis=1))
        for name, matrix in score_matrices(members).items():
            if not np.isfinite(matrix).all():
                raise ValueError(f"retrieval: the {name} scores hold NaN or infinite values")
            both = ranks.setdefault(name, {d: [] for d in DIRECTIONS})
            both["image_to_text"].append(first_right_rank(matrix, pairs, pairs))
            both["text_to_image"].append(first_right_rank(matrix.T, pairs, pairs))
    joined = {
        name: {d: np.concatenate(both[d]) for d in DIRECTIONS} for name, both in ranks.items()
    }
    return joined, np.concatenate(right)


def rank_summary(ranks: Array, weights: Array) -> dict[str, Any]:
    """Recall at each cut and the median rank, with intervals; weights [R, queries].

    The median of fewer than FEWEST_FOR_MEDIAN patients has none: where all ranks are 1 it would be
    1 to 1, as if no other patient could tell otherwise.
    """
    summary: dict[str, Any] = {
        f"recall@{k}": mean_estimate((ranks <= k).astype(np.float64), weights) for k in CUTS
    }
    if len(ranks) == 0:
        return {**summary, "median_rank": not_available("no rows")}
    order = np.argsort(ranks, kind="stable")
    medians = np.full(len(weights), np.nan)
    for first in range(0, len(weights), AT_ONCE):
        reached = np.cumsum(weights[first : first + AT_ONCE][:, order], axis=1)
        middle = (reached >= reached[:, -1:] / 2.0).argmax(axis=1)
        # a resample without weight (there is one patient) has no median
        found = np.where(reached[:, -1] > 0, ranks[order][middle], np.nan)
        medians[first : first + AT_ONCE] = found
    units = patients_in(weights)
    median = estimate(float(np.median(ranks)), medians, len(ranks), units)
    if units < FEWEST_FOR_MEDIAN:
        few = f"fewer than {FEWEST_FOR_MEDIAN} patients"
        median = {**median, "low": None, "high": None, "reason": few}
    summary["median_rank"] = median
    return summary
