"""Tokens and entities of a batch of reports, put together in whole-array steps, and the draws by
which sentences are dropped.

At a tenth of the time of one report after another (20 us each, tests/dataloading/report_oracle.py).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mlip.dataloading.keyed_draws import keyed_draws
from mlip.dataloading.reports.encoder import EncodedReport, ReportEncoder

MAX_SUBSET_BITS = 48  # a float64 uniform has 53 random bits
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]


class ReportBatch(NamedTuple):
    """What a Batch holds of its reports."""

    token_ids: IntArray  # [B, T] padded, with [CLS] and [SEP]
    token_mask: BoolArray  # [B, T]
    content_mask: BoolArray  # [B, T] neither padding nor [CLS] nor [SEP]
    entities: IntArray  # [B, K, 2] concept row and state, each pair once, in text order; K >= 1
    entity_mask: BoolArray  # [B, K]

    def tensors(self) -> dict[str, Tensor]:
        """By the names of Batch's fields."""
        arrays = {
            **{"token_ids": self.token_ids, "token_mask": self.token_mask},
            "content_mask": self.content_mask,
            "entity_ids": np.ascontiguousarray(self.entities[:, :, 0]),
            "entity_state": np.ascontiguousarray(self.entities[:, :, 1]),
            "entity_mask": self.entity_mask,
        }
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


def draw_sentences(
    seed: int,
    epoch: NDArray[np.int64],
    global_index: NDArray[np.int64],
    probability: float,
) -> NDArray[np.float64]:
    """Two uniform numbers a sample: [B, 2], the second -1 where no sentence is dropped."""
    draws = keyed_draws(seed, "sentences", epoch, global_index, 2)
    draws[draws[:, 0] >= probability, 1] = -1.0
    return draws


def compose_batch(
    encoder: ReportEncoder, reports: list[EncodedReport], draws: NDArray[np.float64]
) -> ReportBatch:
    """Token ids and entities of the kept sentences, cut to the encoder's limits.

    A draw in [0, 1) chooses uniformly among the non-empty subsets of a report's sentences; those
    beyond the 48th are always kept: they are past the token limit in practice. A mention whose
    first token is cut off leaves with it.
    Shapes:  draws [B] float64, negative where every sentence is kept
    """
    count = len(reports)
    ends, sentences = _joined([report.ends for report in reports])
    owner = np.repeat(np.arange(count), sentences)
    first = np.cumsum(sentences) - sentences  # each report's first sentence
    lengths = np.diff(ends, prepend=0)
    is_first = first[sentences > 0]
    lengths[is_first] = ends[is_first]
    kept = _kept(draws, sentences, owner, first)
    taken = _cut(np.where(kept, lengths, 0), owner, first, encoder.max_tokens - 2)

    ids, _ = _joined([report.ids for report in reports])
    starts = np.cumsum(lengths) - lengths
    within = np.arange(len(ids)) - np.repeat(starts, lengths)
    ids = ids[within < np.repeat(taken, lengths)]
    used = np.bincount(owner, taken, count).astype(np.int64)
    longest = int(used.max(initial=0)) + 2
    place = np.arange(longest)
    token_mask = place < used[:, None] + 2
    content_mask = (place > 0) & (place < used[:, None] + 1)
    token_ids = np.full((count, longest), encoder.tokenizer.pad_id, dtype=np.int64)
    token_ids[content_mask] = ids
    token_ids[:, 0] = encoder.tokenizer.cls_id
    token_ids[np.arange(count), used + 1] = encoder.tokenizer.sep_id
    entities, entity_mask = _entities(reports, first, taken, encoder.max_entities)
    return ReportBatch(token_ids, token_mask, content_mask, entities, entity_mask)


def _joined(parts: list[NDArray[np.int32]]) -> tuple[IntArray, IntArray]:
    """All parts as one array, and their lengths."""
    lengths = np.array([len(part) for part in parts], dtype=np.int64)
    if not parts:
        return np.zeros(0, dtype=np.int64), lengths
    return np.concatenate(parts).astype(np.int64), lengths


def _kept(
    draws: NDArray[np.float64], sentences: IntArray, owner: IntArray, first: IntArray
) -> BoolArray:
    """Which of all sentences stay."""
    bits = np.minimum(sentences, MAX_SUBSET_BITS)
    # 2^48 - 1 and less are exact in float64: the same product as with whole numbers
    subset = 1 + (draws * (np.left_shift(1, bits) - 1)).astype(np.int64)
    number = np.arange(len(owner)) - first[owner]
    chosen = subset[owner] >> np.minimum(number, MAX_SUBSET_BITS - 1) & 1
    whole = (draws < 0.0) | (sentences < 2)
    return (chosen == 1) | (number >= MAX_SUBSET_BITS) | whole[owner]


def _cut(lengths: IntArray, owner: IntArray, first: IntArray, room: int) -> IntArray:
    """Tokens taken of each sentence where a report has room for so many."""
    before = np.cumsum(lengths) - lengths
    if len(before):
        begin = before[np.minimum(first, len(before) - 1)]
        before = before - begin[owner]
    return np.clip(room - before, 0, lengths)


def _entities(
    reports: list[EncodedReport], first: IntArray, taken: IntArray, most: int
) -> tuple[IntArray, BoolArray]:
    count = len(reports)
    numbers = np.array([len(report.mentions) for report in reports], dtype=np.int64)
    if not numbers.any():
        # at least one column: a batch without any mention keeps the shapes of all others
        return np.zeros((count, 1, 2), dtype=np.int64), np.zeros((count, 1), dtype=np.bool_)
    mentions = np.concatenate([report.mentions for report in reports]).astype(np.int64)
    owner = np.repeat(np.arange(count), numbers)
    # a mention whose first token is cut off leaves with it
    seen = mentions[:, 1] < taken[first[owner] + mentions[:, 0]]
    owner, pairs = owner[seen], mentions[seen, 2:]
    # each pair of a report once, where it stands first
    span = 1 + pairs.max(axis=0, initial=0)
    _, places = np.unique((owner * span[0] + pairs[:, 0]) * span[1] + pairs[:, 1], True)
    places.sort()
    owner, pairs = owner[places], pairs[places]
    found = np.bincount(owner, minlength=count)
    number = np.arange(len(owner)) - (np.cumsum(found) - found)[owner]
    inside = number < most
    found = np.minimum(found, most)
    entities = np.zeros((count, max(1, int(found.max())), 2), dtype=np.int64)
    entities[owner[inside], number[inside]] = pairs[inside]
    return entities, np.arange(entities.shape[1]) < found[:, None]
