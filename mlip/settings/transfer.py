"""Settings of the tasks that train something on a checkpoint's image encoder (mlip evaluate).

What does not live here: zero-shot, retrieval and grounding, which train nothing (evaluate.py).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from mlip.settings.typed_tree import ConfigError, require

BY_PROJECTION = "projections"  # a value of evaluate.subgroups: a column of views by what they mean
UNCERTAIN = ("one", "zero", "ignore")
# what may differ between fractions
BY_FRACTION = {"batch": int, "lr": float, "epochs": int, "patience": int, "max_steps": int}
# settings that one could mean for any task -> those that read them; others say by their names what
# they are of (box_loss, decoder_width), and settings that are shared by tasks may hold them
_OF_TASKS = {
    **dict.fromkeys(("exclusive", "blank", "probe"), ("classification",)),
    **dict.fromkeys(("fit", "precision"), ("segmentation", "detection")),
}


@dataclass(frozen=True, kw_only=True)
class AnnotationColumns:
    """Which manifest column holds which annotation, as `mlip prepare` names them; null = none."""

    uncertain: str | None = None  # finding names joined by "|" that the publisher calls uncertain
    negative: str | None = None  # finding names joined by "|" that are stated to be absent
    boxes: str | None = None  # JSON [[x, y, w, h, class], ...]; null = boxes.csv beside it
    mask: str | None = None  # run lengths, or path of a mask image (255 in, 127 ignore, 0 out)
    subset: str | None = None  # name of a published list that holds the image
    # height in px of the image that boxes and masks refer to; null = the file's own
    source_height: str | None = None
    source_width: str | None = None  # width in px of that image; null = the file's own


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """A task that `mlip evaluate` trains on an image encoder: labels, masks or boxes."""

    # what is trained: nothing, a classifier of findings, masks or boxes
    task: Literal["none", "classification", "segmentation", "detection"] = "none"
    # where the encoder's weights come from; imagenet: model.vision.source, random: new ones
    start: Literal["checkpoint", "imagenet", "random"] = "checkpoint"
    # frozen: as it is, in eval mode, running statistics too; tuned: trained as well
    encoder: Literal["frozen", "tuned"] = "frozen"
    columns: AnnotationColumns = field(default_factory=AnnotationColumns)
    # class -> what an uncertain label of it counts as (one, zero, ignore); order = output order
    classes: dict[str, Any] = field(default_factory=dict)
    exclusive: bool = False  # exactly one class is true of an image: softmax instead of sigmoids
    # what a class counts as where a row says nothing of it: absent, or left out
    blank: Literal["zero", "ignore"] = "zero"
    subset: str | None = None  # test only on rows of this subset (transfer.columns.subset)
    subset_of: Literal["test", "all"] = "test"  # which splits are cut down to the subset
    val_share: float = 0.0  # share of training patients for val, where the manifest has no val
    fractions: tuple[float, ...] = (1.0, 10.0, 100.0)  # % of the training patients, a fit for each
    # what differs at some of the fractions: batch, lr, epochs, patience or max_steps, as
    # {1: {batch: 8, lr: 2.0e-4}}
    by_fraction: dict[str, Any] = field(default_factory=dict)
    # seeds of the draw, the new weights and the order: a fit for each
    seeds: tuple[int, ...] = (1, 2, 3)
    balance: bool = False  # train on all positives and as many negatives (SIIM's protocol)
    image_px: int = 0  # side of the encoder's input in px; 0 = data.crop_px
    # how an image with masks or boxes becomes square: by black margins, or stretched
    fit: Literal["letterbox", "stretch"] = "letterbox"
    # what masks are read from: transfer.columns.mask, boxes filled, or the truth of phantoms
    mask_source: Literal["mask", "boxes", "phantom"] = "mask"
    # how a linear classifier is fitted; logistic: by L-BFGS, its strength chosen on val
    probe: Literal["adamw", "logistic"] = "adamw"
    epochs: int = 50  # passes over the drawn rows (or transfer.epoch_steps each), at most
    max_steps: int = 0  # steps of one fit, at most; 0 = by transfer.epochs
    epoch_steps: int = 0  # fewest steps between two looks at val: small draws are gone over again
    # number format of networks for masks and boxes; auto: bf16 where the device multiplies it
    precision: Literal["fp32", "bf16", "auto"] = "fp32"
    batch: int = 48  # images of a step
    lr: float = 5e-4  # learning rate of the new weights
    encoder_lr: float = 0.0  # learning rate of a tuned encoder; 0 = transfer.lr
    weight_decay: float = 1e-6  # AdamW's pull of the weights towards 0
    patience: int = 10  # epochs without a better val score before a fit stops
    monitor: Literal["loss", "score"] = "loss"  # what of val picks the best epoch
    augment: bool = True  # change training images, where the encoder sees them anew each epoch
    decoder_width: int = 0  # channels of the finest decoder level; 0 = as published
    # detection: mean over the whole grid, or over objects
    box_loss: Literal["grid", "objects"] = "grid"
    nms_iou: float = 0.5  # detection: of two boxes that overlap more than this the better one stays
    score_cut: float = 0.001  # detection: lowest score of a box that counts in the strict mAP
    compat_score_cut: float = 0.5  # detection: the same in the published form of mAP
    # detection: overlaps from which a box counts as found; mAP is the mean over them
    iou_thresholds: tuple[float, ...] = (0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75)
    # GiB of memory for decoded images, and as much for a frozen encoder's levels
    cache_gib: float = 4.0

    def __post_init__(self) -> None:
        # files are merged key by key: null is how a later one takes a class away
        kept = {str(name): policy for name, policy in self.classes.items() if policy is not None}
        object.__setattr__(self, "classes", kept)
        read = {
            key: {name: _read(value) for name, value in changes.items()}
            if isinstance(changes, dict)
            else changes
            for key, changes in self.by_fraction.items()
        }
        object.__setattr__(self, "by_fraction", read)


def at_fraction(transfer: Transfer, percent: float) -> Transfer:
    """The settings of fits on `percent` of the patients: by_fraction laid over the rest."""
    for key, changes in transfer.by_fraction.items():
        if float(key) == percent:
            return dataclasses.replace(
                transfer, **{name: BY_FRACTION[name](value) for name, value in changes.items()}
            )
    return transfer


def check(transfer: Transfer) -> None:
    """Raise ConfigError for a value that cannot be honoured."""
    for name, policy in transfer.classes.items():
        require(
            policy in UNCERTAIN,
            f"transfer.classes.{name}={policy!r}: expected what an uncertain label counts as: "
            f"{', '.join(UNCERTAIN)}",
        )
    columns = transfer.columns
    require(
        (columns.source_height is None) == (columns.source_width is None),
        "transfer.columns.source_height and source_width are one size: name both, or none",
    )
    require(len(transfer.fractions) > 0, "transfer.fractions is empty: expected percentages")
    require(
        # results and predictions call a fraction by its six digits
        len({f"{percent:g}" for percent in transfer.fractions}) == len(transfer.fractions),
        f"transfer.fractions={list(transfer.fractions)}: expected each percentage once, of which "
        "six digits are told",
    )
    for key, changes in transfer.by_fraction.items():
        require(
            _is_number(key) and 0.0 < float(key) <= 100.0,
            f"transfer.by_fraction: expected a percentage of transfer.fractions, got {key!r}",
        )
        require(
            isinstance(changes, dict)
            and changes.keys() <= BY_FRACTION.keys()
            and all(_is_of(BY_FRACTION[name], value) for name, value in changes.items()),
            f"transfer.by_fraction.{key}: expected numbers for {', '.join(BY_FRACTION)}, all "
            f"but lr whole ones, got {changes!r}",
        )
    require(
        # "1" and "1.0" of two files: the settings of the second would be passed over
        len({float(key) for key in transfer.by_fraction}) == len(transfer.by_fraction),
        f"transfer.by_fraction has {list(transfer.by_fraction)}: expected each percentage once",
    )
    require(len(transfer.seeds) > 0, "transfer.seeds is empty: expected at least one seed")
    require(
        len(set(transfer.seeds)) == len(transfer.seeds),
        f"transfer.seeds={list(transfer.seeds)}: a seed counted twice is one seed; name others",
    )
    for name, tasks in _OF_TASKS.items():
        value, usual = getattr(transfer, name), getattr(Transfer(), name)
        require(
            transfer.task in ("none", *tasks) or value == usual,
            f"transfer.{name}={value} is for {' and '.join(tasks)}, and transfer.task="
            f"{transfer.task} would not read it: leave it out (transfer.{name}={usual})",
        )
    require(
        not (transfer.encoder_lr > 0.0 and transfer.encoder == "frozen"),
        "transfer.encoder_lr is the rate of a tuned encoder, and transfer.encoder=frozen has none: "
        "set transfer.encoder=tuned to fine-tune, or transfer.encoder_lr=0",
    )
    require(
        not (transfer.task == "classification" and not transfer.classes),
        "transfer.classes is empty: name each class and what its uncertain labels count as, for "
        "example transfer.classes={Edema: one}",
    )
    require(
        not (transfer.exclusive and len(transfer.classes) < 2),
        "transfer.exclusive=true needs at least two classes",
    )
    require(
        not (transfer.exclusive and transfer.balance),
        "transfer.balance=true takes as many images without a class as there are with one, and "
        "with transfer.exclusive=true each image has one: leave out one of the two",
    )
    require(
        not (transfer.probe == "logistic" and transfer.encoder == "tuned"),
        "transfer.probe=logistic works on frozen features; set transfer.encoder=frozen",
    )
    require(
        len(transfer.iou_thresholds) > 0,
        "transfer.iou_thresholds is empty: expected overlaps between 0 and 1",
    )
    require(
        len(set(transfer.iou_thresholds)) == len(transfer.iou_thresholds),
        f"transfer.iou_thresholds={list(transfer.iou_thresholds)}: expected each overlap once",
    )
    require(
        transfer.task != "detection" or transfer.compat_score_cut >= transfer.score_cut,
        f"transfer.compat_score_cut={transfer.compat_score_cut} is below transfer.score_cut="
        f"{transfer.score_cut}: boxes under the second are in no score; lower it",
    )


def threshold_rule(text: str) -> tuple[str, float]:
    """evaluate.threshold_rule as (name, share); the share is 0 where the rule has none.

    Raises:  ConfigError for another rule, or a share that is not between 0 and 1.
    """
    name, _, share = text.partition("=")
    if text in ("f1", "youden"):
        return text, 0.0
    if name in ("sensitivity", "specificity") and _is_number(share) and 0.0 < float(share) <= 1.0:
        return name, float(share)
    raise ConfigError(
        f"evaluate.threshold_rule={text!r}: expected f1, youden, sensitivity=S or specificity=S "
        "with S above 0 and at most 1, as sensitivity=0.95"
    )


def _read(value: Any) -> Any:
    """YAML takes 2e-4 for text, and its range would not be looked at."""
    return float(value) if isinstance(value, str) and _is_number(value) else value


def _is_of(kind: type, value: Any) -> bool:
    return _is_number(value) and (kind is float or float(value).is_integer())


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return not isinstance(value, bool)
