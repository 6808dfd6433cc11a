"""What every loss is given: features, batch, noise keys, and gathered things computed once.

Gathering is lazy and shared. Whether a loss asks for something depends on the settings alone, never
on data, so that all ranks take part in the same collectives in the same order.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, Protocol

import torch
import torch.nn as nn
from torch import Tensor

from mlip.batch import PRESENT, Batch, Features
from mlip.ranks.distributed import gather_rows, rank, row_counts, sum_over_ranks, world_group

_HASH_FACTOR = 6364136223846793005  # odd multiplier of Knuth's MMIX generator (TAOCP 2, 3.3.4)


class Scales(Protocol):
    """The learned scales that losses read (mlip.model.Scales)."""

    def logit_scale(self) -> Tensor: ...

    def logit_scale_local(self) -> Tensor: ...


class LossContext:
    """One step's inputs of the losses.

    Shapes:  features and batch hold this rank's B pairs; names ending in _N or _all hold the N
             pairs of all ranks in rank order
    """

    def __init__(
        self,
        features: Features,
        batch: Batch,
        *,
        scales: Scales,
        seed: int,
        step: int,
        progress: float,
        local_scores: Callable[[Any], Tensor],  # of a group's ranks
    ) -> None:
        self.features = features
        self.batch = batch
        self.scales = scales
        self.seed = seed
        self.step = step
        self.progress = progress  # epochs done, a fraction included
        self.prepared: dict[nn.Module, Any] = {}  # what a loss's `prepare` made of this step
        self.regularisers: dict[str, Tensor] = {}  # terms of weight 1 that a loss adds by itself
        self._local_scores = local_scores

    @property
    def group(self) -> Any:
        return world_group()

    @cached_property
    def local_scores(self) -> Tensor:
        """Token-knowledge-patch scores of own images with all texts, [B, N]."""
        return self._local_scores(self.group)

    @cached_property
    def counts(self) -> list[int]:
        """Pairs of each rank."""
        return row_counts(len(self.batch), self.batch.pair_id.device)

    @property
    def first(self) -> int:
        """Where this rank's pairs start among all."""
        return sum(self.counts[: rank()])

    @property
    def own(self) -> slice:
        return slice(self.first, self.first + len(self.batch))

    @cached_property
    def text_valid(self) -> Tensor:
        """[B] bool: the report has a token, or an entity that is a row of the local score."""
        knowledge = self.features.knowledge
        has_entity = (knowledge.mask & (knowledge.row_weights > 0)).any(dim=1)
        return self.batch.content_mask.any(dim=1) | has_entity

    @cached_property
    def _keys_N(self) -> Tensor:
        keys = [
            self.batch.pair_id,
            self.batch.global_index,
            present_set_hash(self.batch),
            self.text_valid.long(),
            self.features.knowledge.has_present.long(),
        ]
        return gather_rows(torch.stack(keys, dim=1), self.counts)

    @property
    def pair_id_N(self) -> Tensor:
        return self._keys_N[:, 0]

    @property
    def global_index_N(self) -> Tensor:
        return self._keys_N[:, 1]

    @property
    def present_set_N(self) -> Tensor:
        return self._keys_N[:, 2]

    @property
    def text_valid_N(self) -> Tensor:
        return self._keys_N[:, 3].bool()

    @property
    def has_present_N(self) -> Tensor:
        return self._keys_N[:, 4].bool()

    @cached_property
    def views_all(self) -> Tensor:
        """Image, text and present-entity vectors of all ranks without gradient, [3, N, D]."""
        features = self.features
        views = [
            features.image.embedding,
            features.text.embedding,
            features.knowledge.present_mean,
        ]
        width = max((v.dtype for v in views), key=lambda dtype: torch.finfo(dtype).bits)
        stacked = torch.stack([v.detach().to(width) for v in views], dim=1)
        return gather_rows(stacked, self.counts).transpose(0, 1)

    @cached_property
    def text_embedding_all(self) -> Tensor:
        """[N, D], differentiable."""
        return gather_rows(self.features.text.embedding, self.counts)

    @cached_property
    def partner_allowed(self) -> Tensor:
        """[B, N] bool: pairs that may be drawn as a wrong partner.

        Never the same pair_id, never the same set of present entities, never an empty report.
        """
        own = self.own
        same_pair = self.pair_id_N[own, None] == self.pair_id_N[None, :]
        same_set = self.present_set_N[own, None] == self.present_set_N[None, :]
        return ~same_pair & ~same_set & self.text_valid_N[None, :]

    @cached_property
    def has_partner(self) -> Tensor:
        """[B] bool: the sample has a report and at least one possible wrong partner."""
        return self.text_valid & self.partner_allowed.any(dim=1)


def present_set_hash(batch: Batch) -> Tensor:
    """A 64-bit hash of each report's set of present concepts: order and repeats do not matter.

    Shapes:  -> [B] int64; the empty set is 0
    Source:  ours; two different sets collide with probability about 2^-64.
    """
    is_present = batch.entity_mask & (batch.entity_state == PRESENT)
    ids = torch.where(is_present, batch.entity_ids, -1).sort(dim=1).values
    repeats = torch.zeros_like(is_present)
    repeats[:, 1:] = ids[:, 1:] == ids[:, :-1]
    word = torch.where(repeats | (ids < 0), 0, ids + 1)
    # one word a concept, mixed by odd multiplications and shifts, then summed: no order left
    word = word * _HASH_FACTOR
    word = (word ^ (word >> 29)) * _HASH_FACTOR
    word = (word ^ (word >> 32)) * _HASH_FACTOR
    return word.sum(dim=1)


def mean_over_ranks(value: Tensor, is_counted: Tensor) -> Tensor:
    """The mean of the counted values of all ranks; 0 with zero gradients where none is counted.

    Shapes:  value [...], is_counted [...] bool -> scalar in float32 or better
    """
    value = value if value.dtype == torch.float64 else value.float()
    kept = value.masked_fill(~is_counted, 0.0).sum()
    total, count = sum_over_ranks(torch.stack([kept, is_counted.sum().to(kept.dtype)]))
    return total / count.detach().clamp_min(1.0)
