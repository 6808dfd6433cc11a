"""Backward Triton kernels of the pair scores, from scores to rows: what every pooling shares.

Formulas: derivation 2 of the README. No atomics: one program owns each output and adds in order.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _pull(
    r, weight, gamma, valid_ptr, score_ptr, grad_ptr, offs_m, mask_m, text, mask, stride_sm,
    HAS_VALID: tl.constexpr, LSE: tl.constexpr,
):  # fmt: skip
    """(d weight, g = dS dS/dr) of each pair [BLOCK_M, BLOCK_R], dS that of the pair's score."""
    at = offs_m[:, None] * stride_sm + text[None, :]
    grad = tl.load(grad_ptr + at, mask=mask, other=0.0)
    if HAS_VALID:
        valid = tl.load(valid_ptr + offs_m, mask=mask_m, other=0)
        grad = tl.where(valid[:, None] != 0, grad, 0.0)
    if LSE:
        score = tl.load(score_ptr + at, mask=mask, other=0.0)
        pulled = grad * tl.exp(gamma * (r - score))
        return pulled / gamma, pulled * weight[None, :]
    else:
        return grad * r, grad * weight[None, :]


@triton.jit
def _aggregate_bwd_kernel(
    r_ptr, weight_ptr, index_ptr, text_ptr, bounds_ptr, valid_ptr, gamma_ptr, score_ptr, grad_ptr,
    g_ptr, h_ptr, weight_grad_ptr, gamma_part_ptr,
    first_text, last_text, images, stride_rm, stride_sm,
    HAS_VALID: tl.constexpr, LSE: tl.constexpr, STORE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """d weight and gamma * d gamma of BLOCK_R rows and all images; STORE: g = dS * dS/dr and
    h = g * r too."""
    start = tl.load(bounds_ptr + first_text)
    count = tl.load(bounds_ptr + last_text) - start
    offs_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_r = offs_r < count
    index = tl.load(index_ptr + start + offs_r, mask=mask_r, other=0)
    text = tl.load(text_ptr + start + offs_r, mask=mask_r, other=0)
    weight = tl.load(weight_ptr + index, mask=mask_r, other=0.0)
    gamma = tl.load(gamma_ptr)
    weight_grad = tl.zeros([BLOCK_R], tl.float32)
    gamma_sum = tl.zeros([BLOCK_R], tl.float32)
    for first in range(0, images, BLOCK_M):
        offs_m = (first + tl.arange(0, BLOCK_M)).to(tl.int64)
        mask_m = offs_m < images
        mask = mask_m[:, None] & mask_r[None, :]
        place = offs_m[:, None] * stride_rm + offs_r[None, :]
        r = tl.load(r_ptr + place, mask=mask, other=0.0)
        for_weight, g = _pull(
            r, weight, gamma, valid_ptr, score_ptr, grad_ptr, offs_m, mask_m, text, mask,
            stride_sm, HAS_VALID, LSE,
        )  # fmt: skip
        weight_grad += tl.sum(for_weight, 0)
        if LSE:
            # by pair, since the sum of g r and that of dS S nearly cancel
            at = offs_m[:, None] * stride_sm + text[None, :]
            gamma_sum += tl.sum(g * (r - tl.load(score_ptr + at, mask=mask, other=0.0)), 0)
        if STORE:
            tl.store(g_ptr + place, g, mask=mask)
            tl.store(h_ptr + place, g * r, mask=mask)
    tl.store(weight_grad_ptr + index, weight_grad, mask=mask_r)
    tl.store(gamma_part_ptr + tl.program_id(0), tl.sum(gamma_sum, 0))


@triton.jit
def _store_patches(
    out_ptr, acc, first, m, P_PAD: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    SEG: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    offs_p = first + tl.arange(0, SEG)
    offs_d = tl.arange(0, BLOCK_D)
    at = out_ptr + m * (P_PAD * DIM) + offs_p[None, :] * DIM + offs_d[:, None]
    mask = (offs_p < P_PAD)[None, :] & (offs_d < DIM)[:, None]
    if ACCUMULATE:
        acc += tl.load(at, mask=mask, other=0.0)
    tl.store(at, acc, mask=mask)
