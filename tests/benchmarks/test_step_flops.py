"""The operations that a utilisation is computed from are those that torch's own counter finds."""

from __future__ import annotations

import dataclasses

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import step_flops
from benchmarks.step_batch import made_batch
from mlip.kernels.info_nce import info_nce_loss
from mlip.kernels.token_knowledge_patch import token_knowledge_patch_scores
from tests.benchmarks.step_bench import objective_of, shared_bench


def test_operations_of_towers_and_heads_are_those_that_torch_counts() -> None:
    objective, batch = objective_of()
    model, config = objective.model, objective.config
    parts = step_flops.forward_parts(model, batch, config, real=False)
    texts = (batch.token_ids, batch.token_mask, batch.content_mask)
    with FlopCounterMode(display=False) as packed:
        model.encode_text(*texts)
    model.text.is_packed = False
    with FlopCounterMode(display=False) as padded:
        model.encode_text(*texts)
    real = step_flops.forward_parts(model, batch, config, real=True)
    # attention alone is padded again: a part of what the padding of the layers costs
    saved = padded.get_total_flops() - packed.get_total_flops()
    assert 0.5 * (parts["text"] - real["text"]) < saved <= parts["text"] - real["text"]
    with FlopCounterMode(display=False) as forward:
        image = model.encode_image(batch.image)
        text = model.encode_text(*texts)
    expected = parts["vision"] + parts["text"] + parts["heads"]
    assert forward.get_total_flops() == expected
    total = image.embedding.sum() + image.patches.sum() + text.embedding.sum() + text.tokens.sum()
    with FlopCounterMode(display=False) as backward:
        total.backward()
    # images need no gradient: one product of the patch projection is not made
    first = step_flops.patch_projection(len(batch), model.vision.tower.backbone.config)
    assert backward.get_total_flops() == 2 * expected - first
    losses = 3 * (parts["local"] + parts["global"])
    counted = forward.get_total_flops() + backward.get_total_flops() + losses
    assert step_flops.step_flop(model, batch, config, real=False) == counted


def test_operations_of_the_contrastive_levels_are_those_that_torch_counts() -> None:
    bench = shared_bench()
    batch = made_batch(bench.config, 6, vocab_size=bench.vocab_size, concepts=bench.concepts)
    whole = dataclasses.replace(
        batch,
        content_mask=torch.ones_like(batch.content_mask),
        entity_mask=torch.zeros_like(batch.entity_mask),
    )
    parts = step_flops.forward_parts(bench.engine.objective.model, whole, bench.config, real=True)
    dim = bench.config.model.embed_dim
    with FlopCounterMode(display=False) as local, torch.no_grad():
        token_knowledge_patch_scores(torch.randn(6, 4, dim), torch.randn(6, 10, dim))
    assert local.get_total_flops() == parts["local"]
    with FlopCounterMode(display=False) as pairing, torch.no_grad():
        info_nce_loss(torch.randn(6, dim), torch.randn(6, dim), 10.0)
    assert step_flops.VIEW_PAIRINGS * pairing.get_total_flops() == parts["global"]


def test_padding_is_counted_apart_and_what_is_left_out_is_small() -> None:
    assert step_flops.transformer_forward([3, 5], 4, 8, 2) == 2 * (
        2.0 * 8 * (4 * 16 + 2 * 4 * 8) + 4 * 4 * (9 + 25)
    )
    bench = shared_bench()
    model = bench.engine.objective.model
    batch = made_batch(bench.config, 8, vocab_size=bench.vocab_size, concepts=bench.concepts)
    real, padded = (
        step_flops.forward_parts(model, batch, bench.config, real=real) for real in (True, False)
    )
    assert real["text"] < padded["text"] and real["vision"] == padded["vision"]
    # of matching at ViT-B/16: three judged pairs, two layers, four heads' rows against 196 patches
    matching = 3 * 2 * (4 * 4.0 * 196 * 128)
    tower = step_flops.transformer_forward([197], 768, 3072, 12)
    assert matching < 1e-3 * tower
