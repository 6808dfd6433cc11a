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
        self.updates = 0
        self.shadow = [tensor.detach().clone() for tensor in self.held]

    @torch.no_grad()
    def update(self) -> None:
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.shadow, [t.detach() for t in self.held], 1.0 - decay)
        self.updates += 1

    @torch.no_grad()
    def restart(self, updates: int = 0) -> None:
        """Take the values that `held` has now."""
        for shadow, tensor in zip(self.shadow, self.held, strict=True):
            shadow.copy_(tensor)
        self.updates = updates

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
