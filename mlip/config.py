"""Every setting of a run, typed and frozen, and how YAML files and overrides become one Config.

What does not live here: any default that depends on data, and any logic beyond validation. The
DeepSpeed dictionary is derived from these classes (training/deepspeed_json.py); there is no second
truth.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mlip.config_agreement import check_agreement
from mlip.config_bounds import check_bounds
from mlip.config_file import read_file, read_override, without_view
from mlip.transfer_settings import Transfer
from mlip.typed_tree import ConfigError, build, check_keys, flatten, merge, plain


@dataclass(frozen=True, kw_only=True)
class Run:
    dir: str = "runs/default"  # everything a run writes goes below this folder
    seed: int = 1
    exact: bool = False  # refuse whatever makes the loss depend on ranks or micro-batches
    deterministic: bool = False  # refuse what cannot repeat bit for bit on this machine
    threads: int = 0  # torch threads per rank; 0 = cores (of a container's share) / local ranks
    offline: bool = True  # no model hub, no network; False only when the user asks
    timeout_s: float = 300.0  # longest wait of one rank for another before the run stops


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Which manifest column holds which field; None = the manifest has no such column."""

    image: str = "image"  # path of the image file, relative to data.root
    report: str | None = "report"  # text; empty = image-only row
    patient_id: str = "patient_id"
    study_id: str | None = "study_id"  # None = every row is a study of its own
    image_id: str | None = None  # None = the image path
    split: str | None = "split"  # train | val | test; None = split by hash of patient_id
    sha256: str | None = None  # of the image file; read by data.verify
    labels: str | None = None  # finding names joined by "|", for evaluation only


@dataclass(frozen=True, kw_only=True)
class Augment:
    """Training-time image changes; never a horizontal flip: reports say left and right."""

    random_crop: bool = True  # False = centre crop
    brightness: float = 0.1  # factor drawn from 1 +- this
    contrast: float = 0.1
    rotation_degrees: float = 0.0  # at most, either way; DALI refuses it on a CPU: docs/data.md
    sentence_dropout: float = 0.5  # probability that a report keeps a random subset of sentences


@dataclass(frozen=True, kw_only=True)
class Phantom:
    """Generated studies (dataloading/phantom.py), made where the manifest's folder lacks them."""

    studies: int = 0  # training studies; 0 = never generate
    val_studies: int = 256
    test_studies: int = 1000
    image_px: int = 144
    seed: int = 1  # training and validation patients
    test_seed: int = 1_000_001  # test patients: a stream of their own
    file_format: Literal["png", "dicom"] = "png"


@dataclass(frozen=True, kw_only=True)
class Data:
    manifest: str = ""  # CSV, Parquet or JSONL
    root: str | None = None  # folder that image paths are relative to; None = the manifest's
    columns: Columns = field(default_factory=Columns)
    pipeline: Literal["auto", "dali", "torch"] = "auto"
    verify: Literal["hash", "sample", "none"] = "none"
    resize_px: int = 256  # letterbox: longest side scaled to this, the rest black
    crop_px: int = 224
    channels: Literal[1, 3] = 3
    mean: float = 0.5  # of intensities in [0, 1], one value: radiographs are grey
    std: float = 0.25
    max_tokens: int = 112  # with [CLS] and [SEP]
    max_entities: int = 16  # linked mentions kept per report, the first ones; repeats count once
    vocab_size: int = 4096  # of a vocabulary trained on the training split
    # words of fewer patients' reports teach it no piece, so that no name becomes one
    vocab_min_patients: int = 5
    sections: Literal["all", "findings", "impression"] = "all"
    empty_report: Literal["exclude", "image_only"] = "exclude"
    bad_share: float = 0.01  # stop with exit code 3 once more than this share of rows is bad
    workers: int = 1  # loader threads (DALI) or threads of the torch twin, per rank
    prefetch: int = 2  # batches made ahead
    augment: Augment = field(default_factory=Augment)
    phantom: Phantom = field(default_factory=Phantom)


@dataclass(frozen=True, kw_only=True)
class Batches:
    global_pairs: int = 144  # pairs whose negatives are each other, over all ranks
    micro_images: int = 0  # images per tower pass per rank; 0 = all at once
    micro_texts: int = 0


@dataclass(frozen=True, kw_only=True)
class Train:
    # an export, a run or a checkpoint whose model is the first one; its settings by --config
    start: str | None = None
    max_steps: int = 0  # 0 = by epochs
    epochs: float = 50.0
    lr: float = 2e-5
    lr_reference_pairs: int = 144  # lr is scaled by sqrt(global_pairs / this); 0 = not scaled
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: of weight matrices, for small towers
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.98)
    momentum: float = 0.95  # Muon's
    warmup_steps: int = 100
    decay_share: float = 1.0  # of the steps after the warm-up: the last ones, in which lr falls
    min_lr_share: float = 0.0  # the cosine ends at lr times this
    clip_norm: float = 1.0  # 0 = not clipped
    ema_decay: float = 0.0  # of an average of the weights, saved apart; 0 = none, 0.999 is usual
    # of the towers' passes; weights stay float32. auto: bf16 where the device multiplies it
    precision: Literal["fp32", "bf16", "auto"] = "fp32"
    # in a pass of bf16: what a transformer's layers add to, and results of LayerNorms
    residual: Literal["fp32", "bf16"] = "fp32"
    engine: Literal["auto", "deepspeed", "plain"] = "auto"  # auto: DeepSpeed under a launcher
    zero_stage: Literal[0, 1, 2, 3] = 1
    compile: bool = False  # towers by torch.compile: minutes first; gain: docs/performance.md
    offload: bool = False  # optimiser states in host memory (ZeRO >= 1 on a GPU)
    checkpoint_steps: int = 500
    keep_checkpoints: int = 2
    # scored on val at every checkpoint: the contrastive loss, or recall@10 of the global head; the
    # best checkpoint is kept too, and is what the run's folder stands for (docs/training.md)
    monitor: Literal["none", "loss", "recall"] = "none"
    monitor_pairs: int = 1000  # of val, at most
    patience: int = 0  # checkpoints in a row without a better score that end a run; 0 = none do
    log_steps: int = 20
    max_nan_steps: int = 3  # in a row of non-finite loss or gradient before the run stops
    spike_factor: float = 0.0  # a loss this many times the recent median is run again; 0 = off
    tensorboard: bool = False


@dataclass(frozen=True, kw_only=True)
class Vision:
    kind: Literal["resnet", "vit"] = "resnet"
    source: str | None = None  # local directory or hub id; None = random weights from `options`
    options: dict[str, Any] = field(default_factory=dict)  # transformers config values
    stem: Literal["tower", "deep"] = "tower"  # ResNet: deep = three 3 x 3 convolutions, for lines
    patch_stage: int = 2  # ResNet: the stage whose grid gives the patches (0-based)
    patch_pool: int = 1  # ResNet: average-pool the patch grid by this factor
    norm: Literal["batch", "group", "frozen"] = "batch"  # ResNet's normalisation
    position_grid: bool = False  # learned position grid added to the patches before the neck
    neck_blocks: int = 0  # pointwise residual blocks after the grid (no receptive field added)
    pool: Literal["tower", "attention"] = "tower"  # global feature: the tower's own, or attention
    pool_heads: int = 8  # of attention pooling: each looks for its own few patches
    checkpointing: bool = False  # activation checkpointing inside the tower


@dataclass(frozen=True, kw_only=True)
class Text:
    source: str | None = None
    # local directory; None = `source`, then local too, or trained on the training split
    tokenizer: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    pool: Literal["cls", "attention"] = "cls"  # global feature: [CLS], or attention over tokens
    packed: bool = False  # padding is left out of all layers but attention
    checkpointing: bool = False


@dataclass(frozen=True, kw_only=True)
class Heads:
    hidden: int = 2048
    norm: Literal["layer", "batch"] = "layer"


@dataclass(frozen=True, kw_only=True)
class Divergence:
    kind: Literal["gaussian", "dropout", "none"] = "gaussian"
    dropout: float = 0.1
    beta_kl: float = 0.1
    beta_spread: float = 0.1


@dataclass(frozen=True, kw_only=True)
class Model:
    embed_dim: int = 128
    # varlen: sdpa, with no padded copy of packed reports
    attention: Literal["sdpa", "xformers", "eager", "varlen"] = "sdpa"
    vision: Vision = field(default_factory=Vision)
    text: Text = field(default_factory=Text)
    heads: Heads = field(default_factory=Heads)
    divergence: Divergence = field(default_factory=Divergence)


@dataclass(frozen=True, kw_only=True)
class Knowledge:
    lexicon: str | None = None  # concept folder or file; None = the project's own
    vectors: str = "tfidf"  # "tfidf" | "text_tower" | path of a safetensors table
    dim: int = 128  # of the TF-IDF vectors
    weight_present: float = 1.0  # weight of a mention as a row of the local score
    weight_uncertain: float = 0.5
    weight_absent: float = 0.0
    pair_id_by_concepts: bool = False  # equal sets of present concepts share a pair_id
    cache_dir: str | None = None


@dataclass(frozen=True, kw_only=True)
class GlobalContrastive:
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class LocalAlignment:
    weight: float = 1.0
    kind: Literal["token_knowledge_patch", "mgca"] = "token_knowledge_patch"
    pooling: Literal["attention", "context", "max"] = "attention"
    aggregation: Literal["mean", "lse"] = "mean"
    attention_scale: float = 10.0
    knowledge_scale: float = 10.0
    knowledge_gain: float = 0.5
    knowledge_share: float = 0.25
    aggregation_scale: float = 5.0
    learn_scales: bool = True
    token_weights: Literal["uniform", "attention"] = "uniform"
    impl: Literal["auto", "triton", "torch"] = "auto"


@dataclass(frozen=True, kw_only=True)
class Category:
    weight: float = 0.5
    prototypes: int = 256
    sinkhorn_temperature: float = 0.05
    prediction_temperature: float = 0.2
    sinkhorn_iterations: int = 3
    freeze_epochs: float = 1.0  # prototypes get no gradient before this
    knowledge_terms: bool = True  # False = plain prototypes (MGCA)


@dataclass(frozen=True, kw_only=True)
class Matching:
    weight: float = 0.5
    layers: int = 2
    heads: int = 4


@dataclass(frozen=True, kw_only=True)
class Swapping:
    weight: float = 0.5
    probability: float = 0.5
    margin: float = 0.4
    local_share: float = 0.5  # sim = v.t + this * S


@dataclass(frozen=True, kw_only=True)
class Loss:
    global_contrastive: GlobalContrastive = field(default_factory=GlobalContrastive)
    local_alignment: LocalAlignment = field(default_factory=LocalAlignment)
    category: Category = field(default_factory=Category)
    matching: Matching = field(default_factory=Matching)
    swapping: Swapping = field(default_factory=Swapping)


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    after_training: bool = True  # False = train.py ends with its last checkpoint, without scores
    split: Literal["train", "val", "test"] = "test"
    max_studies: int = 1000
    retrieval_pool: int = 256  # recall is measured inside pools of this many pairs
    bootstrap: int = 500  # resamples by patient behind each interval
    checkpoint: str | None = None  # None = run.dir's best on val, else newest
    weights: Literal["trained", "ema"] = "trained"  # "ema": the average of train.ema_decay
    # manifests of the checkpoint's training, and of those before it: is a scored patient in them?
    trained_on: tuple[str, ...] = ()
    examples: int = 6  # pictures in the report
    subset: str | None = None  # only rows of this subset (transfer.columns.subset), as 5x200
    exclusive: bool = False  # exactly one label is true of an image: accuracy by the best score
    thresholds: bool = True  # yes-or-no scores at thresholds of val, where there is a val split
    # how val chooses them: f1, youden, sensitivity=S or specificity=S
    threshold_rule: str = "f1"
    # manifest's column -> numbers that cut it into ranges, [] = a group a value, projections = of
    # views: LL, RL and LATERAL are one group; null takes one out
    subgroups: dict[str, Any] = field(default_factory=dict)  # {sex: [], age: [20, 40, 60, 80]}
    show_text: bool = False  # real report text on the page; phantoms always show theirs
    # sentences that state a label's concept and that deny it; {} is its name in the lexicon
    positive_prompts: tuple[str, ...] = ("{}.", "there is {}.", "findings of {}.")
    negative_prompts: tuple[str, ...] = ("no {}.", "there is no {}.", "no evidence of {}.")

    def __post_init__(self) -> None:
        # YAML takes a column called 2021 for a number
        kept = {str(name): edges for name, edges in self.subgroups.items() if edges is not None}
        object.__setattr__(self, "subgroups", kept)


@dataclass(frozen=True, kw_only=True)
class Config:
    run: Run = field(default_factory=Run)
    data: Data = field(default_factory=Data)
    batch: Batches = field(default_factory=Batches)
    train: Train = field(default_factory=Train)
    model: Model = field(default_factory=Model)
    knowledge: Knowledge = field(default_factory=Knowledge)
    loss: Loss = field(default_factory=Loss)
    evaluate: Evaluate = field(default_factory=Evaluate)
    transfer: Transfer = field(default_factory=Transfer)


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
    tree: dict[str, Any] = {}
    for name, given in (("files", files), ("overrides", overrides)):
        if isinstance(given, str | Path):  # would be read letter by letter
            raise ConfigError(f"{name}: expected a list, got {str(given)!r} alone: put it into one")
    for file in files:
        merge(tree, read_file(Path(file), Config, takes_exports=takes_exports), Config)
    for override in overrides:
        merge(tree, read_override(override, Config), Config)
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
