"""Scales as tensors on the device, without synchronising; what is no number or tensor; where values
may be read; the widest type of a device's sums."""

from __future__ import annotations

import numbers

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from mlip.kernels._autograd import savable


def scalar_tensor(
    name: str, value: float | Tensor, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """`value` as a 0-dim tensor; differentiable where it is a tensor."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(
                f"expected {name} to be a number or a 0-dim tensor, got shape {list(value.shape)}"
            )
        return savable(value.to(device=device, dtype=dtype).reshape(()))
    if torch.compiler.is_compiling():
        # one graph for numbers of any value: torch.full would be compiled again for each
        return torch.ones((), dtype=dtype, device=device) * value
    require_number(name, value)
    # filled on the device: copying a host number would synchronise and break CUDA graphs
    return torch.full((), value, dtype=dtype, device=device)


def require_number(name: str, value: object) -> None:
    """Raises:  ValueError for what is no real number, as a setting that was not given or text"""
    if not isinstance(value, numbers.Real):
        raise ValueError(
            f"expected {name} to be a number or a 0-dim tensor, got {type(value).__name__}"
        )


def require_tensor(name: str, value: object) -> None:
    """Raises:  ValueError for what is no tensor"""
    if not isinstance(value, Tensor):
        raise ValueError(f"expected {name} to be a tensor, got {type(value).__name__}")


def widest_dtype(device: torch.device) -> torch.dtype:
    """float64, in which sums that cancel keep their digits; float32 where a device lacks it.

    Apple's GPUs and some of Intel's and others' refuse every float64 tensor.
    """
    return torch.float64 if device.type in ("cpu", "cuda", "meta") else torch.float32


def has_values(x: Tensor) -> bool:
    """Whether the host may read `x`: on a GPU a look would synchronise, and a graph that is being
    made has no values, nor has a FakeTensor, by which memory is planned."""
    is_shape = torch.compiler.is_compiling() or isinstance(x, FakeTensor)
    return x.device.type == "cpu" and not is_shape
