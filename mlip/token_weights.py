"""How much each token of a report counts in the local level: alike, or by [CLS] attention."""

from __future__ import annotations

import torch
from torch import Tensor


def token_weights(content_mask: Tensor, attention: Tensor | None) -> Tensor:
    """Weights of the tokens, 0 outside content_mask, without gradient.

    Shapes:  content_mask [B, T] bool; attention [B, T] of [CLS] (None = uniform) -> [B, T] float32
    Source:  method.md section 4, MGCA: [CLS] attention clipped to its 10..90 % quantiles over the
             report's real tokens. Where that leaves no weight (attention on fewer than a tenth of
             the tokens, or on [CLS] alone): uniform.
    """
    if attention is None:
        return content_mask.float()
    shown = attention.detach().float().masked_fill(~content_mask, torch.nan)
    low = torch.nanquantile(shown, 0.1, dim=1, keepdim=True)
    high = torch.nanquantile(shown, 0.9, dim=1, keepdim=True)
    clipped = torch.minimum(torch.maximum(shown, low), high).nan_to_num(0.0)  # outside: NaN
    has_weight = (clipped > 0).any(dim=1, keepdim=True)
    return torch.where(has_weight, clipped, content_mask.float())
