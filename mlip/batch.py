"""What travels between loader, model and losses: Batch, ImageFeatures, TextFeatures.

Legend of shapes for the whole project: B pairs on this rank, N pairs on all ranks, P patches,
T tokens, K entities of a report, D embedding size, C channels, H W pixels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

PRESENT, ABSENT, UNCERTAIN = 0, 1, 2  # values of Batch.entity_state
STATES = ("present", "absent", "uncertain")  # what these are called, in their order


@dataclass(frozen=True)
class Batch:
    """One rank's share of a global batch: a slice of the global order, ranks in rank order."""

    # [B, C, H, W] float32, normalised with data.mean and data.std; C may be a view of one channel
    image: Tensor
    token_ids: Tensor  # [B, T] int64, padded with the tokenizer's [PAD]
    token_mask: Tensor  # [B, T] bool, True = real token, [CLS] and [SEP] included
    content_mask: Tensor  # [B, T] bool, as token_mask without [CLS] and [SEP]
    entity_ids: Tensor  # [B, K] int64, row of the concept table; 0 where masked
    entity_state: Tensor  # [B, K] int64, PRESENT, ABSENT or UNCERTAIN
    entity_mask: Tensor  # [B, K] bool, True = real mention
    pair_id: Tensor  # [B] int64: equal = same study or same text, never each other's negatives
    global_index: Tensor  # [B] int64, position in the run's endless global order: keys all noise
    row_index: Tensor  # [B] int64, row of the manifest
    # [B] int64, always on the host: real tokens of each report, for what must know their number
    # without waiting for a GPU; None = not counted
    token_counts: Tensor | None = None

    def __len__(self) -> int:
        return int(self.image.shape[0])

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on a device; its tokens are counted while they are on the host."""
        moved = self.each(lambda tensor: tensor.to(device, non_blocking=True))
        if self.token_mask.device.type != "cpu":
            return moved
        return dataclasses.replace(moved, token_counts=self.token_mask.sum(1))

    def each(self, move: Callable[[Tensor], Tensor]) -> Batch:
        """The same batch with every tensor moved but the counts, which stay on the host."""
        stay = ("image", "token_counts")
        names = [f.name for f in dataclasses.fields(self) if f.name not in stay]
        moved = {name: move(getattr(self, name)) for name in names}
        return Batch(image=by_channel(self.image, move), token_counts=self.token_counts, **moved)


def by_channel(image: Tensor, move: Callable[[Tensor], Tensor]) -> Tensor:
    """move(image); where the channels of a grey image are one tensor seen C times, that one moves.

    Shapes:  image [B, C, H, W] -> [B, C, H, W]
    """
    if image.shape[1] > 1 and image.stride(1) == 0:
        return move(image[:, :1]).expand_as(image)
    return move(image)


@dataclass(frozen=True)
class ImageFeatures:
    """What the image side gives the losses; unit length where it says so."""

    embedding: Tensor  # [B, D] unit length, global head
    patches: Tensor  # [B, P, D] local head, not normalised
    grid: tuple[int, int]  # rows, columns of the P patches


@dataclass(frozen=True)
class TextFeatures:
    embedding: Tensor  # [B, D] unit length, global head
    tokens: Tensor  # [B, T, D] local head, not normalised; rows outside content_mask unused
    attention: Tensor | None = None  # [B, T] last layer's [CLS] -> token attention, detached


@dataclass(frozen=True)
class KnowledgeFeatures:
    """A batch's linked entities after the trainable projection."""

    entities: Tensor  # [B, K, D] with the state's embedding added, not normalised
    mask: Tensor  # [B, K] bool
    row_weights: Tensor  # [B, K] float32 >= 0, by state (config.knowledge.weight_*)
    present_mean: Tensor  # [B, D] unit length mean of present entities, zero where none
    has_present: Tensor  # [B] bool


@dataclass(frozen=True)
class Features:
    image: ImageFeatures
    text: TextFeatures
    knowledge: KnowledgeFeatures
