"""What two settings must agree on; the range of each alone is in bounds.py."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from math import isfinite
from typing import Any

from mlip.settings.transfer import BY_PROJECTION, threshold_rule
from mlip.settings.transfer import check as check_transfer
from mlip.settings.typed_tree import ConfigError, require

# train.monitor -> the losses of which one at least has to be trained
_HELD_OUT = {
    "none": (),
    "loss": ("global_contrastive", "local_alignment"),
    "recall": ("global_contrastive",),
}


def check_agreement(config: Any) -> None:
    """Raises:  ConfigError naming settings that cannot stand together, and what to change."""
    check_transfer(config.transfer)
    data, batch, train = config.data, config.batch, config.train
    require(
        data.crop_px <= data.resize_px,
        f"data.crop_px={data.crop_px} is larger than data.resize_px={data.resize_px}",
    )
    require(
        train.max_steps > 0 or train.epochs > 0,
        "train.max_steps and train.epochs are both 0: nothing would be trained",
    )
    for name in ("positive_prompts", "negative_prompts"):
        sentences = getattr(config.evaluate, name)
        require(
            bool(sentences) and all(sentence.count("{}") == 1 for sentence in sentences),
            f"evaluate.{name}={list(sentences)}: expected sentences, each with one {{}} where the "
            "finding's name goes",
        )
    weights = {name: getattr(config.loss, name).weight for name in _HELD_OUT[train.monitor]}
    require(
        not weights or any(weights.values()),
        f"train.monitor={train.monitor} watches what is not trained: "
        f"{', '.join(f'loss.{name}.weight=0' for name in weights)}; set train.monitor=none",
    )
    require(
        train.patience == 0 or train.monitor != "none",
        f"train.patience={train.patience} with train.monitor=none: nothing is watched; set "
        "train.monitor to loss or recall, or train.patience=0",
    )
    rule, _ = threshold_rule(config.evaluate.threshold_rule)
    require(
        config.evaluate.thresholds or rule == "f1" or config.transfer.task == "classification",
        f"evaluate.threshold_rule={config.evaluate.threshold_rule} chooses thresholds, which "
        "evaluate.thresholds=false turns off: leave out one of the two",
    )
    _check_subgroups(config.evaluate.subgroups)
    _check_kind(config.evaluate, config.transfer)
    vision = config.model.vision
    require(
        vision.kind == "resnet"
        or (vision.patch_pool, vision.patch_stage, vision.norm) == (1, 2, "batch"),
        f"model.vision.kind={vision.kind}: patch_pool={vision.patch_pool}, patch_stage="
        f"{vision.patch_stage} and norm={vision.norm} are of a ResNet and would do nothing; "
        "leave them out (a ViT's grid is that of its patch_size)",
    )
    require(
        not (batch.is_cached and vision.kind == "resnet" and vision.norm == "batch"),
        "batch.micro_images/micro_texts with model.vision.norm=batch: a statistic of a "
        "micro-batch is not a statistic of the batch; set model.vision.norm to group or frozen",
    )
    require(
        not (config.model.heads.norm == "batch" and (batch.is_cached or config.run.exact)),
        "model.heads.norm=batch cannot be exact over micro-batches; set it to layer",
    )
    require(
        train.spike_factor == 0.0 or train.spike_factor > 1.0,
        f"train.spike_factor={train.spike_factor}: expected 0 (off) or more than 1, for example 3",
    )
    require(
        train.residual == "fp32" or train.precision != "fp32",
        "train.residual=bf16 with train.precision=fp32: nothing is rounded there; set "
        "train.precision=bf16 or auto, or train.residual=fp32",
    )
    require(
        train.optimizer == "adamw" or train.zero_stage == 0,
        f"train.optimizer=muon needs whole matrices on every rank, train.zero_stage="
        f"{train.zero_stage} splits them; set train.zero_stage=0, or train.optimizer=adamw",
    )
    require(
        not (train.compile and train.zero_stage == 3),
        "train.compile with train.zero_stage=3: parameters come and go between the layers of a "
        "compiled tower; set train.zero_stage to 0, 1 or 2, or train.compile=false",
    )
    require(
        config.model.attention != "varlen" or config.model.text.packed,
        "model.attention=varlen is for packed reports; set model.text.packed=true",
    )
    require(
        not (train.compile and config.model.attention == "varlen"),
        "train.compile with model.attention=varlen: nested tensors are not compiled; set sdpa",
    )
    require(
        train.engine != "plain" or not (train.offload or train.zero_stage >= 2),
        f"train.engine=plain with train.offload={train.offload}, train.zero_stage="
        f"{train.zero_stage}: plain torch shares nothing out; set train.offload=false and "
        "train.zero_stage to 0 or 1, or train.engine=deepspeed",
    )
    require(
        not (train.offload and train.zero_stage == 0),
        "train.offload needs train.zero_stage of 1 or more",
    )


def _check_kind(evaluate: Any, transfer: Any) -> None:
    """What evaluations that train and those that do not each call by their own name: the other's
    would be passed over, and the scores be of other rows than were asked for."""
    is_trained = transfer.task != "none"
    unread, read = ("evaluate", "transfer") if is_trained else ("transfer", "evaluate")
    for name in ("subset", "exclusive"):
        value = getattr(evaluate if is_trained else transfer, name)
        if value not in (None, False):
            off = "null" if name == "subset" else "false"
            has_it = name == "subset" or transfer.task in ("none", "classification")
            instead = f"set {read}.{name} instead, or " if has_it else ""
            raise ConfigError(
                f"{unread}.{name}={value} is not read with transfer.task={transfer.task}: "
                f"{instead}leave it out ({unread}.{name}={off})"
            )


def _check_subgroups(subgroups: Mapping[str, Any]) -> None:
    for column, edges in subgroups.items():
        if edges == BY_PROJECTION:
            continue
        is_list = isinstance(edges, list | tuple) and all(
            isinstance(edge, int | float) and not isinstance(edge, bool) and isfinite(edge)
            for edge in edges
        )
        if not is_list or any(low >= high for low, high in pairwise(edges)):
            raise ConfigError(
                f"evaluate.subgroups.{column}={edges!r}: expected rising numbers that cut the "
                "column into ranges, as [20, 40, 60, 80], [] for a group a value, or "
                f"{BY_PROJECTION} for a column of views"
            )
