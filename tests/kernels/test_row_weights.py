"""The weights of a text's rows: shares of their sum, whatever their size."""

from __future__ import annotations

import math

import pytest
import torch

from mlip.kernels.token_knowledge_patch import (
    checks,
    contrastive_loss_from_scores,
    token_knowledge_patch_loss,
    token_knowledge_patch_scores,
)
from mlip.kernels.token_knowledge_patch.rows_reference import row_weights
from tests.kernels.oracle import assert_broken_weights_show, make_inputs, relative_error


def test_a_text_weighs_the_same_whatever_its_batch_and_its_layout() -> None:
    """A sum of float32 weights in another order is another sum, and with it every score."""
    generator = torch.Generator().manual_seed(0)
    weights, tokens = torch.rand(256, 112, generator=generator), torch.zeros(256, 112, 1)
    made = row_weights(tokens, None, weights, None, None, 0.0, torch.float32)
    turned = weights.T.contiguous().T
    assert torch.equal(row_weights(tokens, None, turned, None, None, 0.0, torch.float32), made)
    alone = row_weights(tokens[:1], None, turned[:1], None, None, 0.0, torch.float32)
    assert torch.equal(alone, made[:1])


@pytest.mark.parametrize("size", [1e-50, 1e-44, 3e38, 1e300])
def test_weights_of_any_finite_size_are_shares(size: float) -> None:
    """Of float32 a sum of them may be infinite, and of float64 each may vanish in float32."""
    inputs = make_inputs(seed=21)
    dtype = torch.float32 if 1e-45 < size < 1e39 else torch.float64
    weights = {n: (inputs[n] > 0).to(dtype) * size for n in ("token_weights", "knowledge_weights")}
    ones = {n: (inputs[n] > 0).to(dtype) for n in weights}
    inputs = {k: v.float() if v.is_floating_point() else v for k, v in inputs.items()}
    value = token_knowledge_patch_scores(**inputs | weights)
    assert torch.equal(value, token_knowledge_patch_scores(**inputs | ones))


def test_the_gradient_of_a_weight_is_rounded_once() -> None:
    """Its two parts nearly cancel where scores are alike. Oracle: float64."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.zeros(4, 20, 1, dtype=torch.float64)
    incoming = 1.0 + 1e-3 * torch.randn(4, 20, generator=generator, dtype=torch.float64)
    narrow = (torch.rand(4, 20, generator=generator) + 0.1).bfloat16()
    found = []
    for weights in (narrow, narrow.double()):
        leaf = weights.clone().requires_grad_()
        made = row_weights(tokens, None, leaf, None, None, 0.0, torch.float64)
        found.append(torch.autograd.grad((made * incoming).sum(), leaf)[0])
    assert relative_error(found[0], found[1]) <= 2**-8


@pytest.mark.parametrize("with_entities", [False, True])
def test_a_text_of_masked_tokens_is_in_the_loss_where_it_has_entities(with_entities: bool) -> None:
    inputs = make_inputs(4, 4, seed=3, entities=3 if with_entities else 0)
    valid = {"image_valid": inputs["patch_mask"].any(1)}
    valid["text_valid"] = torch.tensor([True, True, True, with_entities])
    if with_entities:
        inputs["knowledge_mask"][-1, 0] = True
    scores = token_knowledge_patch_scores(**inputs)
    want = contrastive_loss_from_scores(scores, logit_scale=9.0, **valid)
    assert torch.equal(token_knowledge_patch_loss(**inputs, logit_scale=9.0), want)


@pytest.mark.parametrize("aggregation", ["mean", "lse"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_weight_that_nobody_reads_shows_in_the_score_where_it_is_not_finite(
    bad: float, aggregation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: its text was dropped without a word."""
    monkeypatch.setattr(checks, "has_values", lambda _: False)
    assert_broken_weights_show("torch", "cpu", aggregation, bad)
