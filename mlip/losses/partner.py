"""Drawing a wrong partner for a pair, harder ones more often, the same on any number of ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from mlip.keyed_random import keyed_uniform
from mlip.losses.context import LossContext

# Probabilities are held as integers relative to the likeliest partner: a running sum of integers
# is exact, so that neither a device's way to add nor the candidates' order changes a draw. With
# 2^40 the sum fits 63 bits up to 8 million pairs; what is rarer than 1e-12 is never drawn.
_STEPS = float(1 << 40)


@torch.no_grad()
def draw_partners(context: LossContext, stream: str, cosine: Tensor) -> Tensor:
    """One index of 0..N-1 per own sample, from softmax(logit_scale * cosine) over what is allowed.

    One keyed uniform a draw, turned into an index by the inverse distribution function over the
    candidates in global order. Where `context.has_partner` is False the index means nothing.

    Shapes:  cosine [B, N] of own samples with all candidates -> [B] int64
    Source:  hard negatives as in ALBEF (Li et al. 2021, section 3.2); the draw is ours.
    """
    order_N = context.global_index_N.argsort()
    logits_BN = context.scales.logit_scale().to(cosine.dtype) * cosine
    logits_BN = logits_BN.masked_fill(~context.partner_allowed, -torch.inf)[:, order_N]
    peak_B1 = logits_BN.amax(dim=1, keepdim=True)
    peak_B1 = peak_B1.masked_fill(~peak_B1.isfinite(), 0.0)
    mass_BN = (torch.exp(logits_BN - peak_B1) * _STEPS).nan_to_num(0.0).long()
    cumulative_BN = mass_BN.cumsum(dim=1)
    total_B1 = cumulative_BN[:, -1:]
    uniform_B1 = keyed_uniform(context.seed, stream, context.step, context.batch.global_index)
    target_B1 = torch.minimum((uniform_B1 * total_B1.double()).long(), total_B1 - 1)
    drawn_B1 = torch.searchsorted(cumulative_BN, target_B1, right=True)
    return order_N[drawn_B1.clamp_max(order_N.shape[0] - 1).squeeze(1)]
