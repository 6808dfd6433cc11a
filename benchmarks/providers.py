"""Every way to compute the same losses that is worth comparing with, made as strong as we can.

All take unit-free features and give a scalar loss; similarity providers use one flat matrix product
(texts x tokens by images x patches), softmax on the last dimension, no permutes. Texts carry
weights (0 = padding); no entities: none of the baselines knows them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mlip.kernels._products import wide_product
from mlip.kernels.info_nce import info_nce_loss
from mlip.kernels.token_knowledge_patch import token_knowledge_patch_loss

CHUNK_BYTES = 2**28  # of similarities, where a baseline makes them a few texts at a time


class NotInstalled(Exception):
    """The baseline's package is absent on this machine."""


def cross_entropy_both_ways(scores_MN: Tensor, scale: Tensor) -> Tensor:
    z = scale * scores_MN
    labels = torch.arange(z.shape[0], device=z.device)
    return (F.cross_entropy(z, labels) + F.cross_entropy(z.T, labels)) / 2


class _WideProduct(torch.autograd.Function):
    """bf16 x bf16 -> float32 with bf16 gradients: torch.mm(out_dtype) has no derivative."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return wide_product(a, b.T)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        grad = grads[0].to(a.dtype)
        return grad @ b, grad.T @ a


def pooled_scores(
    patches: Tensor, tokens: Tensor, weights: Tensor, case: dict[str, Any], wide: bool
) -> Tensor:
    """S [M, N] from one flat matrix product; wide: similarities of bf16 rows in float32."""
    images, count, dim = patches.shape
    texts, length, _ = tokens.shape
    v, q = F.normalize(patches, dim=-1), F.normalize(tokens, dim=-1)
    flat_q, flat_v = q.reshape(-1, dim), v.reshape(-1, dim)
    if wide and flat_q.is_cuda and flat_q.dtype != torch.float32:
        s = _WideProduct.apply(flat_q, flat_v)
    else:
        s = flat_q @ flat_v.T
    s = s.view(texts * length, images, count)
    if case["pooling"] == "max":
        r = s.amax(-1)
    else:
        a = torch.softmax(case["alpha"] * s, -1)
        r = (a * s).sum(-1)
        if case["pooling"] == "context":
            context = torch.einsum("rmp,mpd->rmd", a.to(v.dtype), v)
            r = r / context.float().norm(dim=-1).clamp(min=1e-6)
    share = (weights / weights.sum(1, keepdim=True)).float()
    return torch.einsum("ntm,nt->mn", r.view(texts, length, images).float(), share)


def _similarity_loss(case: dict[str, Any], wide: bool, upcast: bool) -> Callable[..., Tensor]:
    def run(patches: Tensor, tokens: Tensor, weights: Tensor, scale: Tensor) -> Tensor:
        if upcast:
            patches, tokens = patches.float(), tokens.float()
        return cross_entropy_both_ways(pooled_scores(patches, tokens, weights, case, wide), scale)

    return run


def _chunked(case: dict[str, Any], step: int = 16) -> Callable[..., Tensor]:
    def part(patches: Tensor, tokens: Tensor, weights: Tensor) -> Tensor:
        return pooled_scores(patches, tokens, weights, case, False)

    compiled = torch.compile(part) if case["device"] == "cuda" else part

    def run(patches: Tensor, tokens: Tensor, weights: Tensor, scale: Tensor) -> Tensor:
        parts = [
            checkpoint(
                compiled,
                patches,
                tokens[first : first + step],
                weights[first : first + step],
                use_reentrant=False,
            )
            for first in range(0, tokens.shape[0], step)
        ]
        return cross_entropy_both_ways(torch.cat(parts, 1), scale)

    return run


class _AnalyticScores(torch.autograd.Function):
    """S [M, N] of unit rows, a few texts at a time, by attention pooling; its derivative by hand:
    three products, similarities of bf16 rows in bf16, nothing kept but the inputs."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, q: Tensor, share: Tensor, pool: Any, gradient: Any) -> Tensor:
        ctx.save_for_backward(v, q, share)
        ctx.gradient = gradient
        columns = []
        for first, last in _text_steps(v, q):
            r = pool(_similarities(v, q[first:last]))
            columns.append(torch.einsum("ntm,nt->mn", r, share[first:last]))
        return torch.cat(columns, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        v, q, share = ctx.saved_tensors
        flat_v = v.reshape(-1, v.shape[2])
        d_q, d_v = torch.empty_like(q), torch.zeros_like(flat_v, dtype=torch.float32)
        for first, last in _text_steps(v, q):
            part = q[first:last]
            g = grads[0].T[first:last, None, :] * share[first:last, :, None]  # [n, T, M]
            ds = ctx.gradient(_similarities(v, part), g).reshape(-1, flat_v.shape[0])
            d_q[first:last] = (ds @ flat_v).view(part.shape)
            d_v += ds.T @ part.reshape(-1, part.shape[2])
        return d_v.view(v.shape).to(v.dtype), d_q, None, None, None


def _text_steps(v: Tensor, q: Tensor) -> list[tuple[int, int]]:
    a_text = q.shape[1] * v.shape[0] * v.shape[1] * v.element_size()
    step = max(1, CHUNK_BYTES // a_text)
    return [(first, min(first + step, len(q))) for first in range(0, len(q), step)]


def _similarities(v: Tensor, q: Tensor) -> Tensor:
    """[n, T, M, P] of unit patches [M, P, D] and rows [n, T, D]."""
    flat = q.reshape(-1, q.shape[2]) @ v.reshape(-1, v.shape[2]).T
    return flat.view(*q.shape[:2], *v.shape[:2])


def _chunked_analytic(case: dict[str, Any]) -> Callable[..., Tensor]:
    if case["pooling"] != "attention":
        raise ValueError(f"expected attention pooling, got {case['pooling']}")
    alpha = case["alpha"]

    def pool(s: Tensor) -> Tensor:
        s = s.float()
        return (torch.softmax(alpha * s, -1) * s).sum(-1)

    def gradient(s: Tensor, g: Tensor) -> Tensor:
        wide = s.float()
        a = torch.softmax(alpha * wide, -1)
        r = (a * wide).sum(-1, keepdim=True)
        return (g[..., None] * a * (1 + alpha * (wide - r))).to(s.dtype)

    if case["device"] == "cuda":
        pool, gradient = torch.compile(pool), torch.compile(gradient)

    def run(patches: Tensor, tokens: Tensor, weights: Tensor, scale: Tensor) -> Tensor:
        v, q = F.normalize(patches, dim=-1), F.normalize(tokens, dim=-1)
        share = (weights / weights.sum(1, keepdim=True)).float()
        scores = _AnalyticScores.apply(v, q, share, pool, gradient)
        return cross_entropy_both_ways(scores, scale)

    return run


def _gloria(case: dict[str, Any]) -> Callable[..., Tensor]:
    """A loop over texts with a double softmax, as GLoRIA's published loss (Huang et al. 2021)."""

    def run(patches: Tensor, tokens: Tensor, weights: Tensor, scale: Tensor) -> Tensor:
        v, q = F.normalize(patches, dim=-1), F.normalize(tokens, dim=-1)
        columns = []
        for n in range(q.shape[0]):
            s = torch.matmul(q[n], v.transpose(1, 2))  # [M, T, P]
            a = torch.softmax(case["alpha"] * torch.softmax(s, 1), -1)
            context = torch.bmm(a, v)
            r = F.cosine_similarity(q[n][None], context, dim=-1)
            power = torch.exp(5.0 * r) * (weights[n] > 0)
            columns.append(power.sum(1).log() / 5.0)
        return cross_entropy_both_ways(torch.stack(columns, 1).float(), scale)

    return run


def _late_interaction(case: dict[str, Any]) -> Callable[..., Tensor]:
    try:
        from late_interaction_kernels import maxsim
    except ImportError as error:
        raise NotInstalled("late-interaction-kernels") from error

    def run(patches: Tensor, tokens: Tensor, weights: Tensor, scale: Tensor) -> Tensor:
        scores = maxsim(tokens, patches, q_mask=weights > 0, normalize=True)
        return cross_entropy_both_ways((scores / weights.sum(1, keepdim=True)).T, scale)

    return run


def _fused(case: dict[str, Any], impl: str) -> Callable[..., Tensor]:
    alpha = case["alpha"]
    if case.get("learned"):  # as in a training run: the scale is on the device and has a gradient
        alpha = torch.tensor(alpha, device=case["device"], requires_grad=True)

    def run(patches: Tensor, tokens: Tensor, weights: Tensor, scale: Tensor) -> Tensor:
        return token_knowledge_patch_loss(
            patches,
            tokens,
            token_weights=weights,
            logit_scale=scale,
            pooling=case["pooling"],
            attention_scale=alpha,
            impl=impl,
        )

    return run


def similarity_provider(name: str, case: dict[str, Any]) -> Callable[..., Tensor]:
    """loss(patches, tokens, weights, scale) by name."""
    if name == "fused":
        return _fused(case, "triton")  # an error where it cannot run, never torch by its name
    if name == "torch":
        return _fused(case, "torch")
    if name == "eager_fp32":
        return _similarity_loss(case, True, True)
    if name == "eager_bf16":
        return _similarity_loss(case, False, False)
    if name == "compile_fp32":
        return torch.compile(_similarity_loss(case, True, False), dynamic=False)
    if name == "compile_bf16":
        return torch.compile(_similarity_loss(case, False, False), dynamic=False)
    if name == "chunked":
        return _chunked(case)
    if name == "chunked_analytic":
        return _chunked_analytic(case)
    if name == "gloria_loop":
        return _gloria(case)
    if name == "late_interaction_kernels":
        return _late_interaction(case)
    raise ValueError(f"no provider {name!r}")


def _inf_cl() -> Callable[..., Tensor]:
    try:
        from inf_cl.flash import cal_flash_loss
    except ImportError as error:
        raise NotInstalled("inf-cl") from error

    def run(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        labels = torch.arange(image.shape[0], device=image.device)
        one = cal_flash_loss(image, text, labels, scale)
        return (one.mean() + cal_flash_loss(text, image, labels, scale).mean()) / 2

    return run


def info_nce_provider(name: str) -> Callable[..., Tensor]:
    """loss(image, text, scale) by name."""

    def eager(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        return cross_entropy_both_ways((image @ text.T).float(), scale)

    if name == "fused":
        return lambda image, text, scale: info_nce_loss(image, text, scale, impl="triton")
    if name == "torch":
        return lambda image, text, scale: info_nce_loss(image, text, scale, impl="torch")
    if name in ("eager_fp32", "eager_bf16"):
        return eager
    if name == "compile_bf16":
        return torch.compile(eager, dynamic=False)
    if name == "inf_cl":
        return _inf_cl()
    raise ValueError(f"no provider {name!r}")
