"""The files of the paper's two runs, over towers of their kind that a test can carry."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel, ResNetConfig, ResNetModel, ViTConfig, ViTModel

from mlip.assembly import build_objective, open_corpus, open_loader
from mlip.encoders.text import TextEncoder
from mlip.knowledge.vectors import concept_text, whiten
from mlip.settings.config import Config, load
from tests.small_run import small_run

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def tiny(name: str, folder: Path) -> Config:
    """The config over local folders of a tiny tower of each kind, and the small run's reports."""
    run = small_run()
    torch.manual_seed(0)
    bert = BertConfig(
        vocab_size=run.tokenizer.vocab_size,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
    )
    BertModel(bert).save_pretrained(folder / "bert")
    if name == "mimic_resnet50":
        sizes: dict[str, Any] = {
            "embedding_size": 8,
            "hidden_sizes": [8, 8, 16, 16],
            "depths": [1, 1, 1, 1],
        }
        ResNetModel(ResNetConfig(**sizes, layer_type="basic")).save_pretrained(folder / "image")
    else:
        small: dict[str, Any] = {
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        }
        vit = ViTConfig(**small, intermediate_size=16, image_size=224, patch_size=16)
        ViTModel(vit).save_pretrained(folder / "image")
    return load(
        [CONFIGS / f"{name}.yaml"],
        [
            f"data.manifest={run.config.data.manifest}",
            f"run.dir={folder / 'run'}",
            f"model.vision.source={folder / 'image'}",
            f"model.text.source={folder / 'bert'}",
            f"model.text.tokenizer={run.folder / 'run' / 'tokenizer'}",
            *("batch.global_pairs=8", "model.heads.hidden=32", "loss.category.prototypes=8"),
            *("data.columns.labels=labels", "data.pipeline=torch", "evaluate.after_training=false"),
        ],
    )


@pytest.mark.parametrize("name", ["mimic_resnet50", "mimic_vit_b16"])
def test_a_trained_text_tower_reads_the_definitions_and_every_loss_runs(
    name: str, tmp_path: Path
) -> None:
    # oracle: method.md section 2 by hand, one definition a pass: masked mean over tokens, whitened
    config = tiny(name, tmp_path)
    corpus = open_corpus(config)
    objective = build_objective(config, corpus)
    tower = TextEncoder(
        config.model.text, vocab_size=corpus.tokenizer.vocab_size, max_tokens=112
    ).eval()
    rows = []
    for row in range(len(corpus.table)):
        (piece,) = corpus.tokenizer.encode_batch([concept_text(corpus.table, row)])
        ids = [corpus.tokenizer.cls_id, *piece.ids[:110], corpus.tokenizer.sep_id]
        with torch.no_grad():
            _, states, _ = tower(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.bool))
        rows.append(states[0].mean(dim=0).double().numpy())
    found, expected = objective.model.concept_vectors.numpy(), whiten(np.stack(rows), 128)
    # the Gram matrix: single directions of nearly equal spread are free to turn
    np.testing.assert_allclose(found @ found.T, expected @ expected.T, atol=2e-3)
    assert "model.concept_vectors" not in dict(objective.named_parameters())  # frozen

    loader = open_loader(config, corpus)
    try:
        batch = next(iter(loader))
    finally:
        loader.close()
    total, terms = objective(batch, step=0, progress=2.0)
    total.backward()
    assert batch.image.shape == (8, 3, 224, 224) and bool(torch.isfinite(total))
    names = {"global_contrastive", "local_alignment", "category", "matching", "swapping"}
    assert set(objective.losses) == names and set(terms) == names | {"divergence"}
    assert objective.encode(batch).image.patches.shape[1] == 196  # 14 x 14, as published
