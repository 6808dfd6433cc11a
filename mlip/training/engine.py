"""Which engine trains, plain torch or DeepSpeed, and what settings must hold for it."""

from __future__ import annotations

import importlib.util
import os
import shutil
from typing import Any

import torch.nn as nn

from mlip.ranks import distributed
from mlip.settings.config import Config, ConfigError
from mlip.training.deepspeed_engine import NEEDED, DeepSpeedEngine, require_version
from mlip.training.deepspeed_json import deepspeed_settings
from mlip.training.grad_cache import num_micro_batches
from mlip.training.plain_engine import PlainEngine
from mlip.training.step import Engine

_COMPILERS = ("g++", "clang++", "gcc", "clang", "cc")


def _require_equal_shares(config: Config) -> None:
    """NCCL exchanges equal shapes: ranks of other sizes would wait for ever or read each other's.

    Raises:  ConfigError where several GPUs cannot share the batch evenly.
    """
    pairs, ranks = config.batch.global_pairs, distributed.world_size()
    if distributed.device().type == "cuda" and pairs % ranks:
        raise ConfigError(
            f"batch.global_pairs={pairs} on {ranks} GPUs: the losses exchange rows of equal number "
            f"there; set it to a multiple of {ranks}, such as {-(-pairs // ranks) * ranks}"
        )


def _require_equal_passes(config: Config) -> None:
    """Stage 3 gathers parameters in every pass: a rank needs a row for each pass of the others.

    Raises:  ConfigError where the rank with fewest pairs has less than passes.
    """
    pairs, ranks = config.batch.global_pairs, distributed.world_size()
    for name in ("micro_images", "micro_texts"):
        size = getattr(config.batch, name)
        if pairs // ranks < num_micro_batches(-(-pairs // ranks), size):
            raise ConfigError(
                f"batch.global_pairs={pairs} on {ranks} ranks with batch.{name}={size} and "
                f"train.zero_stage=3: a rank with {pairs // ranks} pairs cannot make the passes of "
                f"one with {-(-pairs // ranks)}; set batch.{name}={size + 1} or more, or choose a "
                "multiple of the ranks"
            )


def _require_one_recomputation(config: Config) -> None:
    """Stage 3 gathers a tower's parameters for one recomputation, not for one inside another.

    Raises:  ConfigError where a tower is both cached and checkpointed.
    """
    for tower, size in (("vision", "micro_images"), ("text", "micro_texts")):
        if getattr(config.batch, size) > 0 and getattr(config.model, tower).checkpointing:
            raise ConfigError(
                f"batch.{size} with model.{tower}.checkpointing=true and train.zero_stage=3: "
                "DeepSpeed releases parameters that the second recomputation still needs; set "
                f"model.{tower}.checkpointing=false and a smaller batch.{size}, or "
                "train.zero_stage=2"
            )


def compile_towers(objective: nn.Module, config: Config) -> None:
    """Have the two towers compiled when they first run, where train.compile is set.

    In place: names, parameters, hooks and checkpoints stay what they are, and the model that
    inference builds is never compiled. Heads and losses stay as they are: the heavy parts of the
    losses are operators of this project already. A batch of another width or size is compiled once
    more, then for all sizes.
    Raises:  ConfigError where a tower's layers wait for other ranks, or where nothing on PATH could
             compile what torch generates
    """
    if not config.train.compile:
        return
    vision = config.model.vision
    if vision.kind == "resnet" and vision.norm == "batch" and distributed.is_distributed():
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


def build_engine(
    objective: nn.Module, config: Config, user_json: dict[str, Any] | None = None
) -> Engine:
    """The engine that train.engine asks for; auto = DeepSpeed under a launcher where installed.

    Raises:  ConfigError where the settings need DeepSpeed and it is not installed or of another
             version, where a user's DeepSpeed JSON contradicts the config or would not be used,
             where train.compile has no compiler, or where GPUs cannot share the batch evenly.
    """
    train = config.train
    _require_equal_shares(config)
    compile_towers(objective, config)
    if train.zero_stage == 3:
        _require_equal_passes(config)
        _require_one_recomputation(config)
    is_installed = importlib.util.find_spec("deepspeed") is not None
    if train.engine == "plain" and user_json is not None:
        raise ConfigError(
            "--deepspeed_config with train.engine=plain: nothing of it would be used; leave it "
            "out, or set train.engine=deepspeed"
        )
    wants = train.engine == "deepspeed" or train.offload or user_json is not None
    if not is_installed:
        if wants or (train.zero_stage >= 2 and distributed.world_size() > 1):
            raise ConfigError(
                f"train.engine={train.engine}, train.zero_stage={train.zero_stage}, "
                f"train.offload={train.offload} need DeepSpeed, which is not installed: "
                f"pip install '{NEEDED}', or set train.engine=plain train.zero_stage=0"
            )
    elif train.engine != "plain" and (wants or "RANK" in os.environ):
        require_version()
        return DeepSpeedEngine(objective, config, deepspeed_settings(config, user_json))
    return PlainEngine(objective, config)
