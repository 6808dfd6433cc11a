"""Projection heads: tower width -> embed_dim, for vectors [B, d] and for rows [B, R, d]."""

from __future__ import annotations

import torch.nn as nn
from torch import Tensor

from mlip.encoders.normalisation import SynchronisedBatchNorm
from mlip.settings.config import Heads


class RowBatchNorm(nn.Module):
    """BatchNorm over the real rows of [B, R, d] or [B, d] of all ranks; masked rows become zero."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = SynchronisedBatchNorm(width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        # by running statistics no row depends on another: none is picked, a graph has one size
        picks = mask is not None and self.training
        rows = x[mask] if picks else x.flatten(0, -2)
        rows = self.norm(rows[:, :, None, None])[:, :, 0, 0]
        if picks:
            out = rows.new_zeros(x.shape)
            out[mask] = rows
            return out
        rows = rows.view_as(x)
        return rows if mask is None else rows.masked_fill(~mask.unsqueeze(-1), 0.0)


class ProjectionHead(nn.Module):
    """Linear - norm - GELU - Linear.

    Shapes:  [B, d] or [B, R, d] with mask [B, R] (used by the batch norm only) -> last dim `out`
    Source:  MGCA's two-layer heads; LayerNorm in between is ours (exact over micro-batches).
    """

    def __init__(self, width: int, out: int, settings: Heads) -> None:
        super().__init__()
        self.first = nn.Linear(width, settings.hidden)
        self.norm: nn.Module = (
            nn.LayerNorm(settings.hidden)
            if settings.norm == "layer"
            else RowBatchNorm(settings.hidden)
        )
        self.activation = nn.GELU()
        self.second = nn.Linear(settings.hidden, out)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        hidden = self.first(x)
        if isinstance(self.norm, RowBatchNorm):
            hidden = self.norm(hidden, mask)
        else:
            hidden = self.norm(hidden)
        return self.second(self.activation(hidden))
