"""Backward Triton kernels of the pair scores: similarities are made again, nothing is added twice.

Rows and patches have a pass each, in which one program owns its output and adds in a fixed order:
no atomics, the same bits every time. Formulas: derivation 2 of the README; tile maps there too.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mlip.kernels._dot_triton_kernels import dot
from mlip.kernels.token_knowledge_patch.forward_triton_kernels import (
    LOG2_E,
    _load_patches,
    _load_rows,
)

# a learned attention scale in this range takes the short way. Up to the upper bound a weight on
# padding stays below 2^58; from the lower bound on, d alpha may be told from a sum over ds by alpha
PLAIN_LEAST = tl.constexpr(1.0)
PLAIN_MOST = tl.constexpr(40.0)
# the softmax statistic of a row that is not there: every weight 0
ABSENT = tl.constexpr(1e30)


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
    g_ptr, weight_grad_ptr, gamma_part_ptr,
    first_text, last_text, images, stride_rm, stride_sm,
    HAS_VALID: tl.constexpr, LSE: tl.constexpr, STORE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """d weight and gamma * d gamma of BLOCK_R rows and all images; STORE: g = dS * dS/dr
    too."""
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
    tl.store(weight_grad_ptr + index, weight_grad, mask=mask_r)
    tl.store(gamma_part_ptr + tl.program_id(0), tl.sum(gamma_sum, 0))


@triton.jit
def _log2_weight(s, stat, alpha):
    return s * (alpha * LOG2_E) - stat[:, None]


@triton.jit
def _similarity_gradient(s, a, r, g, alpha):
    """ds [rows, SEG] of similarities s and softmax weights a [rows, SEG], r their mean."""
    slope = alpha * g
    return a * ((g - slope * r)[:, None] + slope[:, None] * s)


@triton.jit
def _bounded_gradient(
    s, bias, r, stat, g, alpha, alpha_sum, WANT_ALPHA: tl.constexpr, PLAIN: tl.constexpr
):  # fmt: skip
    """(ds, alpha_sum and its part of d alpha) of similarities [rows, SEG], finite on padding too.

    PLAIN: an attention scale from PLAIN_LEAST to PLAIN_MOST
    """
    x = _log2_weight(s, stat, alpha)
    # padding has s = 0: a weight that overflowed there would turn the zero it multiplies into NaN
    if not PLAIN:
        if WANT_ALPHA:
            x += bias[None, :]  # no weight at all, as the sum below needs it
        else:
            x = tl.minimum(x, 0.0)  # a real weight is at most 1
    a = tl.exp2(x)
    if WANT_ALPHA and not PLAIN:
        # g (s - r)^2 by patch, the form that cancels least; g apart, whose square underflows
        away = s - r[:, None]
        alpha_sum += tl.where(g != 0, g * tl.sum(a * away * away, 1), 0.0)
        ds = a * (g[:, None] + (alpha * g)[:, None] * away)
    else:
        ds = _similarity_gradient(s, a, r, g, alpha)
        if WANT_ALPHA:
            alpha_sum += tl.sum(ds * s, 1)
    return ds, alpha_sum


@triton.jit
def _rows_step(
    q, v, bias, r, stat, g, alpha, acc, alpha_sum,
    BLOCK_R: tl.constexpr, SEG: tl.constexpr, WANT_ALPHA: tl.constexpr, PLAIN: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    s = dot(q, tl.trans(v), tl.zeros([BLOCK_R, SEG], tl.float32), PRECISION, UPCAST)
    ds, alpha_sum = _bounded_gradient(s, bias, r, stat, g, alpha, alpha_sum, WANT_ALPHA, PLAIN)
    return dot(ds.to(v.dtype), v, acc, PRECISION, UPCAST), alpha_sum


@triton.jit
def _rows_over_images(
    rows_ptr, index_ptr, v_ptr, bias_ptr, r_ptr, stat_ptr, g_ptr, rows_grad_ptr, alpha_part_ptr,
    alpha, start, count, row_base, images, stride_rm, stride_part,
    P_PAD: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
    SEG0: tl.constexpr, SEG1: tl.constexpr, SEG2: tl.constexpr, TILES: tl.constexpr,
    WANT_ALPHA: tl.constexpr, PLAIN: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """d rows and d alpha of this program's rows over its share of the images, stored."""
    offs_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_r = offs_r < count
    q = _load_rows(rows_ptr, start + tl.program_id(0) * BLOCK_R, DIM, BLOCK_D, BLOCK_R)
    acc = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    alpha_sum = tl.zeros([BLOCK_R], tl.float32)
    SPAN: tl.constexpr = SEG0 + SEG1 + SEG2
    WHOLE: tl.constexpr = TILES * SPAN == P_PAD
    share = tl.cdiv(images, tl.num_programs(1))
    begin = tl.program_id(1) * share
    end = tl.minimum(begin + share, images)
    if WANT_ALPHA and not PLAIN:
        # true, as the host makes the shares. Else Triton 3.7 and newer put the zeros of a loop that
        # never runs between its last product and the wait for it, and ptxas makes every product of
        # the kernel wait for the one before
        tl.assume(begin < end)
    # images and their tiles in one loop: a short inner loop would drain the load pipeline
    for step in tl.range(begin * TILES, end * TILES, disable_licm=True):
        m = tl.full([], 0, tl.int64) + step // TILES
        first = (step % TILES) * SPAN
        place = m * stride_rm + offs_r
        stat = tl.load(stat_ptr + place, mask=mask_r, other=ABSENT)
        g = tl.load(g_ptr + place, mask=mask_r, other=0.0)
        r = tl.load(r_ptr + place, mask=mask_r, other=0.0)
        if PLAIN and WANT_ALPHA:
            alpha_sum -= tl.where(first == 0, g * r, 0.0)
        v0, b0 = _load_patches(v_ptr, bias_ptr, first, m, P_PAD, DIM, BLOCK_D, SEG0, WHOLE)
        acc, alpha_sum = _rows_step(
            q, v0, b0, r, stat, g, alpha, acc, alpha_sum,
            BLOCK_R, SEG0, WANT_ALPHA, PLAIN, PRECISION, UPCAST,
        )  # fmt: skip
        if SEG1 > 0:
            first += SEG0
            v1, b1 = _load_patches(v_ptr, bias_ptr, first, m, P_PAD, DIM, BLOCK_D, SEG1, WHOLE)
            acc, alpha_sum = _rows_step(
                q, v1, b1, r, stat, g, alpha, acc, alpha_sum,
                BLOCK_R, SEG1, WANT_ALPHA, PLAIN, PRECISION, UPCAST,
            )  # fmt: skip
        if SEG2 > 0:
            first += SEG1
            v2, b2 = _load_patches(v_ptr, bias_ptr, first, m, P_PAD, DIM, BLOCK_D, SEG2, WHOLE)
            acc, alpha_sum = _rows_step(
                q, v2, b2, r, stat, g, alpha, acc, alpha_sum,
                BLOCK_R, SEG2, WANT_ALPHA, PLAIN, PRECISION, UPCAST,
            )  # fmt: skip
    if PLAIN and WANT_ALPHA:
        # ds = g a (1 + alpha (s - r)) makes the sum of ds s over patches g r + alpha d alpha
        alpha_sum /= alpha
    # the buffer of a chunk begins at its first text
    index = tl.load(index_ptr + start + offs_r, mask=mask_r, other=0).to(tl.int64) - row_base
    offs_d = tl.arange(0, BLOCK_D)
    out = rows_grad_ptr + tl.program_id(1).to(tl.int64) * stride_part
    tl.store(
        out + index[:, None] * DIM + offs_d[None, :],
        acc,
        mask=mask_r[:, None] & (offs_d < DIM)[None, :],
    )
    if WANT_ALPHA:
        part = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
        tl.store(alpha_part_ptr + part, tl.sum(alpha_sum, 0))


@triton.jit(do_not_specialize=["row_base"])
def _pair_bwd_rows_kernel(
    rows_ptr, index_ptr, bounds_ptr, v_ptr, bias_ptr, alpha_ptr, r_ptr, stat_ptr, g_ptr,
    rows_grad_ptr, alpha_part_ptr,
    first_text, last_text, row_base, images, stride_rm, stride_part,
    P_PAD: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
    SEG0: tl.constexpr, SEG1: tl.constexpr, SEG2: tl.constexpr, TILES: tl.constexpr,
    WANT_ALPHA: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """d rows of BLOCK_R rows over a share of the images; patches stream past. Row `row_base` is the
    buffer's first."""
    start = tl.load(bounds_ptr + first_text)
    count = tl.load(bounds_ptr + last_text) - start
    if tl.program_id(0) * BLOCK_R >= count:
        return
    alpha = tl.load(alpha_ptr)
    # float32 operands are for exactness: there d alpha is summed in the form that cancels least
    if WANT_ALPHA and (PRECISION != "tf32x3"):
        if (alpha >= PLAIN_LEAST) & (alpha <= PLAIN_MOST):
            _rows_over_images(
                rows_ptr, index_ptr, v_ptr, bias_ptr, r_ptr, stat_ptr, g_ptr, rows_grad_ptr,
                alpha_part_ptr, alpha, start, count, row_base, images, stride_rm, stride_part,
                P_PAD, DIM, BLOCK_D, BLOCK_R, SEG0, SEG1, SEG2, TILES, WANT_ALPHA, True,
                PRECISION, UPCAST,
            )  # fmt: skip
            return
    _rows_over_images(
        rows_ptr, index_ptr, v_ptr, bias_ptr, r_ptr, stat_ptr, g_ptr, rows_grad_ptr,
        alpha_part_ptr, alpha, start, count, row_base, images, stride_rm, stride_part,
        P_PAD, DIM, BLOCK_D, BLOCK_R, SEG0, SEG1, SEG2, TILES, WANT_ALPHA, False,
        PRECISION, UPCAST,
    )  # fmt: skip


@triton.jit
def _patches_step(
    q, vt, r, stat, g, alpha, acc,
    BLOCK_R: tl.constexpr, SEG: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    s = dot(q, vt, tl.zeros([BLOCK_R, SEG], tl.float32), PRECISION, UPCAST)
    # unbounded: a weight that overflows on padding stays in the column of a patch that is padding,
    # and nobody reads that column's gradient
    ds = _similarity_gradient(s, tl.exp2(_log2_weight(s, stat, alpha)), r, g, alpha)
    # transposed: D is the long side of the product, so a short segment wastes no tensor core rows
    return dot(tl.trans(q), ds.to(q.dtype), acc, PRECISION, UPCAST)


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


@triton.jit
def _pair_bwd_patches_kernel(
    rows_ptr, bounds_ptr, v_ptr, bias_ptr, alpha_ptr, r_ptr, stat_ptr, g_ptr,
    patch_grad_ptr, first_text, last_text, stride_rm, stride_part,
    P_PAD: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
    SEG0: tl.constexpr, TILES: tl.constexpr, ACCUMULATE: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """d patches of one tile of one image over a share of the rows, which stream past in order."""
    m = (tl.program_id(0) // TILES).to(tl.int64)
    here = m * stride_rm
    first = (tl.program_id(0) % TILES) * SEG0
    start = tl.load(bounds_ptr + first_text)
    count = tl.load(bounds_ptr + last_text) - start
    alpha = tl.load(alpha_ptr)
    WHOLE: tl.constexpr = TILES * SEG0 == P_PAD
    v, _ = _load_patches(v_ptr, bias_ptr, first, m, P_PAD, DIM, BLOCK_D, SEG0, WHOLE)
    vt = tl.trans(v)  # outside the loop, see _pool_rows
    acc = tl.zeros([BLOCK_D, SEG0], tl.float32)
    tiles = tl.cdiv(count, BLOCK_R)
    share = tl.cdiv(tiles, tl.num_programs(1))
    begin = tl.program_id(1) * share
    for tile in tl.range(begin, tl.minimum(begin + share, tiles), disable_licm=True):
        offs_r = tile * BLOCK_R + tl.arange(0, BLOCK_R)
        mask_r = offs_r < count
        q = _load_rows(rows_ptr, start + tile * BLOCK_R, DIM, BLOCK_D, BLOCK_R)
        stat = tl.load(stat_ptr + here + offs_r, mask=mask_r, other=ABSENT)
        g = tl.load(g_ptr + here + offs_r, mask=mask_r, other=0.0)
        r = tl.load(r_ptr + here + offs_r, mask=mask_r, other=0.0)
        acc = _patches_step(q, vt, r, stat, g, alpha, acc, BLOCK_R, SEG0, PRECISION, UPCAST)
    out = patch_grad_ptr + tl.program_id(1).to(tl.int64) * stride_part
    _store_patches(out, acc, first, m, P_PAD, DIM, BLOCK_D, SEG0, ACCUMULATE)
