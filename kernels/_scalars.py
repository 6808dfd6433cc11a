"""A scale that comes as a number or as a tensor, brought to the device without synchronising."""

from __future__ import annotations

import torch
from torch import Tensor


def scalar_tensor(
    name: str, value: float | Tensor, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """`value` as a 0-dim tensor; differentiable where it is a tensor."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(
                f"expected {name} to be a number or a 0-dim tensor, got shape {list(value.shape)}"
            )
        return value.to(device=device, dtype=dtype).reshape(())
    # filled on the device: copying a host number would synchronise and break CUDA graphs
    return torch.full((), value, dtype=dtype, device=device)
