"""Symmetric InfoNCE in plain torch, chunked over images: any device, float32 or float64 inside.

The definition of correct for the Triton kernels, and what CPU users train with. Logits are made
again in the backward pass, so nothing of size B x B is ever kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mlip.kernels._contrastive import (
    Pairing,
    Statistics,
    chunk_bounds,
    logits_gradient,
    logsumexp_statistics,
    pull,
)


def statistics(
    image_MD: Tensor, text_ND: Tensor, logit_scale: Tensor, pairing: Pairing
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-sum-exps over negatives of this rank's rows [M] and of all columns [N]; positives [M]."""

    def chunk(start: int, stop: int) -> Tensor:
        return (image_MD[start:stop] @ text_ND.T).mul_(logit_scale)

    return logsumexp_statistics(chunk, image_MD.shape[0], pairing)


def gradients(
    image_MD: Tensor,
    text_ND: Tensor,
    scales: tuple[Tensor, Tensor],
    grad: Tensor,
    stats: Statistics,
    pairing: Pairing,
    want_scale: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(d image [M, D], this rank's part of d text [N, D], d logit_scale []).

    scales:  logit_scale [], and center of _contrastive []
    """
    logit_scale, middle = scales
    pulls = pull(stats, pairing, image_MD.shape[0])
    image_grad = torch.empty_like(image_MD)
    text_grad = torch.zeros_like(text_ND)
    scale_grad = torch.zeros_like(logit_scale)
    for start, stop in chunk_bounds(image_MD.shape[0], text_ND.shape[0]):
        cosine = image_MD[start:stop] @ text_ND.T
        dz = logits_gradient(cosine * logit_scale, start, stats, pulls, pairing).mul_(grad)
        if want_scale:
            scale_grad += (dz * (cosine - middle)).sum()
        dz.mul_(logit_scale)
        image_grad[start:stop] = dz @ text_ND
        text_grad.addmm_(dz.T, image_MD[start:stop])
    return image_grad, text_grad, scale_grad
