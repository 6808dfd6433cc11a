"""The residual stream of a transformer tower in autocast's type, and norms that keep to it:
train.residual=bf16.

autocast runs every LayerNorm in float32, and with it what the layers add to: each norm reads and
writes four bytes a number, each addition widens one of its sides, and each product rounds what the
norm has just widened. Kept in bfloat16, all of that is two bytes; a norm still sums in float32.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


class RoundedLayerNorm(nn.LayerNorm):
    """LayerNorm that stays in autocast's type where autocast is on, and nn.LayerNorm elsewhere.

    Errors:  output and weight rounded to that type; mean and variance are of float32
    Source:  what open_clip's towers do under autocast (their LayerNorm casts back to its input's
             type), here without the float32 tensor between.
    """

    def forward(self, input: Tensor) -> Tensor:
        kind = input.device.type
        if not torch.is_autocast_enabled(kind):
            return super().forward(input)
        dtype = torch.get_autocast_dtype(kind)
        weight = None if self.weight is None else self.weight.to(dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        with torch.autocast(kind, enabled=False):
            return F.layer_norm(input.to(dtype), self.normalized_shape, weight, bias, self.eps)


def round_norms(module: nn.Module) -> None:
    """Have the LayerNorms inside stay in autocast's type.

    Parameters, their names and what is saved stay what they are.
    """
    for child in module.modules():
        if type(child) is nn.LayerNorm:
            child.__class__ = RoundedLayerNorm  # in place: hooks and other names of it stay


def round_residual(backbone: nn.Module) -> None:
    """Keep the states between the layers of a transformers' ViT or BERT in autocast's type."""
    round_norms(backbone)
    # a ViT's embeddings end in a sum with float32 positions, which would widen all that follows
    backbone.get_submodule("embeddings").register_forward_hook(_round_output)


def _round_output(_: nn.Module, __: Any, states: Tensor) -> Tensor:
    kind = states.device.type
    if not torch.is_autocast_enabled(kind):
        return states
    return states.to(torch.get_autocast_dtype(kind))
