"""EMA of the weights: an exponential moving average of what the optimiser updates.

Each rank averages the part of the float32 masters that it holds (a shard from ZeRO-1 on), so the
average costs 4 bytes a parameter divided as the optimiser's state is. Whole tensors by name come
from the engine's own gathering, with the shards swapped in for that moment.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class EMAState:
    """Averaged trainable parameters, whole and float32, by name."""

    parameters: dict[str, Tensor]
    updates: int  # of the average: one a step that was not skipped


class EMA:
    """The average of `held`, tensors that an optimiser changes in place.

    Source:  Polyak and Juditsky 1992; the ramp min(decay, (1 + n) / (10 + n)) is TensorFlow's
             ExponentialMovingAverage with num_updates: early steps must not keep the start alive.
    """

    def __init__(self, held: Sequence[Tensor], decay: float) -> None:
        self.held, self.decay = list(held), decay
        self.shadow = [tensor.detach().clone() for tensor in self.held]
        # counted where the held tensors are: whether a step counts is known there first
        self._updates = torch.zeros((), dtype=torch.float64, device=self.held[0].device)

    @property
    def updates(self) -> int:
        """Steps that moved the average; waits for the device."""
        return int(self._updates)

    @torch.no_grad()
    def update(self, is_skipped: Tensor) -> None:
        """One step on, or none where `is_skipped`, bool [], is true."""
        count = self._updates
        # elsewhere only where ZeRO holds the masters on the CPU
        is_skipped = is_skipped.to(count.device)
        decay = torch.clamp((1.0 + count) / (10.0 + count), max=self.decay)
        weight = torch.where(is_skipped, 0.0, 1.0 - decay)
        # three operations for all tensors and a copy of them meanwhile, when gradients are gone: a
        # lerp of many takes no weight that is on the device
        moved = torch._foreach_sub([tensor.detach() for tensor in self.held], self.shadow)
        torch._foreach_mul_(moved, weight.to(self.shadow[0].dtype))
        torch._foreach_add_(self.shadow, moved)
        count += torch.where(is_skipped, 0.0, 1.0)

    @torch.no_grad()
    def restart(self, updates: int = 0) -> None:
        """Take the values that `held` has now."""
        for shadow, tensor in zip(self.shadow, self.held, strict=True):
            shadow.copy_(tensor)
        self._updates.fill_(float(updates))

    @contextlib.contextmanager
    def swapped(self) -> Iterator[None]:
        """`held` shows the average inside, and its own values again after."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for shadow, tensor in zip(self.shadow, self.held, strict=True):
            kept = tensor.detach().clone()
            tensor.copy_(shadow)
            shadow.copy_(kept)
