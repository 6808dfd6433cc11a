"""train.compile: torch.compile of what a step spends its time in, the two towers.

They are compiled in place: names, parameters, hooks and checkpoints stay what they are, and the
model that inference builds is never compiled. Heads and losses stay as they are: the
heavy parts of the losses are operators of this project already.
"""

from __future__ import annotations

import shutil
from typing import Any

import torch.nn as nn

from mlip.config import Config, ConfigError
from mlip.distributed import is_distributed

_COMPILERS = ("g++", "clang++", "gcc", "clang", "cc")


def compile_towers(objective: nn.Module, config: Config) -> None:
    """Have the towers compiled when they first run, where train.compile is set.

    A batch of another width or size is compiled once more, then for all sizes.
    Raises:  ConfigError where a tower's layers wait for other ranks, or where nothing on PATH could
             compile what torch generates
    """
    if not config.train.compile:
        return
    vision = config.model.vision
    if vision.kind == "resnet" and vision.norm == "batch" and is_distributed():
        raise ConfigError(
            "train.compile=true on several ranks with model.vision.norm=batch: the statistics of "
            "every layer cross ranks, so that nothing between them is worth compiling; set "
            "model.vision.norm to group or frozen, or train.compile=false"
        )
    if not any(shutil.which(name) for name in _COMPILERS):
        raise ConfigError(
            "train.compile=true: torch compiles C++ (on a GPU its launchers), and none of "
            f"{', '.join(_COMPILERS)} is on PATH; install one, or set train.compile=false"
        )
    model: Any = objective.model
    for module in model.towers():
        module.compile()
