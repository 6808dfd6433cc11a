"""Image-text matching: the judged pairs, the folded cross-attention, and that it can be learned."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from mlip.losses.matching import CrossAttentionLayer, Matching
from mlip.losses.partner import draw_partners
from tests.losses.loss_inputs import (
    DIM,
    PAIRS,
    config_of,
    context_of,
    make_batch,
    make_leaves,
)


def _make(*overrides: str) -> Matching:
    torch.manual_seed(0)
    return Matching(config_of(*overrides), DIM).double()


def test_cross_attention_equals_torchs_multi_head_attention() -> None:
    # oracle: nn.MultiheadAttention with keys and values made from the same matrices
    torch.manual_seed(0)
    heads, layer = 2, CrossAttentionLayer(DIM, 2).double()
    query = torch.randn(4, 3, DIM, dtype=torch.float64)
    patches = torch.randn(4, 5, DIM, dtype=torch.float64)
    attention = nn.MultiheadAttention(DIM, heads, batch_first=True).double()
    with torch.no_grad():
        key = layer.key_HED.reshape(DIM, DIM)
        value = layer.value_HDE.transpose(1, 2).reshape(DIM, DIM)
        attention.in_proj_weight.copy_(torch.cat([layer.query.weight, key, value]))
        attention.in_proj_bias.zero_()
        attention.in_proj_bias[:DIM].copy_(layer.query.bias)
        attention.out_proj.weight.copy_(layer.out.weight)
        attention.out_proj.bias.copy_(layer.out.bias)
        x = query + attention(layer.query_norm(query), patches, patches)[0]
        expected = x + layer.narrow(F.gelu(layer.widen(layer.feed_norm(x))))
    torch.testing.assert_close(layer(query, patches), expected)


def test_value_is_the_mean_over_true_pairs_hard_texts_and_hard_images() -> None:
    # oracle: every pair judged alone, in a loop over samples
    loss, batch = _make(), make_batch()
    context = context_of(make_leaves(), batch)
    value = loss(context)
    image, text = context.views_all[0], context.views_all[1]
    hard_text = draw_partners(context, "match_text", image @ text.T)
    hard_image = draw_partners(context, "match_image", text @ image.T)
    patches = loss.patch_norm(context.features.image.patches)

    def judge(i: int, j: int, is_match: int) -> Tensor:
        report = loss.report(context.features.text.embedding[j])[None, None]
        logits = loss.classify(report, patches[i : i + 1])[0, 0]
        return F.cross_entropy(logits[None], torch.tensor([is_match]))

    terms = []
    for n in range(PAIRS):
        if bool(context.has_partner[n]):
            terms += [
                judge(n, n, 1),
                judge(n, int(hard_text[n]), 0),
                judge(int(hard_image[n]), n, 0),
            ]
    assert len(terms) == 3 * (PAIRS - 1)
    torch.testing.assert_close(value, torch.stack(terms).mean())


@pytest.mark.parametrize("logit", [0.0, 1.5])
def test_known_value_of_a_classifier_that_says_the_same_of_every_pair(logit: float) -> None:
    # by hand: one match and two wrong pairs a sample, all with log-odds `logit`
    loss = _make()
    nn.init.zeros_(loss.classifier.weight)
    with torch.no_grad():
        loss.classifier.bias.copy_(torch.tensor([0.0, logit]))
    value = float(loss(context_of(make_leaves(), make_batch())).detach())
    expected = (math.log1p(math.exp(-logit)) + 2 * math.log1p(math.exp(logit))) / 3
    assert math.isclose(value, expected, rel_tol=1e-9)


def test_hard_images_and_hard_texts_are_drawn_apart() -> None:
    context = context_of(make_leaves(), make_batch())
    even = torch.zeros(PAIRS, PAIRS)
    drawn = []
    for stream in ("match_text", "match_image", "swap_partner"):
        picks = []
        for step in range(30):
            context.step = step
            picks.append(draw_partners(context, stream, even)[context.has_partner])
        drawn.append(torch.cat(picks))
    for a, b in ((0, 1), (0, 2), (1, 2)):
        # 240 draws among about 6 candidates: equal by chance in one of six
        assert float((drawn[a] == drawn[b]).double().mean()) < 0.35


def test_true_pairs_can_be_learned_apart_from_hard_ones() -> None:
    # property: the head alone separates 9 fixed pairs; guessing costs at best 0.637 nats
    loss, batch, leaves = _make(), make_batch(), make_leaves()
    optimiser = torch.optim.Adam(loss.parameters(), lr=1e-2)
    for step in range(80):
        optimiser.zero_grad()
        value = loss(context_of(leaves, batch, step=step))
        value.backward()
        optimiser.step()
    assert float(loss(context_of(leaves, batch, step=1000)).detach()) < 0.2


def test_heads_that_do_not_divide_the_width_are_refused_with_both_settings() -> None:
    with pytest.raises(ValueError, match="loss.matching.heads=3.*model.embed_dim=8"):
        _make("loss.matching.heads=3")
