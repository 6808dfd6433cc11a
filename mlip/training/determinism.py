"""Which level of repeatability a run reaches, and refusal of what cannot be vouched for.

D0  seeded only
D1  same machine, ranks, threads and versions: the same bits from run to run
D2  D1 through save, kill and resume
D3  another number of ranks, workers or micro-batches: the same samples, losses equal to rounding
D4  another machine or GPU: a curve within a tolerance (a matter of measuring, never promised here)

What is not known to repeat is refused under run.deterministic, not hoped for.
"""

from __future__ import annotations

import os

import torch
import torch.nn as nn

from mlip.ranks import distributed
from mlip.settings.config import Config, ConfigError

# where transformers keeps probabilities that no dropout module shows
_PROBABILITIES = ("drop_prob", "dropout_prob", "attention_dropout")


def random_part(module: nn.Module) -> str | None:
    """The first part that drops at random from torch's generators, by rank and by pass; or None."""
    for name, part in module.named_modules():
        probabilities = [getattr(part, key, None) for key in _PROBABILITIES]
        if isinstance(part, nn.modules.dropout._DropoutNd):
            probabilities.append(part.p)
        if any(isinstance(p, int | float) and p > 0 for p in probabilities):
            return name
    return None


def levels(config: Config, module: nn.Module) -> str:
    """The levels of a configuration and model on this rank's device, such as D2+D3."""
    repeats = "D0" if _obstacles(config) else "D2"
    return repeats if random_part(module) is not None else f"{repeats}+D3"


def _obstacles(config: Config) -> list[str]:
    found = []
    device = distributed.device().type
    if config.model.attention == "xformers":
        found.append("model.attention=xformers adds atomically in its backward pass: set sdpa")
    if config.model.attention == "varlen" and device == "cuda":
        found.append(
            "model.attention=varlen runs nested tensors, whose order of additions has not been "
            "looked into: set sdpa"
        )
    if config.train.compile:
        found.append(
            "train.compile: which kernels torch generates depends on the sizes that a process "
            "meets first, and a resumed one meets others: set train.compile=false"
        )
    if device == "cuda":
        vision, crop_px = config.model.vision, config.data.crop_px
        if vision.kind == "vit" and vision.options.get("image_size", crop_px) != crop_px:
            found.append(
                "model.vision.options.image_size is not data.crop_px: the gradient of resampled "
                "positions is a sum in any order: leave image_size out"
            )
        if not torch.are_deterministic_algorithms_enabled():
            found.append("GPU kernels of torch may add in any order: set run.deterministic=true")
        if distributed.world_size() > 1 and not os.environ.get("NCCL_ALGO"):
            found.append(
                "NCCL chooses its algorithm, and with it the order of sums, at run time: set the "
                "environment variable NCCL_ALGO=Ring"
            )
    elif device != "cpu":
        found.append(f"nothing is known of device {device}")
    return found


def require_deterministic(config: Config) -> None:
    """Ask torch for bit-repeatable kernels, and refuse what has none.

    Raises:  ConfigError naming every setting in the way, where run.deterministic is set.
    """
    if not config.run.deterministic:
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # Else it fills every tensor before an operator writes it: 4 % of a step on a CPU, a kernel each
    # on a GPU. Our own operators write all they make: tests/conftest.py fills theirs with NaN.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False
    obstacles = _obstacles(config)
    if obstacles:
        raise ConfigError(
            "run.deterministic=true cannot be vouched for: "
            + "; ".join(obstacles)
            + "; or set run.deterministic=false"
        )
