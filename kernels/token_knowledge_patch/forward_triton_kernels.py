"""Forward Triton kernels of the pair scores: query rows against the patches of every image.

A row is one query vector of one text; rows of weight 0 are left out through an index, so padding
costs nothing. Every output has one owner: no atomics, the same bits every time. Tile maps: README.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
# additive bias of a masked patch, and a row maximum that any real logit exceeds; both finite,
# because -inf minus -inf is NaN
MASKED = tl.constexpr(-1e30)
NO_MAXIMUM = tl.constexpr(-1e29)
CONTEXT_FLOOR = tl.constexpr(1e-6)


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    # the interpreter keeps bfloat16 as raw bits and multiplies those: widen there
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _load_patches(
    v_ptr, bias_ptr, first, m, P_PAD: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    SEG: tl.constexpr,
):  # fmt: skip
    """Patches first .. first + SEG of image m [SEG, D] and their biases [SEG]."""
    offs_p = first + tl.arange(0, SEG)
    offs_d = tl.arange(0, BLOCK_D)
    inside = offs_p < P_PAD
    base = v_ptr + m * (P_PAD * DIM)
    v = tl.load(
        base + offs_p[:, None] * DIM + offs_d[None, :],
        mask=inside[:, None] & (offs_d < DIM)[None, :],
        other=0.0,
    )
    return v, tl.load(bias_ptr + m * P_PAD + offs_p, mask=inside, other=MASKED)


@triton.jit
def _load_rows(
    rows_ptr, index_ptr, offs_r, mask_r, DIM: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    index = tl.load(index_ptr + offs_r, mask=mask_r, other=0).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    return tl.load(
        rows_ptr + index[:, None] * DIM + offs_d[None, :],
        mask=mask_r[:, None] & (offs_d < DIM)[None, :],
        other=0.0,
    )


@triton.jit
def _absorb(
    q, v, bias, first, top, total, part, where, context, alpha2,
    BLOCK_R: tl.constexpr, SEG: tl.constexpr, POOLING: tl.constexpr, SHIFT: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Fold SEG patches into the running pooled state of BLOCK_R rows."""
    s = _dot(q, tl.trans(v), tl.zeros([BLOCK_R, SEG], tl.float32), PRECISION, UPCAST)
    if POOLING == "max":
        x = tl.where(bias[None, :] < 0, -2.0, s)
        best, at = tl.max(x, 1, return_indices=True, return_indices_tie_break_left=True)
        # strictly greater: the lowest index keeps a tie
        better = best > top
        where = tl.where(better, first + at, where)
        top = tl.where(better, best, top)
    else:
        x = s * alpha2 + bias[None, :]
        if SHIFT:
            new = tl.maximum(top, tl.max(x, 1))
            shrink = tl.exp2(top - new)
            x -= new[:, None]
            top = new
            total = total * shrink
            part = part * shrink
            if POOLING == "context":
                context = context * shrink[:, None]
        p = tl.exp2(x)
        total += tl.sum(p, 1)
        if POOLING == "context":
            # the same rounded weights on both sides of q . c / |c|: their bias cancels
            narrow = p.to(v.dtype)
            context = _dot(narrow, v, context, PRECISION, UPCAST)
            p = narrow.to(tl.float32)
        part += tl.sum(p * s, 1)
    return top, total, part, where, context


@triton.jit
def _pair_fwd_kernel(
    rows_ptr, index_ptr, bounds_ptr, v_ptr, bias_ptr, alpha_ptr, r_ptr, stat_ptr,
    first_text, last_text, stride_rm,
    P_PAD: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
    SEG0: tl.constexpr, SEG1: tl.constexpr, SEG2: tl.constexpr, TILES: tl.constexpr,
    POOLING: tl.constexpr, SHIFT: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """r[m, row] and its softmax statistic (or argmax) for one image and every row of a chunk.

    The image's patches stay on chip (TILES == 1) while row tiles stream past; larger images are
    streamed tile by tile under a stationary row tile.
    """
    m = tl.program_id(0).to(tl.int64)
    start = tl.load(bounds_ptr + first_text)
    count = tl.load(bounds_ptr + last_text) - start
    alpha2 = tl.load(alpha_ptr) * LOG2_E
    SPAN: tl.constexpr = SEG0 + SEG1 + SEG2
    WIDE: tl.constexpr = BLOCK_D if POOLING == "context" else 1
    if TILES == 1:
        v0, b0 = _load_patches(v_ptr, bias_ptr, 0, m, P_PAD, DIM, BLOCK_D, SEG0)
        if SEG1 > 0:
            v1, b1 = _load_patches(v_ptr, bias_ptr, SEG0, m, P_PAD, DIM, BLOCK_D, SEG1)
        if SEG2 > 0:
            v2, b2 = _load_patches(v_ptr, bias_ptr, SEG0 + SEG1, m, P_PAD, DIM, BLOCK_D, SEG2)
    for tile in range(tl.program_id(1), tl.cdiv(count, BLOCK_R), tl.num_programs(1)):
        offs_r = tile * BLOCK_R + tl.arange(0, BLOCK_R)
        mask_r = offs_r < count
        q = _load_rows(rows_ptr, index_ptr, start + offs_r, mask_r, DIM, BLOCK_D)
        if POOLING == "max":
            top = tl.full([BLOCK_R], -2.0, tl.float32)
        elif SHIFT:
            top = tl.full([BLOCK_R], NO_MAXIMUM, tl.float32)
        else:
            top = tl.zeros([BLOCK_R], tl.float32)
        total = tl.zeros([BLOCK_R], tl.float32)
        part = tl.zeros([BLOCK_R], tl.float32)
        where = tl.zeros([BLOCK_R], tl.int32)
        context = tl.zeros([BLOCK_R, WIDE], tl.float32)
        if TILES == 1:
            top, total, part, where, context = _absorb(
                q, v0, b0, 0, top, total, part, where, context, alpha2,
                BLOCK_R, SEG0, POOLING, SHIFT, PRECISION, UPCAST,
            )  # fmt: skip
            if SEG1 > 0:
                top, total, part, where, context = _absorb(
                    q, v1, b1, SEG0, top, total, part, where, context, alpha2,
                    BLOCK_R, SEG1, POOLING, SHIFT, PRECISION, UPCAST,
                )  # fmt: skip
            if SEG2 > 0:
                top, total, part, where, context = _absorb(
                    q, v2, b2, SEG0 + SEG1, top, total, part, where, context, alpha2,
                    BLOCK_R, SEG2, POOLING, SHIFT, PRECISION, UPCAST,
                )  # fmt: skip
        else:
            for step in range(0, TILES):
                first = step * SPAN
                v0, b0 = _load_patches(v_ptr, bias_ptr, first, m, P_PAD, DIM, BLOCK_D, SEG0)
                top, total, part, where, context = _absorb(
                    q, v0, b0, first, top, total, part, where, context, alpha2,
                    BLOCK_R, SEG0, POOLING, SHIFT, PRECISION, UPCAST,
                )  # fmt: skip
                if SEG1 > 0:
                    first += SEG0
                    v1, b1 = _load_patches(v_ptr, bias_ptr, first, m, P_PAD, DIM, BLOCK_D, SEG1)
                    top, total, part, where, context = _absorb(
                        q, v1, b1, first, top, total, part, where, context, alpha2,
                        BLOCK_R, SEG1, POOLING, SHIFT, PRECISION, UPCAST,
                    )  # fmt: skip
        out = m * stride_rm + offs_r
        if POOLING == "max":
            tl.store(r_ptr + out, tl.where(top > -1.5, top, 0.0), mask=mask_r)
            tl.store(stat_ptr + out, where, mask=mask_r)
        else:
            some = total > 0
            safe = tl.where(some, total, 1.0)
            if POOLING == "context":
                rho = tl.sqrt(tl.sum(context * context, 1)) / safe
                r = part / safe / tl.maximum(rho, CONTEXT_FLOOR)
            else:
                r = part / safe
            tl.store(r_ptr + out, tl.where(some, r, 0.0), mask=mask_r)
            tl.store(stat_ptr + out, tl.where(some, top + tl.log2(safe), 0.0), mask=mask_r)


@triton.jit
def _aggregate_fwd_kernel(
    r_ptr, weight_ptr, index_ptr, bounds_ptr, valid_ptr, gamma_ptr, score_ptr,
    first_text, images, stride_rm, stride_sm,
    HAS_VALID: tl.constexpr, LSE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """S[m, n] of one text and BLOCK_M images from r[m, row]."""
    local = tl.program_id(0)
    start = tl.load(bounds_ptr + first_text)
    begin = tl.load(bounds_ptr + first_text + local)
    end = tl.load(bounds_ptr + first_text + local + 1)
    offs_m = (tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    mask_m = offs_m < images
    gamma = tl.load(gamma_ptr)
    total = tl.zeros([BLOCK_M], tl.float32)
    top = tl.full([BLOCK_M], NO_MAXIMUM, tl.float32)
    for row in range(begin, end, BLOCK_R):
        offs_r = row + tl.arange(0, BLOCK_R)
        mask_r = offs_r < end
        index = tl.load(index_ptr + offs_r, mask=mask_r, other=0)
        weight = tl.load(weight_ptr + index, mask=mask_r, other=0.0)
        r = tl.load(
            r_ptr + offs_m[:, None] * stride_rm + (offs_r - start)[None, :],
            mask=mask_m[:, None] & mask_r[None, :],
            other=0.0,
        )
        if LSE:
            x = tl.where(mask_r[None, :], r * gamma, NO_MAXIMUM)
            new = tl.maximum(top, tl.max(x, 1))
            power = weight[None, :] * tl.exp(x - new[:, None])
            total = total * tl.exp(top - new) + tl.sum(power, 1)
            top = new
        else:
            total += tl.sum(r * weight[None, :], 1)
    if LSE:
        some = total > 0
        total = tl.where(some, (top + tl.log(tl.where(some, total, 1.0))) / gamma, 0.0)
    if HAS_VALID:
        valid = tl.load(valid_ptr + offs_m, mask=mask_m, other=0)
        total = tl.where(valid != 0, total, 0.0)
    out = offs_m * stride_sm + first_text + local
    tl.store(score_ptr + out, total, mask=mask_m)
