"""The divergence encoder: its noise, its regulariser, its attention, and what keys a view."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn as nn
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from mlip.divergence import DivergenceEncoder
from mlip.keyed_random import keyed_normal
from mlip.settings.config import Divergence
from mlip.unit_length import unit_length

DIM = 8
GAUSSIAN = Divergence()
KEYS = {"seed": 2, "step": 5}


def _encoder(settings: Divergence = GAUSSIAN, dim: int = DIM) -> DivergenceEncoder:
    torch.manual_seed(0)
    return DivergenceEncoder(dim, settings, "divergence_image").double()


def _shaken(settings: Divergence = GAUSSIAN) -> DivergenceEncoder:
    encoder = _encoder(settings)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return encoder


def _rows(count: int, dim: int = DIM) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(count, dim, generator=generator, dtype=torch.float64)
    return unit_length(rows), torch.arange(count) + 40


def _without_attention(encoder: DivergenceEncoder) -> DivergenceEncoder:
    nn.init.zeros_(encoder.out.weight)
    nn.init.zeros_(encoder.out.bias)
    return encoder


def test_view_has_unit_length() -> None:
    z, index = _rows(6)
    view, _ = _shaken()(z, index, **KEYS)
    torch.testing.assert_close(view.norm(dim=1), torch.ones(6, dtype=torch.float64))


def test_at_the_start_kl_is_zero_and_a_unit_vector_moves_by_about_0_6() -> None:
    # oracle: |s eps| has root mean square s sqrt(D) = 0.6, and the mean moves nowhere
    settings = replace(GAUSSIAN, beta_spread=0.0)
    z, index = _rows(2000, 128)
    encoder = _without_attention(_encoder(settings, 128))
    view, divergence = encoder(z, index, **KEYS)
    assert float(divergence.detach().abs().max()) < 1e-12
    y, _ = encoder._gaussian(z, index, **KEYS)
    moved = (y - z).detach()
    assert abs(float(moved.square().sum(dim=1).mean().sqrt()) - 0.6) < 0.01
    # 0.053 is one dimension's s; its mean over 2000 samples has a standard error of 0.0012
    assert float(moved.mean(dim=0).abs().max()) < 5 * 0.0012
    assert abs(float((view * z).sum(dim=1).mean().detach()) - 1 / math.sqrt(1 + 0.36)) < 0.01


def test_regulariser_is_the_kl_of_torch_distributions_plus_spread() -> None:
    encoder = _shaken()
    encoder.eval()  # no dropout in the oracle below
    z, index = _rows(7)
    view, divergence = encoder(z, index, **KEYS)
    mu, log_var = encoder.moments(nn.functional.gelu(encoder.hidden(z))).split(DIM, dim=1)
    s = 0.6 / math.sqrt(DIM)
    log_var = log_var.clamp(math.log(s**2) - 4, math.log(s**2) + 4)
    kl = kl_divergence(Normal(mu, (log_var / 2).exp()), Normal(0.0, s)).mean(dim=1)
    spread = ((view * z).sum(dim=1) - 0.9).clamp_min(0.0)
    torch.testing.assert_close(divergence, 0.1 * kl + 0.1 * spread)


def test_attention_is_multi_head_attention_over_the_set_of_embedding_and_noisy_view() -> None:
    # oracle: torch's nn.MultiheadAttention with the same weights, and the noise made apart
    encoder = _shaken()
    encoder.eval()
    z, index = _rows(5)
    view, _ = encoder(z, index, **KEYS)
    mu, log_var = encoder.moments(nn.functional.gelu(encoder.hidden(z))).split(DIM, dim=1)
    centre = math.log(0.36 / DIM)
    eps = keyed_normal(2, "divergence_image", 5, index, DIM).double()
    y = z + mu + (log_var.clamp(centre - 4, centre + 4) / 2).exp() * eps
    attention = nn.MultiheadAttention(DIM, 4, batch_first=True).double()
    with torch.no_grad():
        attention.in_proj_weight.copy_(torch.cat([encoder.query.weight, encoder.key_value.weight]))
        attention.in_proj_bias.copy_(torch.cat([encoder.query.bias, encoder.key_value.bias]))
        attention.out_proj.weight.copy_(encoder.out.weight)
        attention.out_proj.bias.copy_(encoder.out.bias)
    seen, _ = attention(y[:, None], torch.stack([z, y], 1), torch.stack([z, y], 1))
    torch.testing.assert_close(view, unit_length(y + seen[:, 0]))


@pytest.mark.parametrize("kind", ["gaussian", "dropout"])
def test_a_view_does_not_depend_on_its_neighbours(kind: str) -> None:
    encoder = _shaken(replace(GAUSSIAN, kind=kind, dropout=0.5))  # type: ignore[arg-type]
    z, index = _rows(6)
    whole, _ = encoder(z, index, **KEYS)
    part, _ = encoder(z[3:5], index[3:5], **KEYS)
    torch.testing.assert_close(part, whole[3:5], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", ["gaussian", "dropout"])
def test_a_view_repeats_at_its_step_and_changes_with_step_seed_and_stream(kind: str) -> None:
    settings = replace(GAUSSIAN, kind=kind, dropout=0.5)  # type: ignore[arg-type]
    encoder, (z, index) = _shaken(settings), _rows(6)
    first, _ = encoder(z, index, **KEYS)
    torch.manual_seed(99)  # torch's own generator plays no part
    assert torch.equal(encoder(z, index, **KEYS)[0], first)
    assert not torch.equal(encoder(z, index, seed=2, step=6)[0], first)
    assert not torch.equal(encoder(z, index, seed=3, step=5)[0], first)
    encoder.stream = "divergence_text"
    assert not torch.equal(encoder(z, index, **KEYS)[0], first)


def test_dropout_keeps_its_share_and_the_mean_and_is_off_in_evaluation() -> None:
    encoder = _encoder(replace(GAUSSIAN, dropout=0.25))
    ones = torch.ones(4000, DIM, dtype=torch.float64)
    kept = encoder._keep(ones, DIM, torch.arange(4000), **KEYS)
    assert set(kept.unique().tolist()) == {0.0, 1 / 0.75}
    # 32000 draws: the standard error of the share is 0.0024
    assert abs(float((kept == 0).double().mean()) - 0.25) < 0.01
    encoder.eval()
    assert float(encoder._keep(ones, DIM, torch.arange(4000), **KEYS)) == 1.0


def test_dropout_mask_and_noise_are_not_the_same_numbers() -> None:
    encoder = _encoder(replace(GAUSSIAN, dropout=0.5))
    index = torch.arange(3000)
    kept = encoder._keep(torch.ones(3000, 1), 1, index, **KEYS)[:, 0]
    noise = keyed_normal(2, "divergence_image", 5, index, 1)[:, 0]
    correlation = torch.corrcoef(torch.stack([kept, noise]))[0, 1]
    assert abs(float(correlation)) < 0.08  # four standard errors of 1/sqrt(3000)


def test_spread_pushes_a_view_away_from_its_embedding() -> None:
    # nothing dropped, nothing attended: the view is the embedding, cosine 1, excess 0.1
    settings = replace(GAUSSIAN, kind="dropout", dropout=0.0)
    encoder = _without_attention(_encoder(settings))
    z, index = _rows(4)
    view, divergence = encoder(z, index, **KEYS)
    torch.testing.assert_close(view, z)
    torch.testing.assert_close(divergence, torch.full((4,), 0.01, dtype=torch.float64))


def test_log_variance_stays_within_four_of_the_prior() -> None:
    encoder = _encoder(replace(GAUSSIAN, beta_kl=1.0, beta_spread=0.0))
    with torch.no_grad():
        encoder.moments.bias[DIM:].fill_(100.0)
    _, divergence = encoder(*_rows(3), **KEYS)
    # KL of log ratio 4 and no mean: (e^4 - 1 - 4) / 2
    expected = torch.full((3,), 0.5 * (math.exp(4.0) - 5.0), dtype=torch.float64)
    torch.testing.assert_close(divergence, expected)


@pytest.mark.parametrize("kind", ["gaussian", "dropout"])
def test_gradients_reach_the_embedding_and_agree_with_finite_differences(kind: str) -> None:
    encoder = _shaken(replace(GAUSSIAN, kind=kind))  # type: ignore[arg-type]
    z, index = _rows(3)
    weight = torch.randn(3, DIM, dtype=torch.float64)

    def value(rows: Tensor, *_: Tensor) -> Tensor:
        view, divergence = encoder(rows, index, **KEYS)
        return (view * weight).sum() + divergence.sum()

    inputs = (z.clone().requires_grad_(), *encoder.parameters())
    assert torch.autograd.gradcheck(value, inputs, fast_mode=True)
    (grad,) = torch.autograd.grad(value(inputs[0]), inputs[0])
    assert bool(grad.abs().sum(dim=1).min() > 0)


def test_a_width_without_four_heads_is_refused_with_the_setting() -> None:
    with pytest.raises(ValueError, match="model.embed_dim=6.*model.divergence.kind=none"):
        DivergenceEncoder(6, GAUSSIAN, "divergence_image")
