"""The divergence encoder: a second, noisy view of an embedding, for training only."""

from __future__ import annotations

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from mlip.keyed_random import keyed_normal, keyed_uniform
from mlip.settings.config import Divergence
from mlip.unit_length import unit_length

SPREAD = 0.6  # how far a unit vector is moved at the start; method.md section 3
LOG_VAR_REACH = 4.0  # log_var stays within this of ln s^2
ATTENTION_HEADS = 4
SPREAD_COSINE = 0.9  # views closer to their embedding than this are pushed away


class DivergenceEncoder(nn.Module):
    """z -> z~: moved by a learned, input-dependent Gaussian (or by dropout), then attended.

    All noise is keyed by (seed, stream, step, global index), so a view depends neither on the
    batch around its sample nor on the number of ranks, and a replay repeats it.

    Shapes:  embedding [B, D] unit length, global_index [B] -> view [B, D] unit length,
             divergence [B], one value per sample: beta_kl * KL + beta_spread * spread
    Raises:  ValueError where D is no multiple of 4 (attention heads)
    Source:  MLIP section 3.2 (a divergence encoder before the global loss); its form is ours.
    """

    def __init__(self, dim: int, settings: Divergence, stream: str) -> None:
        super().__init__()
        if dim % ATTENTION_HEADS:
            raise ValueError(
                f"model.embed_dim={dim}: the divergence encoder's {ATTENTION_HEADS} attention "
                "heads need a multiple of 4; change it or set model.divergence.kind=none"
            )
        self.settings = settings
        self.stream = stream
        self.dim = dim
        self.prior_log_var = 2.0 * math.log(SPREAD / math.sqrt(dim))
        if settings.kind == "gaussian":
            self.hidden = nn.Linear(dim, 2 * dim)
            self.moments = nn.Linear(2 * dim, 2 * dim)
            nn.init.zeros_(self.moments.weight)
            with torch.no_grad():
                self.moments.bias[:dim].zero_()
                self.moments.bias[dim:].fill_(self.prior_log_var)
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(dim, 2 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(
        self, embedding: Tensor, global_index: Tensor, *, seed: int, step: int
    ) -> tuple[Tensor, Tensor]:
        z_BD = embedding.to(self.query.weight.dtype)
        if self.settings.kind == "gaussian":
            y_BD, kl_B = self._gaussian(z_BD, global_index, seed, step)
        else:
            y_BD = z_BD * self._keep(z_BD, self.dim, global_index, seed, step)
            kl_B = torch.zeros_like(embedding[:, 0])
        view_BD = unit_length(y_BD + self._attend(z_BD, y_BD))
        cosine_B = (view_BD * unit_length(embedding)).sum(dim=1)
        spread_B = F.relu(cosine_B - SPREAD_COSINE)
        divergence_B = self.settings.beta_kl * kl_B + self.settings.beta_spread * spread_B
        return view_BD, divergence_B

    def _gaussian(
        self, z_BD: Tensor, global_index: Tensor, seed: int, step: int
    ) -> tuple[Tensor, Tensor]:
        hidden = F.gelu(self.hidden(z_BD))
        hidden = hidden * self._keep(hidden, 2 * self.dim, global_index, seed, step)
        moments = self.moments(hidden)
        moments = moments if moments.dtype == torch.float64 else moments.float()
        mu_BD, log_var_BD = moments.split(self.dim, dim=1)
        prior = self.prior_log_var
        log_var_BD = log_var_BD.clamp(prior - LOG_VAR_REACH, prior + LOG_VAR_REACH)
        eps_BD = keyed_normal(seed, self.stream, step, global_index, self.dim).to(mu_BD.dtype)
        y_BD = z_BD + mu_BD + torch.exp(log_var_BD / 2) * eps_BD
        # KL(N(mu, sigma^2) || N(0, s^2)) per dimension
        ratio_BD = log_var_BD - prior
        kl_BD = 0.5 * (ratio_BD.exp() + mu_BD.square() * math.exp(-prior) - 1.0 - ratio_BD)
        return y_BD, kl_BD.mean(dim=1)

    def _keep(self, like: Tensor, width: int, global_index: Tensor, seed: int, step: int) -> Tensor:
        """Inverted dropout's factors; 1 in evaluation mode."""
        probability = self.settings.dropout
        if not self.training or probability == 0.0:
            return like.new_ones(())
        draw = keyed_uniform(seed, f"{self.stream}_dropout", step, global_index, width)
        return (draw >= probability).to(like.dtype) / (1.0 - probability)

    def _attend(self, z_BD: Tensor, y_BD: Tensor) -> Tensor:
        """y's attention over the two-element set {z, y} of its own sample, [B, D]."""
        rows, head_dim = z_BD.shape[0], self.dim // ATTENTION_HEADS
        y_BD = y_BD.to(self.query.weight.dtype)
        query = self.query(y_BD).view(rows, 1, ATTENTION_HEADS, head_dim)
        pair = self.key_value(torch.stack([z_BD, y_BD], dim=1))
        key, value = pair.view(rows, 2, 2, ATTENTION_HEADS, head_dim).unbind(dim=2)
        scores = (query * key).sum(dim=-1) * head_dim**-0.5
        # a softmax is float32 or better whatever the parameters' dtype
        wide = scores if scores.dtype == torch.float64 else scores.float()
        weight = torch.softmax(wide, dim=1).to(value.dtype)
        return self.out((weight.unsqueeze(-1) * value).sum(dim=1).flatten(1))
