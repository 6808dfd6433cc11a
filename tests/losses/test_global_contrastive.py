"""Global level: four views, pair_ids, and CLIP's loss where the views are off."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from mlip.batch import Batch
from mlip.losses.global_contrastive import GlobalContrastive
from tests.losses.loss_inputs import (
    DIM,
    FakeScales,
    config_of,
    context_of,
    make_batch,
    make_leaves,
    rows_of,
)


def _make(*overrides: str, dim: int = DIM) -> GlobalContrastive:
    torch.manual_seed(0)
    config = config_of(f"model.embed_dim={dim}", *overrides)
    return GlobalContrastive(config, dim).double()


def _dense(image: Tensor, text: Tensor, scale: float, batch: Batch) -> Tensor:
    """Oracle: masked softmax cross-entropy of both directions, written with matrices."""
    logits = scale * image @ text.T
    same = batch.pair_id[:, None] == batch.pair_id[None, :]
    same.fill_diagonal_(False)
    logits = logits.masked_fill(same, -torch.inf)
    target = torch.arange(len(logits))
    cross_entropy = torch.nn.functional.cross_entropy
    return 0.5 * (cross_entropy(logits, target) + cross_entropy(logits.T, target))


def test_known_value_of_two_orthogonal_pairs() -> None:
    # by hand: cosines 1 and 0, scale 5: both directions ln(1 + e^-5)
    leaves = {n: v[:2] for n, v in make_leaves().items()}
    leaves["image"] = leaves["text"] = torch.eye(2, DIM, dtype=torch.float64)
    batch = rows_of(make_batch(), slice(1, 3))
    value = _make("model.divergence.kind=none")(context_of(leaves, batch))
    assert math.isclose(float(value.detach()), math.log1p(math.exp(-5.0)), rel_tol=1e-6)


def test_value_is_the_mean_over_four_pairings_of_embeddings_and_views() -> None:
    loss, batch = _make(), make_batch()
    context = context_of(make_leaves(), batch)
    value = loss(context)
    index = batch.global_index
    image, text = context.features.image.embedding, context.features.text.embedding
    image_view, _ = loss.divergence_image(image, index, seed=3, step=7)
    text_view, _ = loss.divergence_text(text, index, seed=3, step=7)
    terms = [_dense(i, t, 5.0, batch) for i in (image, image_view) for t in (text, text_view)]
    torch.testing.assert_close(value, torch.stack(terms).mean(), rtol=1e-6, atol=0.0)


def test_image_and_text_views_are_not_made_of_the_same_noise() -> None:
    loss, leaves = _make(), make_leaves()
    loss.divergence_text.load_state_dict(loss.divergence_image.state_dict())
    context = context_of(leaves, make_batch())
    z, index = context.features.image.embedding, make_batch().global_index
    image_view, _ = loss.divergence_image(z, index, seed=3, step=7)
    text_view, _ = loss.divergence_text(z, index, seed=3, step=7)
    assert float((image_view - text_view).detach().abs().max()) > 0.01


def test_without_views_and_in_evaluation_it_is_clips_loss_and_adds_no_regulariser() -> None:
    batch = make_batch()
    plain = _make("model.divergence.kind=none")
    assert not list(plain.parameters())
    for loss in (plain, _make().eval()):
        context = context_of(make_leaves(), batch)
        image, text = context.features.image.embedding, context.features.text.embedding
        value = loss(context)
        assert not context.regularisers
        torch.testing.assert_close(value, _dense(image, text, 5.0, batch), rtol=1e-6, atol=0.0)


def test_divergence_is_the_mean_over_samples_and_both_modalities() -> None:
    loss, batch = _make("model.divergence.beta_spread=2.0"), make_batch()
    with torch.no_grad():
        for parameter in loss.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    context = context_of(make_leaves(), batch)
    loss(context)
    features, index = context.features, batch.global_index
    _, image = loss.divergence_image(features.image.embedding, index, seed=3, step=7)
    _, text = loss.divergence_text(features.text.embedding, index, seed=3, step=7)
    expected = 0.5 * (image.mean() + text.mean())
    assert float(expected.detach()) > 0.01
    torch.testing.assert_close(context.regularisers["divergence"], expected)


def test_a_duplicate_report_is_no_negative() -> None:
    # oracle: pairs 0 and 5 share a pair_id; making their texts equal must not raise the loss of a
    # perfectly aligned batch, while it does once the ids differ
    batch, leaves = make_batch(), make_leaves()
    leaves["text"] = leaves["image"].clone()
    leaves["text"][5] = leaves["image"][5] = leaves["image"][0]
    loss, scales = _make("model.divergence.kind=none"), FakeScales(50.0).double()
    kept = loss(context_of(leaves, batch, scales))
    apart = dataclasses.replace(batch, pair_id=torch.arange(len(batch)))
    confused = loss(context_of(leaves, apart, scales))
    # two of nine anchors see a negative as good as their positive: ln 2 each
    assert math.isclose(float((confused - kept).detach()), 2 / 9 * math.log(2.0), rel_tol=1e-3)
