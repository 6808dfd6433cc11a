"""The optimiser that train.optimizer names, and its state before a parameter's first step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from mlip.settings.config import Config
from mlip.training.muon import Muon, matrix_names
from mlip.training.schedule import peak_lr, undecayed_names

MOMENTS = ("exp_avg", "exp_avg_sq")


def build_optimizer(objective: nn.Module, config: Config) -> torch.optim.AdamW:
    """The optimiser that train.optimizer names, over the trainable parameters.

    In groups: decayed and not, and for Muon the matrices that it moves.
    """
    train = config.train
    undecayed = undecayed_names(objective)
    matrices = matrix_names(objective) if train.optimizer == "muon" else set()
    trainable = [(n, p) for n, p in objective.named_parameters() if p.requires_grad]
    decayed = [(n, p) for n, p in trainable if n not in undecayed]
    groups: list[dict[str, Any]] = [
        {
            "params": [p for n, p in decayed if n not in matrices],
            "weight_decay": train.weight_decay,
        },
        {"params": [p for n, p in trainable if n in undecayed], "weight_decay": 0.0},
        {
            "params": [p for n, p in decayed if n in matrices],
            "weight_decay": train.weight_decay,
            "is_matrix": True,
        },
    ]
    groups = [group for group in groups if group["params"]]
    # fused: one pass over memory; 200 small tensors cost milliseconds without
    settings: dict[str, Any] = {"lr": peak_lr(config), "betas": train.betas, "fused": True}
    if train.optimizer == "muon":
        return Muon(groups, momentum=train.momentum, **settings)
    return torch.optim.AdamW(groups, **settings)


def seed_moments(
    optimizer: torch.optim.Optimizer, parameter: Tensor, steps: int, keys: Iterable[str] = MOMENTS
) -> None:
    """The state of a parameter before its first step here, with the step count given."""
    optimizer.state[parameter] = {
        "step": torch.tensor(float(steps), device=parameter.device),
        **{key: torch.zeros_like(parameter) for key in keys},
    }
