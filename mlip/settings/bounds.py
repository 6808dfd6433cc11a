"""Which numbers each setting may hold; what two settings must agree on is in agreement.py.

A number outside its range is refused with its key, the value and the range before anything is read:
a negative rate would train away from the data, a batch of 0 tokens has no report.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlip.settings.typed_tree import ConfigError


@dataclass(frozen=True)
class Range:
    """least <= value <= most; an open end excludes its own number."""

    least: float = -math.inf
    most: float = math.inf
    is_open_below: bool = False
    is_open_above: bool = False

    def holds(self, value: float) -> bool:
        above = value > self.least if self.is_open_below else value >= self.least
        below = value < self.most if self.is_open_above else value <= self.most
        # not math.isfinite: it raises for a whole number that no float holds
        return abs(value) < math.inf and above and below

    def __str__(self) -> str:
        if math.isinf(self.most):
            low = _told(self.least)
            return f"more than {low}" if self.is_open_below else f"{low} or more"
        low = f"{'more than ' if self.is_open_below else ''}{_told(self.least)}"
        return f"{low} to {'below ' if self.is_open_above else ''}{_told(self.most)}"


MOST_SEED = 2**63 - 1  # of torch's generators


def _told(end: float) -> str:
    """An end of a range as one types it: 10000000 and not 1e+07, which is no whole number."""
    return "2^63 - 1" if end == MOST_SEED else str(end)


FROM_0, FROM_1, ABOVE_0 = Range(0), Range(1), Range(0, is_open_below=True)
SHARE, SHARE_BELOW_1 = Range(0, 1), Range(0, 1, is_open_above=True)

BOUNDS: dict[str, Range] = {
    "run.seed": Range(0, MOST_SEED),
    "run.threads": Range(0, 4096),  # torch ends the process at numbers that no machine has
    "run.timeout_s": Range(0, 10_000_000, is_open_below=True),
    "data.resize_px": Range(1, 16384),
    "data.crop_px": Range(1, 16384),
    "data.mean": Range(-100, 100),
    "data.std": Range(0, 100, is_open_below=True),
    "data.max_tokens": Range(3, 65536),  # [CLS], [SEP] and something to read
    "data.max_entities": Range(1, 65536),
    "data.vocab_size": Range(100, 10_000_000),  # five special tokens and an alphabet
    "data.vocab_min_patients": FROM_1,
    "data.bad_share": SHARE,
    "data.workers": FROM_0,
    "data.prefetch": FROM_1,
    # from 1 on an image could be drawn black or inverted
    "data.augment.brightness": SHARE_BELOW_1,
    "data.augment.contrast": SHARE_BELOW_1,
    # more would turn a frontal chest into a picture that no report describes
    "data.augment.rotation_degrees": Range(0, 45),
    "data.augment.sentence_dropout": SHARE,
    "data.phantom.studies": FROM_0,
    "data.phantom.val_studies": FROM_0,
    "data.phantom.test_studies": FROM_0,
    "data.phantom.image_px": FROM_1,
    "data.phantom.seed": FROM_0,
    "data.phantom.test_seed": FROM_0,
    "batch.global_pairs": Range(2, 10_000_000),  # one pair has no negative
    "batch.micro_images": FROM_0,
    "batch.micro_texts": FROM_0,
    "train.max_steps": FROM_0,
    "train.epochs": Range(0, 1_000_000),
    "train.lr": Range(0, 1000),
    "train.lr_reference_pairs": FROM_0,
    "train.weight_decay": Range(0, 1000),
    "train.betas": SHARE_BELOW_1,
    "train.momentum": SHARE_BELOW_1,
    "train.warmup_steps": FROM_0,
    "train.decay_share": SHARE,
    "train.min_lr_share": SHARE,
    "train.clip_norm": FROM_0,
    "train.ema_decay": SHARE_BELOW_1,
    "train.checkpoint_steps": FROM_1,
    "train.keep_checkpoints": FROM_1,
    "train.monitor_pairs": Range(2),
    "train.patience": FROM_0,
    "train.log_steps": FROM_1,
    "train.max_nan_steps": FROM_1,
    "train.spike_factor": FROM_0,
    "model.embed_dim": FROM_1,
    "model.vision.patch_stage": FROM_0,
    "model.vision.patch_pool": FROM_1,
    "model.vision.neck_blocks": FROM_0,
    "model.vision.pool_heads": FROM_1,
    "model.heads.hidden": FROM_1,
    "model.divergence.dropout": SHARE_BELOW_1,
    "model.divergence.beta_kl": FROM_0,
    "model.divergence.beta_spread": FROM_0,
    "knowledge.dim": FROM_1,
    "knowledge.weight_present": Range(0, 1_000_000),
    "knowledge.weight_uncertain": Range(0, 1_000_000),
    "knowledge.weight_absent": Range(0, 1_000_000),
    "loss.global_contrastive.weight": FROM_0,
    "loss.local_alignment.weight": FROM_0,
    # the model keeps the learned ones inside the same ranges (model.Scales.BOUNDS)
    "loss.local_alignment.attention_scale": Range(0, 200),
    "loss.local_alignment.knowledge_scale": Range(0, 200),
    "loss.local_alignment.knowledge_gain": Range(0, 10),
    "loss.local_alignment.knowledge_share": SHARE,
    "loss.local_alignment.aggregation_scale": Range(0.1, 100),
    "loss.category.weight": FROM_0,
    "loss.category.prototypes": Range(2),
    "loss.category.sinkhorn_temperature": ABOVE_0,
    "loss.category.prediction_temperature": ABOVE_0,
    "loss.category.sinkhorn_iterations": FROM_1,
    "loss.category.freeze_epochs": FROM_0,
    "loss.matching.weight": FROM_0,
    "loss.matching.layers": FROM_1,
    "loss.matching.heads": FROM_1,
    "loss.swapping.weight": FROM_0,
    "loss.swapping.probability": SHARE,
    "loss.swapping.margin": FROM_0,
    "loss.swapping.local_share": FROM_0,
    "evaluate.max_studies": FROM_1,
    "evaluate.retrieval_pool": Range(2),
    "evaluate.bootstrap": FROM_1,
    "evaluate.examples": FROM_0,
    "transfer.val_share": SHARE_BELOW_1,
    "transfer.fractions": Range(0, 100, is_open_below=True),  # percent
    "transfer.seeds": Range(0, MOST_SEED),
    "transfer.image_px": Range(0, 16384),
    "transfer.epochs": FROM_1,
    "transfer.max_steps": FROM_0,
    "transfer.epoch_steps": FROM_0,
    "transfer.batch": FROM_1,
    "transfer.lr": Range(0, 1000),
    "transfer.encoder_lr": Range(0, 1000),
    "transfer.weight_decay": Range(0, 1000),
    "transfer.patience": FROM_1,
    "transfer.decoder_width": FROM_0,
    "transfer.nms_iou": SHARE,
    "transfer.score_cut": SHARE,
    "transfer.compat_score_cut": SHARE,
    "transfer.iou_thresholds": Range(0, 1, is_open_below=True, is_open_above=True),
    "transfer.cache_gib": FROM_0,
}


def check_bounds(settings: Mapping[str, Any]) -> None:
    """Raise ConfigError for the first number outside its range.

    Shapes:  settings dotted key -> value, as typed_tree.flatten gives them; keys without a range
             are looked at for NaN and infinity only
    """
    for key, value in settings.items():
        allowed = BOUNDS.get(_as_a_setting(key))
        for number in value if isinstance(value, list | tuple) else (value,):
            if isinstance(number, bool) or not isinstance(number, int | float):
                continue
            if not (allowed or Range()).holds(number):
                raise ConfigError(f"{key}={number}: expected {allowed or 'a finite number'}")


def _as_a_setting(key: str) -> str:
    """transfer.by_fraction.1.batch is a transfer.batch."""
    parts = key.split(".")
    return f"transfer.{parts[-1]}" if parts[:2] == ["transfer", "by_fraction"] else key
