"""Every setting of a run, typed and frozen, and how YAML files and overrides become one Config.

What does not live here: any default that depends on data, and any logic beyond validation; the
sections that have a file of their own (losses.py, evaluate.py, transfer.py). The DeepSpeed
dictionary is derived from these classes (training/deepspeed_json.py); there is no second truth. So
is what `mlip settings` and docs/settings.md say: the words about a setting are the comment above or
behind its field, those about a section its docstring (reference.py).
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mlip.settings.agreement import check_agreement
from mlip.settings.bounds import check_bounds
from mlip.settings.config_file import read_file, read_override, without_view
from mlip.settings.evaluate import Evaluate
from mlip.settings.losses import Loss
from mlip.settings.transfer import Transfer
from mlip.settings.typed_tree import ConfigError, build, check_keys, flatten, merge, plain


@dataclass(frozen=True, kw_only=True)
class Run:
    """Where a run writes, and how it computes."""

    dir: str = "runs/default"  # folder of everything that the run writes
    seed: int = 1  # for random numbers: weights, order, noise; an evaluation's draws and resamples
    exact: bool = False  # refuse whatever makes the loss depend on ranks or micro-batches
    deterministic: bool = False  # refuse what cannot repeat bit for bit on this machine
    threads: int = 0  # torch threads per rank; 0 = cores (of a container's share) / local ranks
    offline: bool = True  # no model hub, no network; false = folders of towers may be downloaded
    timeout_s: float = 300.0  # longest wait of one rank for another before the run stops, in s


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Which manifest column holds which field; null = the manifest has no such column."""

    image: str = "image"  # path of the image file, relative to data.root
    report: str | None = "report"  # text of the report; rows without one: data.empty_report
    patient_id: str = "patient_id"  # who is on the image: no patient is in two splits
    study_id: str | None = "study_id"  # images of one study; null = every row is a study of its own
    image_id: str | None = None  # name of the image in tables and results; null = its path
    split: str | None = "split"  # train, val or test; null = split by a hash of patient_id
    sha256: str | None = None  # hash of the image file; read by data.verify
    labels: str | None = None  # finding names joined by "|"; pre-training reads none


@dataclass(frozen=True, kw_only=True)
class Augment:
    """Training-time changes of images and reports; never a flip: reports say left and right."""

    random_crop: bool = True  # crop at a random place; false = at the centre
    brightness: float = 0.1  # largest change: intensities times a factor drawn from 1 +- this
    contrast: float = 0.1  # largest change: distances from mid-grey times a factor of 1 +- this
    rotation_degrees: float = 0.0  # largest turn, either way; not with DALI on a CPU (docs/data.md)
    sentence_dropout: float = 0.5  # probability that a report keeps a random subset of sentences


@dataclass(frozen=True, kw_only=True)
class Phantom:
    """Generated chest studies: train.py makes them where the manifest's folder lacks them, `mlip
    phantoms` in a folder of its own."""

    studies: int = 0  # training studies; 0 = never generate
    val_studies: int = 256  # validation studies
    test_studies: int = 1000  # test studies
    image_px: int = 144  # width and height of an image
    seed: int = 1  # seed of training and validation patients
    test_seed: int = 1_000_001  # seed of test patients: a stream of their own
    file_format: Literal["png", "dicom"] = "png"  # format of the images


@dataclass(frozen=True, kw_only=True)
class Data:
    """What is read, and how images and reports become what a model takes."""

    manifest: str = ""  # table with a row per image: CSV, Parquet or JSONL
    root: str | None = None  # folder that image paths are relative to; null = the manifest's
    columns: Columns = field(default_factory=Columns)
    # what decodes images: NVIDIA's DALI or plain torch; auto: DALI where there is a GPU
    pipeline: Literal["auto", "dali", "torch"] = "auto"
    # which files are compared with data.columns.sha256 as they are read: hash, every one; sample,
    # each in one epoch of 100
    verify: Literal["hash", "sample", "none"] = "none"
    resize_px: int = 256  # letterbox: longest side scaled to this, the rest black
    crop_px: int = 224  # side of the square that is cut out of it: what a model sees
    channels: Literal[1, 3] = 3  # channels of a model's input; 3 = the grey picture three times
    mean: float = 0.5  # subtracted from intensities in [0, 1]; one value: radiographs are grey
    std: float = 0.25  # intensities are divided by this, after data.mean is subtracted
    max_tokens: int = 112  # tokens of a report at most, with [CLS] and [SEP]; the rest is cut off
    # mentions of concepts kept per report, the first ones; repeats count once
    max_entities: int = 16
    vocab_size: int = 4096  # word pieces of a vocabulary that is trained on the training split
    # words of fewer patients' reports teach that vocabulary no piece, so that no name becomes one
    vocab_min_patients: int = 5
    # which sections of a report with headings are read; all = both
    sections: Literal["all", "findings", "impression"] = "all"
    # rows without a usable report: left out, or kept for tasks that read images alone
    empty_report: Literal["exclude", "image_only"] = "exclude"
    bad_share: float = 0.01  # stop with exit code 3 once more than this share of rows is bad
    workers: int = 1  # loader threads (DALI) or threads of the torch pipeline, per rank
    prefetch: int = 2  # batches made ahead
    augment: Augment = field(default_factory=Augment)
    phantom: Phantom = field(default_factory=Phantom)


@dataclass(frozen=True, kw_only=True)
class Batches:
    """How many pairs a step has, and how many of them are in memory at once."""

    global_pairs: int = 144  # pairs of a step, over all ranks; the others are a pair's negatives
    micro_images: int = 0  # images per tower pass per rank, to save memory; 0 = all at once
    micro_texts: int = 0  # reports per tower pass per rank; 0 = all at once

    @property
    def is_cached(self) -> bool:
        """Whether a tower may make several passes of a batch, through the gradient cache."""
        return self.micro_images > 0 or self.micro_texts > 0


@dataclass(frozen=True, kw_only=True)
class Train:
    """How long a run trains, with which optimiser and engine, and what it keeps."""

    # export, run or checkpoint whose model a run begins with; give its settings by --config
    start: str | None = None
    max_steps: int = 0  # steps of the run; 0 = by train.epochs
    epochs: float = 50.0  # passes over the training split, where train.max_steps is 0
    lr: float = 2e-5  # highest learning rate, before train.lr_reference_pairs
    # lr is multiplied by sqrt(batch.global_pairs / this); 0 = lr as it stands
    lr_reference_pairs: int = 144
    # muon: Muon for weight matrices, AdamW for the rest; for small towers
    optimizer: Literal["adamw", "muon"] = "adamw"
    weight_decay: float = 0.05  # pulls weight matrices towards 0; not biases, norms and scales
    betas: tuple[float, float] = (0.9, 0.98)  # AdamW: how much of its two averages a step keeps
    momentum: float = 0.95  # Muon's momentum
    warmup_steps: int = 100  # steps in which lr rises from 0
    decay_share: float = 1.0  # lr falls over this last share of the steps after the warm-up
    min_lr_share: float = 0.0  # lr at the end of the run, as a share of its highest
    # largest norm of the gradient, over all weights; a longer one is cut to it; 0 = off
    clip_norm: float = 1.0
    # decay of a running average of the weights, saved apart; 0 = none, 0.999 usual
    ema_decay: float = 0.0
    # number format of the towers' passes; weights stay float32. auto: bf16 where the device
    # multiplies it
    precision: Literal["fp32", "bf16", "auto"] = "fp32"
    # bf16: a pass in bf16 also rounds the sums that a transformer's layers add to, and the results
    # of LayerNorms
    residual: Literal["fp32", "bf16"] = "fp32"
    # what runs the optimiser; auto: DeepSpeed where it is installed and a launcher or train.offload
    # asks for it, else plain torch
    engine: Literal["auto", "deepspeed", "plain"] = "auto"
    # what DeepSpeed splits among ranks: 1 optimiser states, 2 gradients too, 3 weights too
    zero_stage: Literal[0, 1, 2, 3] = 1
    # torch.compile of the towers: takes minutes at the start; gain: docs/performance.md
    compile: bool = False
    offload: bool = False  # keep optimiser states in host memory (train.zero_stage >= 1 on a GPU)
    checkpoint_steps: int = 500  # steps between checkpoints
    keep_checkpoints: int = 2  # newest checkpoints that stay; the best on val stays too
    # what is scored on val at every checkpoint: the contrastive loss, or recall@10 of the global
    # head; the best checkpoint is kept too, and is what the run's folder stands for
    # (docs/training.md)
    monitor: Literal["none", "loss", "recall"] = "none"
    monitor_pairs: int = 1000  # pairs of val that are scored, at most
    # end a run after so many checkpoints in a row without a better score; 0 = never
    patience: int = 0
    log_steps: int = 20  # steps between two lines of the log; log.jsonl has every step
    # end a run after so many steps in a row without finite loss and gradient
    max_nan_steps: int = 3
    # a step whose loss is over this many times the recent one runs again; 0 = off
    spike_factor: float = 0.0
    tensorboard: bool = False  # also write the log for TensorBoard, which must be installed
    # also write it for Weights & Biases: in the run's folder, sent only with WANDB_MODE=online
    wandb: bool = False
    # also write it for MLflow: in the run's folder, or where MLFLOW_TRACKING_URI says
    mlflow: bool = False


@dataclass(frozen=True, kw_only=True)
class Vision:
    """The image tower: a radiograph becomes one global vector and a grid of patch vectors."""

    kind: Literal["resnet", "vit"] = "resnet"  # the tower is a ResNet or a Vision Transformer
    # local folder in transformers' format, or hub id; null = random weights, by `options`
    source: str | None = None
    # config of a tower with random weights, in transformers' words, as {hidden_sizes: [64, 128]}
    options: dict[str, Any] = field(default_factory=dict)
    # ResNet's first layers: deep = three 3 x 3 convolutions, which see lines of one pixel
    stem: Literal["tower", "deep"] = "tower"
    patch_stage: int = 2  # ResNet: the stage whose grid gives the patches (0-based)
    patch_pool: int = 1  # ResNet: average-pool the patch grid by this factor
    # ResNet's normalisation: by the batch, by groups of channels, or by fixed statistics
    norm: Literal["batch", "group", "frozen"] = "batch"
    position_grid: bool = False  # add a learned position grid to the patches, before `neck_blocks`
    neck_blocks: int = 0  # pointwise residual blocks after the grid (no receptive field added)
    pool: Literal["tower", "attention"] = "tower"  # global feature: the tower's own, or attention
    pool_heads: int = 8  # heads of attention pooling: each looks for its own few patches
    checkpointing: bool = False  # compute the tower's layers twice: less memory, more time


@dataclass(frozen=True, kw_only=True)
class Text:
    """The text tower: a report becomes one global vector and a vector per token."""

    # local folder in transformers' format, or hub id; null = random weights, by `options`
    source: str | None = None
    # folder of a vocabulary; null = that of `source`, else trained on the training split
    tokenizer: str | None = None
    # config of a tower with random weights, in transformers' words, as {hidden_size: 128}
    options: dict[str, Any] = field(default_factory=dict)
    pool: Literal["cls", "attention"] = "cls"  # global feature: [CLS], or attention over tokens
    packed: bool = False  # leave padding out of all but attention: reports differ in length
    checkpointing: bool = False  # compute the tower's layers twice: less memory, more time


@dataclass(frozen=True, kw_only=True)
class Heads:
    """The two-layer heads that turn what towers give into embeddings."""

    hidden: int = 2048  # width of a head's inner layer
    # normalisation of that layer; batch = over the batch of all ranks, not with micro-batches
    norm: Literal["layer", "batch"] = "layer"


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """The divergence encoder: a second, noisy view of an embedding, in training only."""

    # how the view is made: a learned Gaussian, dropout alone, or no second view
    kind: Literal["gaussian", "dropout", "none"] = "gaussian"
    dropout: float = 0.1  # share of an embedding's numbers that is dropped
    beta_kl: float = 0.1  # weight of the term that keeps the Gaussian near its prior
    beta_spread: float = 0.1  # weight of the term that keeps a view from being its embedding


@dataclass(frozen=True, kw_only=True)
class Model:
    """Towers, heads and the width of an embedding."""

    embed_dim: int = 128  # length of an embedding: of images, reports, patches and tokens alike
    # how towers compute attention. varlen: sdpa, with no padded copy of packed reports
    attention: Literal["sdpa", "xformers", "eager", "varlen"] = "sdpa"
    vision: Vision = field(default_factory=Vision)
    text: Text = field(default_factory=Text)
    heads: Heads = field(default_factory=Heads)
    divergence: Divergence = field(default_factory=Divergence)


@dataclass(frozen=True, kw_only=True)
class Knowledge:
    """Which medical concepts are found in reports, and what a mention of one counts."""

    lexicon: str | None = None  # concept folder or file; null = the project's own
    # what a concept's vector is made of: tfidf, text_tower, or the path of a safetensors table
    vectors: str = "tfidf"
    dim: int = 128  # length of a concept's vector; a table brings its own
    weight_present: float = 1.0  # weight, in the local score, of a mention that states its concept
    weight_uncertain: float = 0.5  # the same of a mention that a report doubts
    weight_absent: float = 0.0  # the same of a mention that a report denies
    # reports that state the same concepts are no negatives of each other
    pair_id_by_concepts: bool = False
    cache_dir: str | None = None  # folder that keeps the concepts' vectors; null = made each time


@dataclass(frozen=True, kw_only=True)
class Config:
    """All settings, section by section."""

    run: Run = field(default_factory=Run)
    data: Data = field(default_factory=Data)
    batch: Batches = field(default_factory=Batches)
    train: Train = field(default_factory=Train)
    model: Model = field(default_factory=Model)
    knowledge: Knowledge = field(default_factory=Knowledge)
    loss: Loss = field(default_factory=Loss)
    evaluate: Evaluate = field(default_factory=Evaluate)
    transfer: Transfer = field(default_factory=Transfer)


Named = tuple[str | None, Mapping[str, Any]]  # a file, None for an override; its settings


def sort_settings(items: Iterable[str]) -> tuple[list[str], list[str]]:
    """(files, overrides) of a command line; a path may have "=" in its name, as runs/lr=0.1."""
    items = list(items)
    is_file = ["=" not in item or os.path.exists(item) for item in items]
    files = [item for item, yes in zip(items, is_file, strict=True) if yes]
    return files, [item for item, yes in zip(items, is_file, strict=True) if not yes]


def load(
    files: Iterable[str | Path] = (),
    overrides: Iterable[str] = (),
    *,
    takes_exports: bool = False,
) -> Config:
    """One Config from YAML files (later wins) and ``a.b=value`` overrides (YAML values).

    files    YAML files; a run's folder stands for its config.yaml, and with takes_exports the
             folder of an export for the settings in it
    Raises:  ConfigError naming the file or override, the key, the nearest valid key or the
             expected type, or the two settings that contradict each other.
    Source:  ours.
    """
    return assemble(read(files, overrides, takes_exports=takes_exports))


def read(
    files: Iterable[str | Path] = (),
    overrides: Iterable[str] = (),
    *,
    takes_exports: bool = False,
) -> list[Named]:
    """(file, or None for an override; its settings) in the order in which a later one wins.

    files, overrides, takes_exports, Raises: as load
    """
    for name, given in (("files", files), ("overrides", overrides)):
        if isinstance(given, str | Path):  # would be read letter by letter
            raise ConfigError(f"{name}: expected a list, got {str(given)!r} alone: put it into one")
    found: list[Named] = [
        (str(file), read_file(Path(file), Config, takes_exports=takes_exports)) for file in files
    ]
    return found + [(None, read_override(override, Config)) for override in overrides]


def assemble(named: Iterable[Named]) -> Config:
    """One Config from what read gave, a later one laid over an earlier one.

    Raises:  ConfigError for a wrong type or number, or two settings that contradict each other
    """
    tree: dict[str, Any] = {}
    for _, part in named:
        merge(tree, part, Config)
    config = build(Config, tree, "")
    check_bounds(flatten(to_dict(config)))
    check_agreement(config)
    return config


def from_dict(tree: Mapping[str, Any]) -> Config:
    """The Config that to_dict gave, of an earlier version too: types and ranges checked again.

    Not what settings must agree on: a run that was trained with some that do nothing has weights.
    """
    tree = without_view(tree)
    check_keys(tree, Config, where="saved config")
    config = build(Config, tree, "")
    check_bounds(flatten(to_dict(config)))
    return config


def to_dict(config: Config) -> dict[str, Any]:
    """Plain nested dictionaries and lists, ready for YAML or JSON."""
    return plain(dataclasses.asdict(config))


def difference(left: Config, right: Config) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (left value, right value) for every setting that differs."""
    a, b = flatten(to_dict(left)), flatten(to_dict(right))
    return {
        key: (a.get(key), b.get(key))
        for key in sorted(a.keys() | b.keys())
        if a.get(key) != b.get(key)
    }
