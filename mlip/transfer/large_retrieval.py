"""Retrieval among all rows at once, in chunks: ranks and class precision up to millions of texts.

Global embeddings only: a local score per pair would cost tokens x patches for each of them. No
matrix of all pairs ever exists; a chunk of scores is at most CHUNK_BYTES.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlip.transfer.interval import Array, mean_estimate, not_available, patient_resamples
from mlip.transfer.retrieval import CUTS, DIRECTIONS, chance_recall, rank_summary

CHUNK_BYTES = 256 * 2**20
CLASS_CUTS = (5, 10, 50, 100)  # GLoRIA reports 5, 10, 100; ConVIRT's 8x200 set 5, 10, 50


def _chunks(queries: int, candidates: int) -> tuple[int, int]:
    """Rows of queries and candidates whose float32 scores fit in CHUNK_BYTES."""
    columns = min(candidates, 1 << 16)
    return max(1, min(queries, CHUNK_BYTES // (4 * columns))), columns


def first_right_ranks(
    queries: Tensor, candidates: Tensor, query_pair: Array, candidate_pair: Array
) -> tuple[Array, Array]:
    """(1-based rank of each query's best right answer, how many answers are right), [Q] each.

    Rows of equal pair are right answers for each other; ties count against the right one.

    Shapes:  queries [Q, D], candidates [N, D] unit length
    Raises:  ValueError on values that are not finite, or a query without a right answer.
    """
    for name, value in (("query", queries), ("candidate", candidates)):
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"retrieval: the {name} embeddings hold NaN or infinite values")
    pair_q, pair_c = torch.as_tensor(query_pair), torch.as_tensor(candidate_pair)
    rows, columns = _chunks(len(queries), len(candidates))
    ranks, right = [], []
    for at in range(0, len(queries), rows):
        part, pair = queries[at : at + rows], pair_q[at : at + rows]
        best = torch.full((len(part),), -torch.inf)
        count = torch.zeros(len(part), dtype=torch.int64)
        for over in range(0, len(candidates), columns):
            is_right = pair[:, None] == pair_c[None, over : over + columns]
            score = part @ candidates[over : over + columns].T
            best = torch.maximum(best, score.masked_fill(~is_right, -torch.inf).amax(dim=1))
            count += is_right.sum(dim=1)
        if not bool((count > 0).all()):
            raise ValueError("a query has no right answer among the candidates")
        rank = torch.ones(len(part), dtype=torch.int64)
        for over in range(0, len(candidates), columns):
            is_right = pair[:, None] == pair_c[None, over : over + columns]
            score = part @ candidates[over : over + columns].T
            rank += ((score >= best[:, None]) & ~is_right).sum(dim=1)
        ranks.append(rank)
        right.append(count)
    return torch.cat(ranks).numpy(), torch.cat(right).numpy()


def top_candidates(queries: Tensor, candidates: Tensor, most: int) -> Array:
    """Indices of the `most` best candidates of each query, best first, [Q, most].

    Equal scores are in the order of the candidates.
    """
    most = min(most, len(candidates))
    rows, columns = _chunks(len(queries), len(candidates))
    found = []
    for at in range(0, len(queries), rows):
        part = queries[at : at + rows]
        score = torch.empty(len(part), 0)
        index = torch.empty(len(part), 0, dtype=torch.int64)
        for over in range(0, len(candidates), columns):
            own = part @ candidates[over : over + columns].T
            place = torch.arange(over, over + own.shape[1]).expand(len(part), -1)
            score, index = torch.cat([score, own], dim=1), torch.cat([index, place], dim=1)
            order = torch.argsort(score, dim=1, descending=True, stable=True)[:, :most]
            score, index = score.gather(1, order), index.gather(1, order)
        found.append(index)
    return torch.cat(found).numpy()


def whole_retrieval(
    images: Tensor,
    texts: Tensor,
    pair_id: Array,
    patient_ids: Sequence[Any] | Array,
    *,
    bootstrap: int,
    seed: int,
) -> dict[str, Any]:
    """Recall and median rank of both directions among all rows, with intervals and chance."""
    n = len(pair_id)
    if n < 2:
        return {"n": n, "scores": {}, "chance": {}}
    weights = patient_resamples(patient_ids, bootstrap, seed)
    scores, right = {}, np.zeros(0)
    for direction, (q, c) in zip(DIRECTIONS, ((images, texts), (texts, images)), strict=True):
        ranks, right = first_right_ranks(q.float(), c.float(), pair_id, pair_id)
        scores[direction] = rank_summary(ranks, weights)
    return {
        "n": n,
        "scores": scores,
        "chance": {f"recall@{k}": chance_recall(n, right, k) for k in CUTS},
    }


def class_precision(
    queries: Tensor,
    candidates: Tensor,
    query_class: Array,
    candidate_class: Array,
    patient_ids: Sequence[Any] | Array,
    *,
    bootstrap: int,
    seed: int,
    cuts: Sequence[int] = CLASS_CUTS,
) -> dict[str, Any]:
    """Precision@k by class: the share of a query's first k answers that are of its class.

    Returns: {"precision@k": Estimate over queries, "chance", "classes": {name: {"precision@k",
             "queries", "candidates"}}}; a cut beyond the candidates is n/a with the reason
    Source:  GLoRIA (Huang et al. 2021, section 4.3) on CheXpert 5x200; ConVIRT's 8x200 set.
    """
    if len(queries) == 0 or len(candidates) == 0:
        return {"reason": "no row carries exactly one label"}
    top = top_candidates(queries.float(), candidates.float(), max(cuts))
    is_right = np.asarray(candidate_class)[top] == np.asarray(query_class)[:, None]
    weights = patient_resamples(patient_ids, bootstrap, seed)
    names = sorted(set(np.asarray(query_class).tolist()))
    result: dict[str, Any] = {"classes": {}}
    for k in cuts:
        result[f"precision@{k}"] = (
            mean_estimate(is_right[:, :k].mean(axis=1), weights)
            if k <= len(candidates)
            else not_available(f"there are {len(candidates)} candidates", len(queries))
        )
    shares = {name: float((candidate_class == name).mean()) for name in names}
    result["chance"] = float(np.mean([shares[name] for name in np.asarray(query_class).tolist()]))
    for name in names:
        own = np.asarray(query_class) == name
        result["classes"][name] = {
            **{
                f"precision@{k}": float(is_right[own, :k].mean())
                for k in cuts
                if k <= len(candidates)
            },
            "queries": int(own.sum()),
            "candidates": int((candidate_class == name).sum()),
        }
    return result
