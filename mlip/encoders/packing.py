"""Rows of a padded batch without its padding, and back: towers compute real tokens only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """Where the n real tokens of B texts lie in a padded batch of B x T.

    Cost:    reports half as long as the longest leave half of the tower's linear layers out; on a
             GPU one wait, for n, where the host does not know it
    Source:  ours; the sequence of sequences of variable-length attention, with attention itself
             padded again where its implementation knows no such thing
    """

    mask: Tensor  # [B, T] bool, True = real token
    index: Tensor  # [n] int64, positions in the flattened [B * T]
    offsets: Tensor  # [B + 1] int64: text b has the rows from offsets[b] to before offsets[b + 1]
    row: Tensor  # [B * T] int64, the row of a real token; of padding, that of one before it

    @classmethod
    def of(cls, mask: Tensor, real: int | None = None) -> Packing:
        """Of mask [B, T], with n where the host knows it."""
        flat, ends = mask.flatten(), mask.sum(1).cumsum(0)
        index = flat.nonzero() if real is None else torch.nonzero_static(flat, size=real)
        row = (flat.cumsum(0) - 1).clamp_min(0)
        return cls(mask, index.squeeze(1), F.pad(ends, (1, 0)), row)

    def positions(self) -> Tensor:
        """The place of each token in its own text, [1, n] int64."""
        return (self.index % self.mask.shape[1]).unsqueeze(0)

    def pack(self, padded: Tensor) -> Tensor:
        """Shapes:  [B, T, ...] -> [1, n, ...]"""
        return padded.flatten(0, 1).index_select(0, self.index).unsqueeze(0)

    def unpack(self, packed: Tensor) -> Tensor:
        """Shapes:  [1, n, ...] -> [B, T, ...], zero where there was padding"""
        batch, tokens = self.mask.shape
        padded = packed.new_zeros(batch * tokens, *packed.shape[2:])
        return padded.index_copy(0, self.index, packed.squeeze(0)).unflatten(0, (batch, tokens))

    def unpack_heads(self, packed: Tensor) -> Tensor:
        """For attention under `attention_mask`: padding has values of some real token, which no
        query sees, and gives no gradient.

        Shapes:  [1, heads, n, d] -> [B, heads, T, d]
        """
        rows = _Spread.apply(packed.transpose(1, 2).squeeze(0), self.row, self.index)
        return rows.unflatten(0, tuple(self.mask.shape)).transpose(1, 2)

    def attention_mask(self) -> Tensor:
        """Which keys each query may see, [B, 1, 1, T] bool."""
        return self.mask[:, None, None, :]


class _Spread(torch.autograd.Function):
    """rows[row], whose gradient is taken at index alone: one pass over memory each way."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, row: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        return rows.index_select(0, row)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (index,) = ctx.saved_tensors
        return grads[0].index_select(0, index), None, None
