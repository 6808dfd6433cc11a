"""Settings that are read only where another one is as it must be: typed beside another value of
that, they are refused (given.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


def below(section: str, names: str) -> tuple[str, ...]:
    """Dotted names of settings of a section, given with blanks between."""
    return tuple(f"{section}.{name}" for name in names.split())


# of all that draws crops of images: pre-training, and the one task that tunes an encoder on them
CROPS = below("data.augment", "random_crop brightness contrast rotation_degrees")
PHANTOMS = below("data.phantom", "val_studies test_studies image_px seed test_seed file_format")


@dataclass(frozen=True)
class Needs:
    """Settings that are read only where another one is as it must be."""

    settings: tuple[str, ...]
    other: str
    holds: Callable[[Any], bool]
    remedy: str  # a value of `other`


NEEDS = (
    Needs(("train.epochs",), "train.max_steps", lambda n: n == 0, "0"),
    Needs(("train.momentum",), "train.optimizer", lambda kind: kind == "muon", "muon"),
    Needs(("train.monitor_pairs",), "train.monitor", lambda kind: kind != "none", "loss"),
    Needs(PHANTOMS, "data.phantom.studies", lambda n: n > 0, "1000"),
    # of a vocabulary that is trained
    *(
        Needs(("data.vocab_size", "data.vocab_min_patients"), other, lambda s: s is None, "null")
        for other in ("model.text.tokenizer", "model.text.source", "train.start")
    ),
    # a folder brings its sizes
    Needs(("model.vision.options",), "model.vision.source", lambda s: s is None, "null"),
    Needs(("model.text.options",), "model.text.source", lambda s: s is None, "null"),
    Needs(
        ("model.vision.pool_heads",), "model.vision.pool", lambda k: k == "attention", "attention"
    ),
    Needs(
        ("model.divergence.beta_kl",),
        "model.divergence.kind",
        lambda kind: kind == "gaussian",
        "gaussian",
    ),
    Needs(
        below("model.divergence", "dropout beta_spread"),
        "model.divergence.kind",
        lambda kind: kind != "none",
        "gaussian",
    ),
    Needs(
        below("model.divergence", "kind dropout beta_kl beta_spread"),
        "loss.global_contrastive.weight",
        lambda weight: weight > 0,
        "1.0",
    ),
    Needs(
        ("loss.local_alignment.attention_scale",),
        "loss.local_alignment.pooling",
        lambda kind: kind != "max",
        "attention",
    ),
    Needs(
        ("loss.local_alignment.knowledge_scale",),
        "loss.local_alignment.knowledge_gain",
        lambda gain: gain > 0,
        "0.5",
    ),
    Needs(
        ("loss.local_alignment.aggregation_scale",),
        "loss.local_alignment.aggregation",
        lambda kind: kind == "lse",
        "lse",
    ),
    Needs(
        below(
            "loss.category",
            "prototypes sinkhorn_temperature prediction_temperature sinkhorn_iterations "
            "freeze_epochs knowledge_terms",
        ),
        "loss.category.weight",
        lambda weight: weight > 0,
        "0.5",
    ),
    Needs(
        ("loss.matching.layers", "loss.matching.heads"),
        "loss.matching.weight",
        lambda weight: weight > 0,
        "0.5",
    ),
    Needs(
        below("loss.swapping", "probability margin local_share"),
        "loss.swapping.weight",
        lambda weight: weight > 0,
        "0.5",
    ),
    Needs(
        # not epochs, steps and batch: one budget for a list of tasks
        below("transfer", "lr weight_decay monitor by_fraction"),
        "transfer.probe",
        lambda kind: kind == "adamw",
        "adamw",
    ),
    Needs(("knowledge.dim",), "knowledge.vectors", lambda k: k in ("tfidf", "text_tower"), "tfidf"),
    Needs(
        ("evaluate.threshold_rule",),
        "transfer.task",
        lambda task: task in ("none", "classification"),
        "classification",
    ),
    Needs(("evaluate.threshold_rule",), "transfer.exclusive", lambda is_so: not is_so, "false"),
    Needs(("evaluate.checkpoint",), "transfer.start", lambda s: s != "imagenet", "checkpoint"),
    Needs(
        CROPS,
        "transfer.task",
        lambda task: task in ("none", "classification"),
        "classification",
    ),
    Needs(CROPS, "transfer.encoder", lambda encoder: encoder == "tuned", "tuned"),
    Needs(
        below("transfer", "box_loss nms_iou score_cut compat_score_cut iou_thresholds"),
        "transfer.task",
        lambda task: task in ("none", "detection"),
        "detection",
    ),
    Needs(
        ("transfer.mask_source",),
        "transfer.task",
        lambda task: task in ("none", "segmentation"),
        "segmentation",
    ),
    Needs(("transfer.subset_of",), "transfer.subset", lambda name: name is not None, "NAME"),
)
