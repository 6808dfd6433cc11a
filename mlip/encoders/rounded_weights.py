"""All weights of a tower rounded to autocast's type in one operation, and all gradients widened in
one, instead of two small kernels and two graph nodes for each weight and each bias.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from mlip.encoders.residual import RoundedLayerNorm

# what autocast itself rounds the weights of, and our own norms
_ROUNDED = (nn.Linear, nn.Conv2d, RoundedLayerNorm)


class _RoundTogether(torch.autograd.Function):
    """float32 weights -> the same in `dtype`; gradients back to float32."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)  # a weight without a gradient stays without
        rounded = [torch.empty_like(weight, dtype=dtype) for weight in weights]
        torch._foreach_copy_(rounded, list(weights))
        # else a frozen tower would keep all its activations, for gradients that nobody asks for
        wanted = ctx.needs_input_grad[1:]
        ctx.mark_non_differentiable(
            *(r for r, is_wanted in zip(rounded, wanted, strict=True) if not is_wanted)
        )
        return tuple(rounded)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        given = [grad for grad in grads if grad is not None]
        wide = [torch.empty_like(grad, dtype=torch.float32) for grad in given]
        if given:
            torch._foreach_copy_(wide, given)
        made = iter(wide)
        return None, *(None if grad is None else next(made) for grad in grads)


class RoundedTogether:
    """Inside `with rounded():` the layers of `modules` see weights of autocast's type already.

    Values and gradients are autocast's own to the bit: it too rounds each weight once and keeps it.
    Afterwards the parameters are back in their places; a layer that a checkpoint computes again
    later rounds its own, as always. Does nothing where autocast is off. For engines that keep whole
    parameters where they are and want gradients after the backward pass, not during it.

    Cost:    until a tower's backward pass is over, its gradients in that type, 2 bytes a weight; in
             later passes of a gradient cache a float32 set beside those that are there, too
    Source:  ours.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        # a module's own dictionary of parameters, and a name there
        self._places = [
            (module._parameters, name)
            for root in modules
            for module in root.modules()
            if isinstance(module, _ROUNDED)
            for name, parameter in module._parameters.items()
            if parameter is not None and parameter.dtype == torch.float32
        ]

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        kept: list[Any] = [held[name] for held, name in self._places]
        kind = kept[0].device.type if kept else "cpu"
        if not kept or not torch.is_autocast_enabled(kind):
            yield
            return
        weights = list({id(weight): weight for weight in kept}.values())  # a shared one once
        made = _RoundTogether.apply(torch.get_autocast_dtype(kind), *weights)
        rounded = {id(weight): new for weight, new in zip(weights, made, strict=True)}
        for (held, name), weight in zip(self._places, kept, strict=True):
            held[name] = rounded[id(weight)]
        try:
            yield
        finally:
            for (held, name), weight in zip(self._places, kept, strict=True):
                held[name] = weight
