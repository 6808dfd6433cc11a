"""The engine in plain torch: whole parameters and the optimiser's whole state on every rank."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from mlip.ranks import distributed
from mlip.settings.config import Config
from mlip.training.ema import EMAState
from mlip.training.optimizer import MOMENTS, build_optimizer
from mlip.training.step import Engine, TrainingState


def rounds_weights_together(config: Config) -> bool:
    """Whether the weights of a tower are rounded at once: whole parameters, and nobody waits for a
    gradient before the backward pass is over.

    A compiled tower rounds them in its own kernels, and the passes of a gradient cache would each
    widen a whole set of gradients beside the one there is.
    """
    train = config.train
    return train.precision != "fp32" and not train.compile and not config.batch.is_cached


class PlainEngine(Engine):
    """Data-parallel training in plain torch: whole parameters and optimiser on every rank."""

    name = "plain"

    def __init__(self, objective: nn.Module, config: Config) -> None:
        super().__init__(objective, config)
        self.optimizer = build_optimizer(objective, config)
        self._share_out()
        self._start_ema()
        if rounds_weights_together(config) and hasattr(objective.model, "round_weights_together"):
            model: Any = objective.model
            model.round_weights_together()

    def _backward(self, total: Tensor) -> None:
        total.backward()

    def _update(self, lr: float) -> Tensor:
        for parameter in self.parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        distributed.average_([p.grad for p in self.parameters.values() if p.grad is not None])
        norm = torch.nn.utils.clip_grad_norm_(
            self.parameters.values(), self.config.train.clip_norm or float("inf")
        )
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        # the fused optimiser's own way to leave everything as it is, without asking the host
        self.optimizer.found_inf = (~torch.isfinite(norm)).float()
        self.optimizer.step()
        self.objective.model.scales.clamp_()  # type: ignore[union-attr,operator]
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def state(self, *, everywhere: bool = True) -> TrainingState:
        moments: dict[str, dict[str, Tensor]] = {key: {} for key in MOMENTS}
        steps = 0
        for name, parameter in self.parameters.items():
            held = self.optimizer.state.get(parameter, {})
            steps = int(held["step"]) if held else 0
            for key in self.moments[name]:
                moments[key][name] = held[key] if held else torch.zeros_like(parameter)
        return TrainingState(
            parameters={n: p.detach() for n, p in self.objective.named_parameters()},
            moments=moments,
            buffers=self._buffers(),
            optimizer_steps=steps,
            ema=EMAState(self._by_name(self.ema.shadow), self.ema.updates) if self.ema else None,
        )

    def averaged(self) -> AbstractContextManager[None]:
        assert self.ema is not None
        return self.ema.swapped()

    def _held(self) -> list[Tensor]:
        return list(self.parameters.values())

    def _by_name(self, tensors: list[Tensor]) -> dict[str, Tensor]:
        return dict(zip(self.parameters, tensors, strict=True))

    def _set(self, parameter: Any, value: Tensor, key: str | None) -> None:
        (parameter if key is None else self.optimizer.state[parameter][key]).copy_(value)
