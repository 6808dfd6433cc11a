"""The DeepSpeed dictionary derived from Config, and a user's own DeepSpeed JSON held against it.

Does not import deepspeed. Batch size, learning rate and precision exist once, in Config; a second
JSON would be a second truth, so it is accepted where it agrees and refused where it does not.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlip.ranks import distributed
from mlip.settings.config import Config, ConfigError, flatten
from mlip.training.schedule import peak_lr

# Keys that tune how DeepSpeed communicates or what it reports, and change no number; one that ends
# in "." or "_" stands for all that begin with it.
_FREE_KEYS = (
    "zero_optimization.reduce_bucket_size",
    "zero_optimization.allgather_bucket_size",
    "zero_optimization.allgather_partitions",
    "zero_optimization.overlap_comm",
    "zero_optimization.reduce_scatter",
    "zero_optimization.contiguous_gradients",
    "zero_optimization.sub_group_size",
    "zero_optimization.stage3_",
    "zero_optimization.offload_optimizer.",
    "comms_logger.",
)
# The same of which DeepSpeed itself reads any value: a word ended in a TypeError at some step.
_UNCHECKED_KEYS: dict[str, type] = {
    "steps_per_print": int,
    "wall_clock_breakdown": bool,
    "dump_state": bool,
    "memory_breakdown": bool,
    "flops_profiler.enabled": bool,
    "flops_profiler.recompute_fwd_factor": float,
    "flops_profiler.profile_step": int,
    "flops_profiler.module_depth": int,
    "flops_profiler.top_modules": int,
    "flops_profiler.detailed": bool,
    "flops_profiler.output_file": str,
}

# DeepSpeed's own monitors -> the setting here that does the same. They would name scalars and count
# steps (as samples) otherwise, know nothing of val, and ask the network.
_MONITORS = {
    "tensorboard": "train.tensorboard",
    "wandb": "train.wandb",
    "csv_monitor": None,
    "comet": None,
}


def read_json(path: str | None) -> dict[str, Any] | None:
    """A user's DeepSpeed JSON, or None without a path.

    Raises:  ConfigError naming the file and what is wrong with it.
    """
    if path is None:
        return None
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"DeepSpeed JSON {path}: cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(
            f"DeepSpeed JSON {path}: expected an object, got a {type(content).__name__}"
        )
    return content


def deepspeed_settings(config: Config, user: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What deepspeed.initialize gets.

    Raises:  ConfigError naming the key and both values where the user's JSON disagrees, or the key
             where it asks for something that would change the training and has no setting here.
    """
    train = config.train
    zero: dict[str, Any] = {"stage": train.zero_stage}
    if train.zero_stage == 3:
        # it would replace torch's F.linear in the whole process
        zero["memory_efficient_linear"] = False
    if train.offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    derived: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": max(
            1, config.batch.global_pairs // distributed.world_size()
        ),
        "gradient_accumulation_steps": 1,
        "gradient_clipping": train.clip_norm,
        "zero_optimization": zero,
        # torch's AdamW or our Muon: DeepSpeed's own AdamW would be compiled at the first run
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        # it synchronises the device twice a step, for a figure that our own log has
        "timers": {"throughput": {"enabled": False}},
    }
    if user is not None:
        _require_own_trackers(config, user)
        rest = {key: value for key, value in user.items() if key not in _MONITORS}
        _merge_free(derived, rest, _agreed(config, derived))
    return derived


def _require_own_trackers(config: Config, user: Mapping[str, Any]) -> None:
    """A monitor that is off, or on as the settings say, is left to the settings.

    Raises:  ConfigError for one that is on and not in the settings, or asks for what they do not do
    """
    for section, setting in _MONITORS.items():
        asked = user.get(section, {})
        if not isinstance(asked, Mapping):
            raise ConfigError(f"DeepSpeed JSON: {section} is {asked!r}; expected an object")
        if asked.get("enabled", False) in (False, "auto"):
            continue
        if setting is None:
            raise ConfigError(
                f"DeepSpeed JSON: {section}.enabled is {asked['enabled']!r}; leave the section "
                "out: run.dir/log.jsonl has every step, and train.tensorboard, train.wandb and "
                "train.mlflow are the trackers here"
            )
        if not getattr(config.train, setting.removeprefix("train.")):
            raise ConfigError(
                f"DeepSpeed JSON: {section}.enabled is {asked['enabled']!r}, but {setting} is "
                f"False; set {setting}=true, which also writes the scores on val, and leave the "
                "section out of the JSON"
            )
        given = sorted(key for key in asked if key != "enabled")
        if given:
            how = "WANDB_PROJECT, WANDB_ENTITY and WANDB_RUN_GROUP of the environment name them"
            how = how if section == "wandb" else "they are in run.dir/tensorboard"
            raise ConfigError(
                f"DeepSpeed JSON: {section}.{given[0]}={asked[given[0]]!r} is not read beside "
                f"{setting}=true: {how}; leave the section out of the JSON"
            )


def _agreed(config: Config, derived: Mapping[str, Any]) -> dict[str, tuple[str, Any]]:
    """Dotted DeepSpeed key -> (the setting here that decides it, its value)."""
    train = config.train
    # auto is decided by the device, which a second setting must not
    on = "auto" if train.precision == "auto" else train.precision == "bf16"
    return {
        "train_batch_size": ("batch.global_pairs", config.batch.global_pairs),
        "train_micro_batch_size_per_gpu": (
            "batch.global_pairs / ranks",
            derived["train_micro_batch_size_per_gpu"],
        ),
        "gradient_accumulation_steps": (
            "what the loss needs (accumulation loses negatives; batch.micro_images splits exactly)",
            1,
        ),
        "gradient_clipping": ("train.clip_norm", train.clip_norm),
        "zero_optimization.stage": ("train.zero_stage", train.zero_stage),
        "zero_optimization.offload_optimizer.device": (
            "train.offload",
            "cpu" if train.offload else "none",
        ),
        "zero_allow_untested_optimizer": ("what our optimisers need", True),
        "zero_force_ds_cpu_optimizer": ("what our optimisers need", False),
        "bf16.enabled": ("train.precision", on),
        "bfloat16.enabled": ("train.precision", on),
        "fp16.enabled": ("train.precision", False),
        "optimizer.type": (
            "train.optimizer",
            {"adamw": "AdamW", "muon": "Muon"}[train.optimizer],
        ),
        "optimizer.params.lr": ("train.lr, scaled by the batch", peak_lr(config)),
        "optimizer.params.betas": ("train.betas", list(train.betas)),
        "optimizer.params.eps": ("what our optimisers take", 1e-8),
        "optimizer.params.weight_decay": ("train.weight_decay", train.weight_decay),
    }


def _require_kind(key: str, value: Any) -> None:
    """Raises:  ConfigError for a value that DeepSpeed would take and break of."""
    kind = _UNCHECKED_KEYS.get(key)
    if key == "steps_per_print" and value == 0:
        raise ConfigError(
            "DeepSpeed JSON: steps_per_print is 0, by which DeepSpeed divides; leave the "
            "key out for a DeepSpeed that prints nothing"
        )
    is_right = type(value) is kind or (kind is float and type(value) is int)
    if kind is not None and value is not None and not is_right:
        expected = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
        raise ConfigError(f"DeepSpeed JSON: {key} is {value!r}; expected {expected[kind]}")


def _merge_free(
    into: dict[str, Any], user: Mapping[str, Any], agreed: Mapping[str, tuple[str, Any]]
) -> None:
    for key, value in flatten(user).items():
        if value == "auto":
            continue
        if key in agreed:
            name, ours = agreed[key]
            if value != ours:
                raise ConfigError(
                    f"DeepSpeed JSON: {key} is {value!r}, but {name} is {ours!r}; leave "
                    "the key out of the JSON: it is derived from the config"
                )
        elif key in _UNCHECKED_KEYS or any(
            key == k or (k[-1] in "._" and key.startswith(k)) for k in _FREE_KEYS
        ):
            _require_kind(key, value)
            *sections, leaf = key.split(".")
            place = into
            for section in sections:
                place = place.setdefault(section, {})
            place[leaf] = value
        else:
            raise ConfigError(
                f"DeepSpeed JSON: {key}={value!r} has no place here: it would change the training "
                "beside the config, where batch, optimiser, schedule and precision are set"
            )


def refusal(error: Any, settings: Mapping[str, Any]) -> ConfigError:
    """DeepSpeed's own refusal, a pydantic.ValidationError, by the keys of the JSON.

    settings  what deepspeed.initialize was given
    """
    given = flatten(settings)
    told = []
    for one in error.errors(include_url=False):
        leaf = ".".join(str(part) for part in one["loc"])
        keys = [k for k in given if k == leaf or k.endswith(f".{leaf}")]
        key = next((k for k in keys if given[k] == one["input"]), leaf)
        told.append(f"{key} is {one['input']!r}: {one['msg']}")
    return ConfigError(f"DeepSpeed JSON: {'; '.join(told)}; correct the file, or leave these out")
