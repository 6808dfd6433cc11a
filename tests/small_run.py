"""A run small enough for tests: 64 phantom studies, an untrained model of 32 dimensions."""

from __future__ import annotations

import csv
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

from mlip.dataloading.manifest import Manifest, load_manifest
from mlip.dataloading.phantom.dataset import write_dataset
from mlip.dataloading.reports.tokenizer import ReportTokenizer, train_tokenizer
from mlip.knowledge.concept_files import load_concepts
from mlip.knowledge.concepts import ConceptTable
from mlip.knowledge.linker import Linker, linker_of
from mlip.knowledge.vectors import knowledge_vectors
from mlip.model import MLIPModel
from mlip.pretrained import save_pretrained
from mlip.settings.config import Config, load
from mlip.transfer.alignment.evaluation import evaluate_run
from tests.temporary import shared_folder

SETTINGS = (
    "data.resize_px=112",
    "data.crop_px=96",
    "data.channels=1",
    "data.max_tokens=64",
    "data.vocab_size=400",
    "data.columns.labels=labels",
    "data.phantom.studies=32",
    "data.phantom.val_studies=0",
    "data.phantom.test_studies=32",
    "data.phantom.image_px=112",
    "data.pipeline=torch",
    "model.embed_dim=32",
    "model.heads.hidden=32",
    "model.vision.options={embedding_size: 8, hidden_sizes: [8, 16], depths: [1, 1], "
    "layer_type: basic}",
    "model.vision.patch_stage=1",
    "model.vision.pool=attention",
    "model.text.options={hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2, "
    "intermediate_size: 32}",
    "knowledge.dim=16",
    "evaluate.retrieval_pool=16",
    "evaluate.bootstrap=40",
    "evaluate.examples=2",
)


@dataclass(frozen=True)
class SmallRun:
    """The parts of the run; its folder is removed with the machine's temporary files."""

    folder: Path
    settings: tuple[str, ...]  # overrides that lead to `config`
    config: Config
    manifest: Manifest
    tokenizer: ReportTokenizer
    table: ConceptTable
    linker: Linker
    model: MLIPModel
    # as mlip.pretrained.Pretrained, of which it is a training checkpoint
    facts: dict[str, Any] = field(default_factory=lambda: {"step": 7, "pairs_seen": 56})
    prototypes: None = None
    origin: dict[str, Any] = field(default_factory=dict)


@cache
def small_run() -> SmallRun:
    """Made once per test process; nobody may change it."""
    folder = shared_folder("small-run")
    settings = (
        *SETTINGS,
        f"run.dir={folder / 'run'}",
        f"data.manifest={folder / 'data' / 'manifest.csv'}",
    )
    config = load([], settings)
    write_dataset(folder / "data", config.data.phantom, workers=1)
    manifest = load_manifest(config.data)
    texts = [manifest.text(row) for row in manifest.rows("train").tolist()]
    tokenizer = train_tokenizer(texts, config.data.vocab_size, folder / "run" / "tokenizer")
    table = load_concepts()
    torch.manual_seed(0)
    model = MLIPModel(
        config,
        vocab_size=tokenizer.vocab_size,
        concept_vectors=knowledge_vectors(table, config.knowledge),
    ).eval()
    return SmallRun(folder, settings, config, manifest, tokenizer, table, linker_of(table), model)


@cache
def small_export() -> Path:
    """The small run's model as `mlip export` writes it; nobody may change it."""
    run = small_run()
    out = run.folder / "export"
    return save_pretrained(out, run.model, run.config, run.tokenizer, run.table)


@cache
def small_results() -> dict[str, Any]:
    """evaluate_run of the small run; nobody may change it."""
    run = small_run()
    return evaluate_run(run, run.config, run.manifest)


def with_val(folder: Path, rows: int) -> list[str]:
    """Overrides for the same studies with some of the training ones in split val.

    folder  gets a manifest of its own; images stay where they are
    """
    manifest = Path(small_run().config.data.manifest)
    with manifest.open(newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    for row in [row for row in table if row["split"] == "train"][:rows]:
        row["split"] = "val"
    with (folder / "manifest.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(table[0]))
        writer.writeheader()
        writer.writerows(table)
    place = [f"data.manifest={folder / 'manifest.csv'}", f"data.root={manifest.parent}"]
    return [*place, "data.phantom.studies=0"]
