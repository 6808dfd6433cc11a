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

from mlip.dataloading.progress import Progress
from mlip.transfer.alignment.retrieval import CUTS, DIRECTIONS, chance_recall, rank_summary
from mlip.transfer.array import Array
from mlip.transfer.measures.interval import mean_estimate, not_available, patient_resamples

CHUNK_BYTES = 16 * 2**20  # what is compared and sorted stays near the processor's caches
CHUNK_COLUMNS = 1 << 14
CLASS_CUTS = (5, 10, 50, 100)  # GLoRIA reports 5, 10, 100; ConVIRT's 8x200 set 5, 10, 50


def _chunks(queries: int, candidates: int) -> tuple[int, int]:
    """Rows of queries and candidates whose float32 scores fit in CHUNK_BYTES."""
    columns = min(candidates, CHUNK_COLUMNS)
    return max(1, min(queries, CHUNK_BYTES // (4 * columns))), columns


def first_right_ranks(
    queries: Tensor, candidates: Tensor, query_pair: Array, candidate_pair: Array
) -> tuple[Array, Array]:
    """(1-based rank of each query's best right answer, how many answers are right), [Q] each.

    Rows of equal pair are right answers for each other; ties count against the right one.

    Shapes:  queries [Q, D], candidates [N, D] unit length
    Raises:  ValueError on values that are not finite, or a query without a right answer.
    """
    rows, columns = _chunks(len(queries), len(candidates))
    for name, value in (("query", queries), ("candidate", candidates)):
        # in parts: the test's own mask of a million rows would be larger than a chunk
        if not all(bool(torch.isfinite(part).all()) for part in value.split(columns)):
            raise ValueError(f"retrieval: the {name} embeddings hold NaN or infinite values")
    # numbers of 32 bits: half of what a comparison of all pairs has to read
    _, codes = np.unique(np.concatenate([query_pair, candidate_pair]), return_inverse=True)
    pair_q, pair_c = torch.as_tensor(codes.astype(np.int32)).split([len(queries), len(candidates)])
    # all at once: results kept between chunks of scores leave holes that the next ones do not fit
    ranks = torch.ones(len(queries), dtype=torch.int64)
    right = torch.zeros(len(queries), dtype=torch.int64)
    told = Progress("queries ranked among all")
    for at in range(0, len(queries), rows):
        told(at, len(queries))
        part, pair = queries[at : at + rows], pair_q[at : at + rows]
        rank, count = ranks[at : at + rows], right[at : at + rows]
        best = torch.full((len(part),), -torch.inf)
        for over in range(0, len(candidates), columns):
            query, answer = _right(pair, pair_c[over : over + columns])
            if len(query) == 0:
                continue
            score = part @ candidates[over : over + columns].T
            best.scatter_reduce_(0, query, score[query, answer], "amax")
            count += torch.bincount(query, minlength=len(part))
        if not bool((count > 0).all()):
            raise ValueError("a query has no right answer among the candidates")
        for over in range(0, len(candidates), columns):
            score = part @ candidates[over : over + columns].T
            rank += (score >= best[:, None]).count_nonzero(dim=1)
            query, answer = _right(pair, pair_c[over : over + columns])
            also = query[score[query, answer] >= best[query]]
            rank -= torch.bincount(also, minlength=len(part))
    return ranks.numpy(), right.numpy()


def _right(pair_q: Tensor, pair_c: Tensor) -> tuple[Tensor, Tensor]:
    """Where a query and a candidate are of one pair: indices of both."""
    query, answer = (pair_q[:, None] == pair_c[None, :]).nonzero(as_tuple=True)
    return query, answer


def top_candidates(queries: Tensor, candidates: Tensor, most: int) -> Array:
    """Indices of the `most` best candidates of each query, best first, [Q, most].

    Equal scores are in the order of the candidates.
    """
    most = min(most, len(candidates))
    rows, columns = _chunks(len(queries), len(candidates))
    found = []
    told = Progress("queries of a class ranked")
    for at in range(0, len(queries), rows):
        told(at, len(queries))
        part = queries[at : at + rows]
        score = torch.empty(len(part), 0)
        index = torch.empty(len(part), 0, dtype=torch.int64)
        for over in range(0, len(candidates), columns):
            own = part @ candidates[over : over + columns].T
            place = _best_places(own, most)
            score = torch.cat([score, own.gather(1, place)], dim=1)
            index = torch.cat([index, place + over], dim=1)
            order = torch.argsort(score, dim=1, descending=True, stable=True)[:, :most]
            score, index = score.gather(1, order), index.gather(1, order)
        found.append(index)
    return torch.cat(found).numpy()


def _best_places(score: Tensor, most: int) -> Tensor:
    """The `most` best columns of each row (all where there are fewer), in ascending order.

    A selection, not a sort of everything. Where several columns share the last score it takes any
    of them; such rows are sorted in full, so that the first ones are taken.
    """
    if most >= score.shape[1]:
        return torch.arange(score.shape[1]).expand(len(score), -1)
    value, place = score.topk(most, dim=1, sorted=False)
    place = place.sort(dim=1).values
    tied = ((score >= value.amin(dim=1, keepdim=True)).count_nonzero(dim=1) > most).nonzero()[:, 0]
    if len(tied):
        whole = torch.argsort(score[tied], dim=1, descending=True, stable=True)[:, :most]
        place[tied] = whole.sort(dim=1).values
    return place


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
) -> dict[str, Any]:
    """Precision@k by class: the share of a query's first k answers that are of its class.

    Returns: {"precision@k": Estimate over queries, "chance", "classes": {name: {"precision@k",
             "queries", "candidates"}}}; a cut beyond the candidates is n/a with the reason
    Source:  GLoRIA (Huang et al. 2021, section 4.3) on CheXpert 5x200; ConVIRT's 8x200 set.
    """
    if len(queries) == 0 or len(candidates) == 0:
        return {"reason": "no row carries exactly one label"}
    top = top_candidates(queries.float(), candidates.float(), max(CLASS_CUTS))
    is_right = np.asarray(candidate_class)[top] == np.asarray(query_class)[:, None]
    weights = patient_resamples(patient_ids, bootstrap, seed)
    names = sorted(set(np.asarray(query_class).tolist()))
    result: dict[str, Any] = {"classes": {}}
    for k in CLASS_CUTS:
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
                for k in CLASS_CUTS
                if k <= len(candidates)
            },
            "queries": int(own.sum()),
            "candidates": int((candidate_class == name).sum()),
        }
    return result
