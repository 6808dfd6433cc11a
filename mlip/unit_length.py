"""Rows scaled to unit length, as every level of the method defines it."""

from __future__ import annotations

import torch
from torch import Tensor

ZERO_LENGTH = 1e-6  # method.md: a row at most this long becomes the zero row


def unit_length(x: Tensor) -> Tensor:
    """x / |x| along the last dim in float32 or better; rows of at most 1e-6 become zero.

    A zero row's gradient is exactly 0. The division by the largest entry first keeps rows finite
    whose square would overflow.
    """
    x = x.float() if x.dtype != torch.float64 else x
    largest = x.detach().abs().amax(dim=-1, keepdim=True)
    scaled = x / largest.clamp_min(torch.finfo(x.dtype).tiny)
    length = scaled.norm(dim=-1, keepdim=True)
    is_zero = length * largest <= ZERO_LENGTH
    # torch.where would fill a tensor for each number first, and another in the backward pass
    return (scaled / length.masked_fill(is_zero, 1.0)).masked_fill(is_zero, 0.0)
