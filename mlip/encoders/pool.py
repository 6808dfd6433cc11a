"""Attention pooling: rows of a tower -> one vector."""

from __future__ import annotations

import torch
import torch.nn as nn
from torch import Tensor


class AttentionPool(nn.Module):
    """A learned softmax per head over the real rows: [B, R, C], mask [B, R] -> [B, C].

    A finding fills few patches and few words: a plain mean dilutes it by their number, and a
    [CLS] vector of a tower from scratch first has to learn to look at anything.
    Source:  multi-head attention pooling with a fixed query (Lee et al. 2019, Set Transformer).
    """

    def __init__(self, channels: int, heads: int = 8) -> None:
        super().__init__()
        if channels % heads:
            raise ValueError(
                f"attention pooling: {heads} heads do not divide {channels} channels; change the "
                "tower's width, or of an image tower model.vision.pool_heads"
            )
        self.heads = heads
        self.score = nn.Linear(channels, heads)
        self.value = nn.Linear(channels, channels)

    def forward(self, rows: Tensor, mask: Tensor | None = None) -> Tensor:
        scores_BRH = self.score(rows).float()
        if mask is not None:
            scores_BRH = scores_BRH.masked_fill(~mask.unsqueeze(-1), -torch.inf)
        weights_BRH = torch.softmax(scores_BRH, dim=1).to(rows.dtype)
        value_BRHC = self.value(rows).unflatten(-1, (self.heads, -1))
        return (weights_BRH.unsqueeze(-1) * value_BRHC).sum(dim=1).flatten(1)
