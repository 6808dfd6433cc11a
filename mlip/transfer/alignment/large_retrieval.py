"""Retrieval among all rows at once, in chunks: ranks and class precision up to millions of texts.

Global embeddings only: a local score per pair would cost tokens x patches for each of them. No
matrix of all pairs ever exists; a chunk of scores is at most CHUNK_BYTES.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mlip.dataloading.progress import Progress
from mlip.transfer.alignment.retrieval import CUTS, DIRECTIONS, chance_recall, rank_summary
from mlip.transfer.array import Array
from mlip.transfer.measures.interval import mean_estimate, not_available, patient_resamples

CHUNK_BYTES = 16 * 2**20  # what is compared and sorted stays near the processor's caches
CHUNK_COLUMNS = 1 << 14
TIE = 1e-6  # what float32 products of unit vectors do not tell apart
CLASS_CUTS = (5, 10, 50, 100)  # GLoRIA reports 5, 10, 100; ConVIRT's 8x200 set 5, 10, 50


def _chunks(queries: int, candidates: int) -> tuple[int, int]:
    """Rows of queries and candidates whose float32 scores fit in CHUNK_BYTES."""
    columns = min(candidates, CHUNK_COLUMNS)
    return max(1, min(queries, CHUNK_BYTES // (4 * columns))), columns


class Ranked(NamedTuple):
    """Of each query the 1-based rank of its best right answer, and how many answers are right.

    A query without a right answer has the rank behind all candidates.
    """

    rank: Array
    right: Array


def ranks_both_ways(
    images: Tensor, texts: Tensor, image_pair: Array, text_pair: Array
) -> tuple[Ranked, Ranked]:
    """Images as queries among all texts, and texts among all images, by one product of both.

    Rows of equal pair are right answers for each other; ties count against the right one, and
    scores within TIE are tied.

    Shapes:  images [I, D], texts [T, D] unit length; ranks [I] and [T]
    Raises:  ValueError on values that are not finite.
    """
    rows, columns = _chunks(len(images), len(texts))
    for name, value in (("image", images), ("text", texts)):
        # in parts: the test's own mask of a million rows would be larger than a chunk
        if not all(bool(torch.isfinite(part).all()) for part in value.split(columns)):
            raise ValueError(f"retrieval: the {name} embeddings hold NaN or infinite values")
    _, codes = np.unique(np.concatenate([image_pair, text_pair]), return_inverse=True)
    code_i, code_t = codes[: len(images)], codes[len(images) :]
    count_i, count_t = (np.bincount(code, minlength=codes.max() + 1) for code in (code_i, code_t))
    low_i, low_t = _best_right(images, texts, code_i, code_t)
    # all at once: results kept between chunks of scores leave holes that the next ones do not fit
    rank_i = torch.ones(len(images), dtype=torch.int64)
    rank_t = torch.ones(len(texts), dtype=torch.int64)
    pair = torch.as_tensor(code_i)
    blocks = [
        (slice(at, at + columns), *part.sort(stable=True))
        for at, part in zip(
            range(0, len(texts), columns), torch.as_tensor(code_t).split(columns), strict=True
        )
    ]
    told = Progress("images and texts ranked among all")
    for at in range(0, len(images), rows):
        told(at, len(images))
        part = slice(at, at + rows)
        low = low_i[part]
        for over, code, place in blocks:
            score = images[part] @ texts[over].T
            rank_i[part] += (score >= low[:, None]).count_nonzero(dim=1)
            rank_t[over] += (score >= low_t[over]).count_nonzero(dim=0)
            image, text = _right(pair[part], code, place)
            own = score[image, text]
            rank_i[part] -= torch.bincount(image[own >= low[image]], minlength=len(low))
            rank_t[over] -= torch.bincount(text[own >= low_t[over][text]], minlength=len(place))
    return (
        Ranked(rank_i.numpy(), count_t[code_i]),
        Ranked(rank_t.numpy(), count_i[code_t]),
    )


def _best_right(
    images: Tensor, texts: Tensor, code_i: Array, code_t: Array
) -> tuple[Tensor, Tensor]:
    """From which score on an answer stands before the best right one or is tied with it.

    Pairs of one image and one text, most of them as a rule, are multiplied as they are; others by
    group, so that a right answer costs one product however many share a pair.
    """
    low_i = torch.full((len(images),), -torch.inf)
    low_t = torch.full((len(texts),), -torch.inf)
    both = np.intersect1d(code_i, code_t)
    order_i, from_i, to_i = _groups(code_i, both)
    order_t, from_t, to_t = _groups(code_t, both)
    single = (to_i - from_i == 1) & (to_t - from_t == 1)
    slices = max(1, CHUNK_BYTES // (8 * images.shape[1]))
    ones = order_i[from_i[single]].split(slices), order_t[from_t[single]].split(slices)
    for i, t in zip(*ones, strict=True):
        low_i[i] = low_t[t] = (images[i] * texts[t]).sum(dim=1)
    for group in np.flatnonzero(~single):
        t = order_t[from_t[group] : to_t[group]]
        own = order_i[from_i[group] : to_i[group]]
        for i in own.split(max(1, CHUNK_BYTES // (4 * len(t)))):
            score = images[i] @ texts[t].T
            low_i[i] = score.amax(dim=1)
            low_t[t] = torch.maximum(low_t[t], score.amax(dim=0))
    return low_i - TIE, low_t - TIE


def _groups(code: Array, of: Array) -> tuple[Tensor, Array, Array]:
    """Rows by their code, and where in that order those of each of `of` begin and end."""
    order = np.argsort(code, kind="stable")
    by_code = code[order]
    first, behind = np.searchsorted(by_code, of, "left"), np.searchsorted(by_code, of, "right")
    return torch.as_tensor(order), first, behind


def _right(pair: Tensor, code: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
    """Where an image and a text are of one pair: indices of both; `code` sorted, from `place`."""
    first = torch.searchsorted(code, pair)
    count = torch.searchsorted(code, pair, right=True) - first
    image = torch.repeat_interleave(torch.arange(len(pair)), count)
    within = torch.arange(len(image)) - (count.cumsum(0) - count)[image]
    return image, place[first[image] + within]


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
    ranked = ranks_both_ways(images.float(), texts.float(), pair_id, pair_id)
    return {
        "n": n,
        "scores": {
            direction: rank_summary(of.rank, weights)
            for direction, of in zip(DIRECTIONS, ranked, strict=True)
        },
        "chance": {f"recall@{k}": chance_recall(n, ranked[0].right, k) for k in CUTS},
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

    Returns: {"precision@k": Estimate over queries, "chance", "best": {"precision@k": what a perfect
             order would give, below 1 where a class has fewer than k candidates}, "classes": {name:
             {"precision@k", "queries", "candidates"}}}; a cut beyond the candidates is n/a with
             the reason
    Source:  GLoRIA (Huang et al. 2021, section 4.3) on CheXpert 5x200; ConVIRT's 8x200 set.
    """
    if len(queries) == 0 or len(candidates) == 0:
        return {"reason": "no row carries exactly one label"}
    top = top_candidates(queries.float(), candidates.float(), max(CLASS_CUTS))
    is_right = candidate_class[top] == query_class[:, None]
    weights = patient_resamples(patient_ids, bootstrap, seed)
    result: dict[str, Any] = {"classes": {}}
    for k in CLASS_CUTS:
        result[f"precision@{k}"] = (
            mean_estimate(is_right[:, :k].mean(axis=1), weights)
            if k <= len(candidates)
            else not_available(f"there are {len(candidates)} candidates", len(queries))
        )
    names, of = np.unique(query_class, return_inverse=True)
    share = np.array([float((candidate_class == name).mean()) for name in names])[of]
    result["chance"] = float(np.mean(share))
    result["best"] = {
        f"precision@{k}": float(np.minimum(1.0, share * len(candidates) / k).mean())
        for k in CLASS_CUTS
    }
    for name in names.tolist():
        own = query_class == name
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
