"""Symmetric InfoNCE in plain torch, chunked over images: any device, float32 or float64 inside.

The definition of correct for the Triton kernels, and what CPU users train with. Logits are made
again in the backward pass, so nothing of size B x B is ever kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mlip.kernels._autograd import no_second_derivative
from mlip.kernels._contrastive import (
    chunk_bounds,
    logits_gradient,
    logsumexp_statistics,
    loss_value,
    make_pairing,
    pull,
)
from mlip.kernels._distributed import Group, gather, reduce_rows, sum_over_group


class _InfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        image_BD: Tensor,
        text_BD: Tensor,
        logit_scale: Tensor,
        pair_ids: Tensor | None,
        group: Group,
    ) -> Tensor:
        pairing = make_pairing(image_BD, pair_ids, None, None, group)
        text_ND = gather(text_BD, group, pairing.counts)

        def chunk(start: int, stop: int) -> Tensor:
            return (image_BD[start:stop] @ text_ND.T).mul_(logit_scale)

        stats = logsumexp_statistics(chunk, image_BD.shape[0], pairing, group)
        ctx.save_for_backward(image_BD, text_BD, logit_scale)
        ctx.stats, ctx.pairing, ctx.group = stats, pairing, group
        return loss_value(stats, pairing, group)

    @staticmethod
    @no_second_derivative
    def backward(ctx: Any, grad: Tensor):
        image_BD, text_BD, logit_scale = ctx.saved_tensors
        stats, pairing, group = ctx.stats, ctx.pairing, ctx.group
        text_ND = gather(text_BD, group, pairing.counts)
        grad = sum_over_group(grad, group)
        pulls = pull(stats, pairing)
        image_grad = torch.empty_like(image_BD)
        text_grad = torch.zeros_like(text_ND)
        scale_grad = torch.zeros_like(logit_scale)
        for start, stop in chunk_bounds(image_BD.shape[0], text_ND.shape[0]):
            cosine = image_BD[start:stop] @ text_ND.T
            dz = logits_gradient(cosine * logit_scale, start, stats, pulls, pairing).mul_(grad)
            if ctx.needs_input_grad[2]:
                scale_grad += (dz * cosine).sum()
            dz.mul_(logit_scale)
            image_grad[start:stop] = dz @ text_ND
            text_grad.addmm_(dz.T, image_BD[start:stop])
        return image_grad, reduce_rows(text_grad, group, pairing.counts), scale_grad, None, None


def info_nce_reference(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    pair_ids: Tensor | None,
    group: Group,
) -> Tensor:
    """The loss of op.info_nce_loss.

    Shapes:  image_features, text_features [B, D]; pair_ids [B]
    Returns: scalar in float32, or float64 where either input is float64
    """
    wide = torch.float64 in (image_features.dtype, text_features.dtype)
    dtype = torch.float64 if wide else torch.float32
    scale = torch.as_tensor(logit_scale, device=image_features.device).to(dtype).reshape(())
    with torch.autocast(image_features.device.type, enabled=False):
        return _InfoNCE.apply(
            image_features.to(dtype), text_features.to(dtype), scale, pair_ids, group
        )
