"""Local level: InfoNCE over given scores, and MGCA's in-pair loss."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mlip.losses.context import LossContext
from mlip.losses.local_alignment import InPairAlignment, LocalAlignment
from tests.losses.loss_inputs import (
    DIM,
    EMPTY,
    PAIRS,
    FakeScales,
    config_of,
    context_of,
    features_of,
    make_batch,
    make_leaves,
    rows_of,
)


def _context(scores: Tensor, rows: slice = slice(None)) -> LossContext:
    batch = rows_of(make_batch(), rows)
    leaves = {n: v[rows] for n, v in make_leaves().items()}
    return LossContext(
        features_of(leaves, batch),
        batch,
        scales=FakeScales().double(),
        seed=0,
        step=0,
        progress=0.0,
        local_scores=lambda group: scores,
    )


def test_known_value_of_two_pairs() -> None:
    # by hand: scores 1 and 0, scale 5: both directions ln(1 + e^-5)
    value = LocalAlignment(config_of(), DIM)(_context(torch.eye(2).double(), slice(1, 3)))
    assert math.isclose(float(value.detach()), math.log1p(math.exp(-5.0)), rel_tol=1e-6)


def test_empty_reports_and_equal_pair_ids_leave_the_loss() -> None:
    # oracle: cross-entropy over matrices with the masks written out
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(PAIRS, PAIRS, generator=generator, dtype=torch.float64)
    batch = make_batch()
    value = LocalAlignment(config_of(), DIM)(_context(scores))
    logits = 5.0 * scores
    same = batch.pair_id[:, None] == batch.pair_id[None, :]
    logits = logits.masked_fill(same & ~torch.eye(PAIRS, dtype=torch.bool), -torch.inf)
    kept = torch.tensor([i for i in range(PAIRS) if i != EMPTY])
    # the empty report is no column; its image stays a negative for the other texts
    images = F.cross_entropy(logits[kept][:, kept], torch.arange(8))
    texts = F.cross_entropy(logits.T[kept], kept)
    torch.testing.assert_close(value, 0.5 * (images + texts), rtol=1e-6, atol=0.0)


def test_scores_are_computed_once_for_all_losses() -> None:
    calls = []
    context = _context(torch.eye(PAIRS).double())
    context._local_scores = lambda group: calls.append(0) or torch.eye(PAIRS).double()
    LocalAlignment(config_of(), DIM)(context)
    assert context.local_scores.shape == (PAIRS, PAIRS)
    assert len(calls) == 1


def _naive_in_pair(patches: Tensor, tokens: Tensor, weight: Tensor) -> float:
    """Oracle: MGCA's formulas (protocols.md B.2) for one pair, loops, real tokens only."""
    patches, tokens = F.normalize(patches, dim=-1), F.normalize(tokens, dim=-1)

    def attended(row: Tensor, others: Tensor) -> Tensor:
        shares = [math.exp(float(row @ other) / 0.1) for other in others]
        return sum(s / sum(shares) * o for s, o in zip(shares, others, strict=True))

    seen = torch.stack([attended(token, patches) for token in tokens])
    read = torch.stack([attended(patch, tokens) for patch in patches])

    def matching(left: Tensor, right: Tensor, weights: Tensor) -> Tensor:
        right = F.normalize(right, dim=-1)
        total = torch.zeros(())
        for j in range(len(left)):
            forth = torch.log_softmax(left[j] @ right.T / 0.1, dim=0)[j]
            back = torch.log_softmax(right[j] @ left.T / 0.1, dim=0)[j]
            total = total - 0.5 * weights[j] * (forth + back)
        return total

    patch_weight = torch.full((len(patches),), 1 / len(patches))
    total = matching(tokens, seen, weight) + matching(patches, read, patch_weight)
    return float(0.5 * total.detach())


@pytest.mark.parametrize("has_attention", [False, True])
def test_in_pair_alignment_equals_loops_over_each_pair(has_attention: bool) -> None:
    leaves, batch = make_leaves(), make_batch()
    generator = torch.Generator().manual_seed(1)
    attention = torch.rand(batch.content_mask.shape, generator=generator).double()
    weights = attention if has_attention else batch.content_mask.double()
    value = InPairAlignment()(leaves["patches"], leaves["tokens"], batch.content_mask, weights)
    for row in range(PAIRS):
        mask = batch.content_mask[row]
        if row == EMPTY:
            assert float(value[row].detach()) == 0.0
            continue
        weight = weights[row][mask]
        expected = _naive_in_pair(
            leaves["patches"][row], leaves["tokens"][row][mask], weight / weight.sum()
        )
        assert math.isclose(float(value[row].detach()), expected, rel_tol=1e-6), row


def test_in_pair_alignment_trains_the_cosine_that_points() -> None:
    # with projections of its own it could match any patches that differ: the cosine stayed chance
    assert not list(InPairAlignment().parameters())
    patches = torch.eye(4, dtype=torch.float64)[None]
    mask = torch.ones(1, 4, dtype=torch.bool)
    right, wrong = (
        InPairAlignment()(patches, tokens, mask, mask.double())
        for tokens in (patches, torch.full_like(patches, 0.5))
    )
    assert float(right) < 0.01 < 1.0 < float(wrong)


def test_in_pair_alignment_clips_the_attention_that_weighs_its_tokens() -> None:
    # oracle: numpy's quantiles over the report's own tokens
    leaves, batch = make_leaves(), make_batch()
    attention = torch.rand(batch.content_mask.shape, generator=torch.Generator().manual_seed(2))
    attention[0, 1] = 50.0
    features = features_of(leaves, batch)
    text = dataclasses.replace(features.text, attention=attention)
    context = context_of(leaves, batch)
    context.features = dataclasses.replace(features, text=text)
    loss = LocalAlignment(config_of("loss.local_alignment.kind=mgca"), DIM)
    weights = np.zeros(attention.shape)
    for row, shown in enumerate(batch.content_mask.numpy()):
        if shown.any():
            own = attention[row].numpy()[shown].astype(np.float64)
            weights[row, shown] = own.clip(*np.quantile(own, [0.1, 0.9]))
    each = InPairAlignment()(
        leaves["patches"], leaves["tokens"], batch.content_mask, torch.from_numpy(weights)
    )
    expected = each.sum() / batch.content_mask.any(dim=1).sum()
    torch.testing.assert_close(loss(context), expected, rtol=1e-6, atol=0.0)


def test_in_pair_alignment_of_one_token_and_one_patch_is_zero() -> None:
    # by hand: a softmax over one candidate
    leaves, mask = make_leaves(), torch.ones(PAIRS, 1, dtype=torch.bool)
    value = InPairAlignment()(
        leaves["patches"][:, :1], leaves["tokens"][:, :1], mask, mask.double()
    )
    assert float(value.detach().abs().max()) < 1e-12


def test_in_pair_alignment_is_a_mean_over_reports_with_tokens_alone() -> None:
    # a report of entities alone has no token to match: it does not count as a zero
    batch, loss = make_batch(), LocalAlignment(config_of("loss.local_alignment.kind=mgca"), DIM)
    batch.content_mask[0] = False
    context = context_of(make_leaves(), batch)
    assert loss.in_pair is not None and bool(context.text_valid[0])
    text = context.features.text.tokens
    mask = batch.content_mask
    loss_B = loss.in_pair(context.features.image.patches, text, mask, mask.double())
    counted = [i for i in range(PAIRS) if i not in (0, EMPTY)]
    torch.testing.assert_close(loss(context), loss_B[counted].mean())
