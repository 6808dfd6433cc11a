"""A backward pass that may be differentiated no further, and says so; autocast stays out of it;
inputs that autograd may save."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

TensorOrNone = TypeVar("TensorOrNone", Tensor, Tensor | None)


def autocast_on(device_type: str) -> bool:
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def autocast_off(device_type: str) -> contextlib.AbstractContextManager:
    """No autocast inside; tensors of the meta device, shapes alone, know none."""
    if device_type == "meta":
        return contextlib.nullcontext()
    return torch.autocast(device_type, enabled=False)


def savable(x: TensorOrNone) -> TensorOrNone:
    """`x`, or a copy of what was made in inference mode, as by a frozen tower: autograd refuses to
    save that."""
    if torch.compiler.is_compiling() or not isinstance(x, Tensor):
        return x
    return x.clone() if x.is_inference() and torch.is_grad_enabled() else x


class _Refuse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *leads: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        raise RuntimeError(
            "this op has no second derivative; write the formula in plain torch where one is needed"
        )


class _Read:
    """A Function's context whose saved tensors have been read: a checkpoint gives them once."""

    def __init__(self, ctx: Any, saved: tuple[Tensor, ...]) -> None:
        self._ctx, self.saved_tensors = ctx, saved

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


def no_second_derivative(backward: Callable) -> Callable:
    """Decorate a Function's backward: a derivative of what it returns is an error.

    torch's once_differentiable lets a second derivative pass, silently wrong, where the incoming
    gradient is a constant, as it is for a loss. Autocast is off inside, as in the forward pass:
    a caller may run backward() under it.
    """

    @functools.wraps(backward)
    def wrapped(ctx: Any, *grads: Tensor) -> Any:
        device = grads[0].device.type
        if not torch.is_grad_enabled():
            with autocast_off(device):
                return backward(ctx, *grads)
        saved = ctx.saved_tensors
        with torch.no_grad(), autocast_off(device):
            out = backward(_Read(ctx, saved), *grads)
        # autograd.grad runs only nodes that lead to what it is asked for: hang the error on those
        # (an input that was not given is saved as None)
        leads = [x for x in (*saved, *grads) if x is not None and x.requires_grad]
        return tuple(_Refuse.apply(x, *leads) if isinstance(x, Tensor) else x for x in out)

    return wrapped
