"""Unit rows in plain torch: patches normalised, tokens enriched by their entities, row weights.

The definition of correct for rows_triton_kernels.py. Any device, float32 or float64 inside.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mlip.kernels._autograd import no_second_derivative
from mlip.kernels._scalars import widest_dtype

NORM_FLOOR = 1e-6  # a row no longer than this is the zero row


class _UnitRows(torch.autograd.Function):
    """Keeps the unit rows and one number a row, where autograd would keep three copies."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
        ctx.dtype = x.dtype
        if mask is not None:
            # where, not multiply: a masked row may hold NaN
            x = torch.where(mask[..., None], x, torch.zeros((), dtype=x.dtype, device=x.device))
        x = x.to(dtype)
        # scaled by the largest entry first: a finite row, however long, must not overflow its
        # square
        largest = x.abs().amax(-1, keepdim=True).clamp_(min=torch.finfo(dtype).tiny)
        unit = x / largest
        length = torch.linalg.vector_norm(unit, dim=-1, keepdim=True)
        keep = length * largest > NORM_FLOOR
        inverse = torch.where(keep, 1 / torch.where(keep, length, 1.0), 0.0)
        # in place: one copy of the rows less. Not under torch.compile: torch 2.11 gives a Function
        # whose result was changed in place the gradient 0 (pytorch issue 180642)
        unit = unit * inverse if torch.compiler.is_compiling() else unit.mul_(inverse)
        ctx.save_for_backward(unit, inverse.div_(largest))
        return unit

    @staticmethod
    @no_second_derivative
    def backward(ctx: Any, grad: Tensor):
        unit, inverse = ctx.saved_tensors
        radial = (grad * unit).sum(-1, keepdim=True)
        return torch.addcmul(grad, unit, radial, value=-1).mul_(inverse).to(ctx.dtype), None, None


def unit_rows(x: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Rows over their length; the zero row, with gradient 0, where masked or at most NORM_FLOOR."""
    return _UnitRows.apply(x, mask, dtype)


class _Products(torch.autograd.Function):
    """torch.bmm, whose own backward pass would multiply in bfloat16 under autocast."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return torch.bmm(a, b)

    @staticmethod
    @no_second_derivative
    def backward(ctx: Any, grad: Tensor):
        a, b = ctx.saved_tensors
        for_a = torch.bmm(grad, b.mT) if ctx.needs_input_grad[0] else None
        return for_a, torch.bmm(a.mT, grad) if ctx.needs_input_grad[1] else None


def row_weights(
    tokens_NTD: Tensor,
    knowledge_NKD: Tensor | None,
    token_weights_NT: Tensor | None,
    knowledge_weights_NK: Tensor | None,
    knowledge_mask_NK: Tensor | None,
    knowledge_share: float,
    dtype: torch.dtype,
) -> Tensor:
    """The weight of every row, tokens then entities [N, T + K]: sums to 1, or 0 for an empty text.

    Source:  method section 4 (ours): weight
    """
    zero = torch.zeros((), dtype=dtype, device=tokens_NTD.device)
    wide = widest_dtype(tokens_NTD.device)

    def positive(weights: Tensor | None, like: Tensor) -> Tensor:
        if weights is None:
            return torch.ones(like.shape[:2], dtype=wide, device=like.device)
        # NaN, found on a CPU alone, stays NaN
        return torch.where(weights <= 0, 0.0, weights.to(wide))

    def shares(weights: Tensor) -> tuple[Tensor, Tensor]:
        # in float64 the order of the sum, which a batch or a layout may change, is rounded away, no
        # sum of float32 leaves its range, and the two parts of a weight's gradient, which nearly
        # cancel, are rounded once they are added
        total = weights.sum(1, keepdim=True)
        is_empty = total.detach() == 0
        return (weights / torch.where(is_empty, 1.0, total)).to(dtype), ~is_empty

    u_NT, has_tokens = shares(positive(token_weights_NT, tokens_NTD))
    if knowledge_NKD is None:
        return u_NT
    s_NK = positive(knowledge_weights_NK, knowledge_NKD)
    if knowledge_mask_NK is not None:
        s_NK = torch.where(knowledge_mask_NK, s_NK, 0.0)
    s_NK, has_entities = shares(s_NK)
    share = torch.where(has_tokens, torch.where(has_entities, zero + knowledge_share, zero), 1)
    return torch.cat([(1 - share) * u_NT, share * s_NK], 1)


def prepare_rows(
    tokens_NTD: Tensor,
    knowledge_NKD: Tensor | None,
    token_weights_NT: Tensor | None,
    knowledge_weights_NK: Tensor | None,
    knowledge_mask_NK: Tensor | None,
    knowledge_scale: Tensor,
    knowledge_gain: Tensor,
    knowledge_share: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The query rows of every text, enriched tokens, then entities, and their weights.

    Shapes:  tokens [N, T, D], knowledge [N, K, D] -> rows [N, T + K, D], weights [N, T + K]
    Returns: rows of unit length or zero
    Source:  method section 4 (ours): A, w', rows
    """
    weight = row_weights(
        tokens_NTD,
        knowledge_NKD,
        token_weights_NT,
        knowledge_weights_NK,
        knowledge_mask_NK,
        knowledge_share,
        dtype,
    )
    token_mask = None if token_weights_NT is None else token_weights_NT > 0
    token_NTD = unit_rows(tokens_NTD, token_mask, dtype)
    if knowledge_NKD is None:
        return token_NTD, weight
    entity_NKD = unit_rows(knowledge_NKD, knowledge_mask_NK, dtype)
    logits_NTK = _Products.apply(token_NTD, entity_NKD.mT) * knowledge_scale
    if knowledge_mask_NK is not None:
        logits_NTK = logits_NTK.masked_fill(~knowledge_mask_NK[:, None], torch.finfo(dtype).min)
    # a text without entities has zero entity rows, so its uniform softmax adds exactly nothing
    enriched = token_NTD + knowledge_gain * _Products.apply(logits_NTK.softmax(-1), entity_NKD)
    return torch.cat([unit_rows(enriched, token_mask, dtype), entity_NKD], 1), weight
