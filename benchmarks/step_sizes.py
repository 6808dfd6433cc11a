"""What bench_step.py measures: settings and sizes on a GPU, and tiny ones where there is none."""

from __future__ import annotations

_SETTINGS = (
    "train.engine=plain",
    "train.zero_stage=0",
    "train.precision=bf16",
    "train.residual=bf16",
    "model.vision.kind=vit",
    "model.text.packed=true",
)
_TINY = (
    "data.crop_px=16",
    "data.max_tokens=10",
    "data.max_entities=3",
    "model.embed_dim=16",
    "model.heads.hidden=16",
    "model.vision.options={hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, "
    "intermediate_size: 32, patch_size: 8}",
    "model.text.options={hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, "
    "intermediate_size: 32}",
    "knowledge.dim=16",
    "loss.category.prototypes=8",
)
OVERRIDES = {"cuda": _SETTINGS, "cpu": _SETTINGS + _TINY}
VOCABULARY = {"cuda": 30_522, "cpu": 400}  # BERT's
FIRST_PAIRS = {"cuda": 64, "cpu": 4}
LAST_PAIRS = {"cuda": 8192, "cpu": 16}
BATCHES = {"cuda": (256, 1024), "cpu": (4, 8)}
VARIANT_PAIRS = {"cuda": 256, "cpu": 4}
