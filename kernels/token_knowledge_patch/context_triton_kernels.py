"""Backward Triton kernels of context pooling: r = q . c / |c| with c the attended patch.

With t = q - r c / |c| (r dropped where |c| is at its floor) both gradients are sums over
similarities of q and of t: one kernel leaves t in memory, a pass over rows and one over patches
read it, and nothing adds atomically. Formulas: derivation 3 of the README.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mlip.kernels._dot_triton_kernels import dot
from mlip.kernels.token_knowledge_patch.forward_triton_kernels import (
    CONTEXT_FLOOR,
    LOG2_E,
    _load_patches,
    _load_rows,
)


@triton.jit
def _weights(
    q, vt, stat, alpha, BLOCK_R: tl.constexpr, SEG: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    s = dot(q, vt, tl.zeros([BLOCK_R, SEG], tl.float32), PRECISION, UPCAST)
    # a real weight is at most 1; one on padding would overflow and turn the zero it meets into NaN
    return s, tl.exp2(tl.minimum(s * (alpha * LOG2_E) - stat[:, None], 0.0))


@triton.jit
def _context_turn_kernel(
    rows_ptr, bounds_ptr, v_ptr, bias_ptr, alpha_ptr, r_ptr, stat_ptr, g_ptr, h_ptr,
    turned_ptr, first_text, last_text, images, stride_rm,
    P_PAD: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
    SEG0: tl.constexpr, SEG1: tl.constexpr, SEG2: tl.constexpr, TILES: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """t of BLOCK_R rows and a share of the images; h = g / |c|. In g's place its floor term, in r's
    the mean similarity."""
    WHOLE: tl.constexpr = TILES * SEG0 == P_PAD
    start = tl.load(bounds_ptr + first_text)
    count = tl.load(bounds_ptr + last_text) - start
    if tl.program_id(0) * BLOCK_R >= count:
        return
    offs_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_d = tl.arange(0, BLOCK_D)
    mask_r = offs_r < count
    mask = mask_r[:, None] & (offs_d < DIM)[None, :]
    q = _load_rows(rows_ptr, start + tl.program_id(0) * BLOCK_R, DIM, BLOCK_D, BLOCK_R)
    alpha = tl.load(alpha_ptr)
    for image in range(tl.program_id(1), images, tl.num_programs(1)):
        m = tl.full([], 0, tl.int64) + image
        place = m * stride_rm + offs_r
        stat = tl.load(stat_ptr + place, mask=mask_r, other=0.0)
        context = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
        for tile in range(0, TILES):
            v, unused_bias = _load_patches(
                v_ptr, bias_ptr, tile * SEG0, m, P_PAD, DIM, BLOCK_D, SEG0, WHOLE
            )
            unused_s, a = _weights(q, tl.trans(v), stat, alpha, BLOCK_R, SEG0, PRECISION, UPCAST)
            context = dot(a.to(v.dtype), v, context, PRECISION, UPCAST)
        g = tl.load(g_ptr + place, mask=mask_r, other=0.0)
        r = tl.load(r_ptr + place, mask=mask_r, other=0.0)
        rho = tl.sqrt(tl.sum(context * context, 1))
        is_free = rho > CONTEXT_FLOOR
        inverse = 1.0 / tl.maximum(rho, CONTEXT_FLOOR)
        turned = q.to(tl.float32) - tl.where(is_free, r * inverse, 0.0)[:, None] * context
        out = turned_ptr + place[:, None] * DIM + offs_d[None, :]
        tl.store(out, turned.to(q.dtype), mask=mask)
        # in r's place the mean similarity, which the pass over rows subtracts for d alpha
        tl.store(r_ptr + place, r * tl.maximum(rho, CONTEXT_FLOOR), mask=mask_r)
        tl.store(h_ptr + place, g * inverse, mask=mask_r)
        tl.store(g_ptr + place, tl.where(is_free, 0.0, g * r), mask=mask_r)


@triton.jit(do_not_specialize=["row_base"])
def _context_bwd_rows_kernel(
    rows_ptr, index_ptr, bounds_ptr, v_ptr, bias_ptr, alpha_ptr, stat_ptr, floor_ptr, h_ptr,
    turned_ptr, mean_ptr, rows_grad_ptr, alpha_part_ptr,
    first_text, last_text, row_base, images, stride_rm, stride_part,
    P_PAD: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
    SEG0: tl.constexpr, SEG1: tl.constexpr, SEG2: tl.constexpr, TILES: tl.constexpr,
    WANT_ALPHA: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """d rows of BLOCK_R rows over a share of the images."""
    WHOLE: tl.constexpr = TILES * SEG0 == P_PAD
    start = tl.load(bounds_ptr + first_text)
    count = tl.load(bounds_ptr + last_text) - start
    if tl.program_id(0) * BLOCK_R >= count:
        return
    offs_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_d = tl.arange(0, BLOCK_D)
    mask_r = offs_r < count
    mask = mask_r[:, None] & (offs_d < DIM)[None, :]
    q = _load_rows(rows_ptr, start + tl.program_id(0) * BLOCK_R, DIM, BLOCK_D, BLOCK_R)
    alpha = tl.load(alpha_ptr)
    acc = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    alpha_sum = tl.zeros([BLOCK_R], tl.float32)
    share = tl.cdiv(images, tl.num_programs(1))
    begin = tl.program_id(1) * share
    for image in range(begin, tl.minimum(begin + share, images)):
        m = tl.full([], 0, tl.int64) + image
        place = m * stride_rm + offs_r
        stat = tl.load(stat_ptr + place, mask=mask_r, other=0.0)
        floor = tl.load(floor_ptr + place, mask=mask_r, other=0.0)
        h = tl.load(h_ptr + place, mask=mask_r, other=0.0)
        at = turned_ptr + place[:, None] * DIM + offs_d[None, :]
        turned = tl.load(at, mask=mask, other=0.0)
        if WANT_ALPHA:
            mean = tl.load(mean_ptr + place, mask=mask_r, other=0.0)
        for tile in tl.range(0, TILES, disable_licm=True):
            v, unused_bias = _load_patches(
                v_ptr, bias_ptr, tile * SEG0, m, P_PAD, DIM, BLOCK_D, SEG0, WHOLE
            )
            vt = tl.trans(v)
            s, a = _weights(q, vt, stat, alpha, BLOCK_R, SEG0, PRECISION, UPCAST)
            y = tl.zeros([BLOCK_R, SEG0], tl.float32)
            y = dot(turned, vt, y, PRECISION, UPCAST)
            dl = a * (h[:, None] * y - floor[:, None])
            if WANT_ALPHA:
                alpha_sum += tl.sum(dl * (s - mean[:, None]), 1)
            ds = alpha * dl + h[:, None] * a
            acc = dot(ds.to(v.dtype), v, acc, PRECISION, UPCAST)
    # the buffer of a chunk begins at its first text
    index = tl.load(index_ptr + start + offs_r, mask=mask_r, other=0).to(tl.int64) - row_base
    out = rows_grad_ptr + tl.program_id(1).to(tl.int64) * stride_part
    tl.store(out + index[:, None] * DIM + offs_d[None, :], acc, mask=mask)
    if WANT_ALPHA:
        part = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
        tl.store(alpha_part_ptr + part, tl.sum(alpha_sum, 0))


@triton.jit
def _context_bwd_patches_kernel(
    rows_ptr, bounds_ptr, v_ptr, bias_ptr, alpha_ptr, stat_ptr, floor_ptr, h_ptr,
    turned_ptr, patch_grad_ptr, first_text, last_text, stride_rm, stride_part,
    P_PAD: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
    SEG0: tl.constexpr, SEG1: tl.constexpr, SEG2: tl.constexpr, TILES: tl.constexpr,
    ACCUMULATE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """d patches of one tile of one image over a share of the rows."""
    m = (tl.program_id(0) // TILES).to(tl.int64)
    first = (tl.program_id(0) % TILES) * SEG0
    WHOLE: tl.constexpr = TILES * SEG0 == P_PAD
    start = tl.load(bounds_ptr + first_text)
    count = tl.load(bounds_ptr + last_text) - start
    alpha = tl.load(alpha_ptr)
    offs_d = tl.arange(0, BLOCK_D)
    v, unused_bias = _load_patches(v_ptr, bias_ptr, first, m, P_PAD, DIM, BLOCK_D, SEG0, WHOLE)
    vt = tl.trans(v)  # outside the loop, see _pool_rows
    acc = tl.zeros([BLOCK_D, SEG0], tl.float32)
    tiles = tl.cdiv(count, BLOCK_R)
    share = tl.cdiv(tiles, tl.num_programs(1))
    begin = tl.program_id(1) * share
    for tile in tl.range(begin, tl.minimum(begin + share, tiles), disable_licm=True):
        offs_r = tile * BLOCK_R + tl.arange(0, BLOCK_R)
        mask_r = offs_r < count
        q = _load_rows(rows_ptr, start + tile * BLOCK_R, DIM, BLOCK_D, BLOCK_R)
        place = m * stride_rm + offs_r
        turned = tl.load(
            turned_ptr + place[:, None] * DIM + offs_d[None, :],
            mask=mask_r[:, None] & (offs_d < DIM)[None, :],
            other=0.0,
        )
        stat = tl.load(stat_ptr + place, mask=mask_r, other=0.0)
        floor = tl.load(floor_ptr + place, mask=mask_r, other=0.0)
        h = tl.load(h_ptr + place, mask=mask_r, other=0.0)
        unused_s, a = _weights(q, vt, stat, alpha, BLOCK_R, SEG0, PRECISION, UPCAST)
        y = dot(turned, vt, tl.zeros([BLOCK_R, SEG0], tl.float32), PRECISION, UPCAST)
        dl = alpha * a * (h[:, None] * y - floor[:, None])
        acc = dot(tl.trans(q), dl.to(q.dtype), acc, PRECISION, UPCAST)
        acc = dot(tl.trans(turned), (h[:, None] * a).to(q.dtype), acc, PRECISION, UPCAST)
    offs_p = first + tl.arange(0, SEG0)
    out = patch_grad_ptr + tl.program_id(1).to(tl.int64) * stride_part
    at = out + m * (P_PAD * DIM) + offs_p[None, :] * DIM + offs_d[:, None]
    mask = (offs_p < P_PAD)[None, :] & (offs_d < DIM)[:, None]
    if ACCUMULATE:
        acc += tl.load(at, mask=mask, other=0.0)
    tl.store(at, acc, mask=mask)
