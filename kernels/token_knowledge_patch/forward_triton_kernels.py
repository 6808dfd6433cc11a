"""Forward Triton kernels of the pair scores: query rows against the patches of every image.

A row is one query vector of one text; rows of weight 0 are not among the packed ones, so padding
costs nothing. Every output has one owner: no atomics, the same bits every time. Tile maps: README.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mlip.kernels._dot_triton_kernels import dot

LOG2_E = tl.constexpr(1.4426950408889634)  # powers are of two in place of e
# additive bias of a masked patch, and a row maximum that any real logit exceeds; both finite,
# because -inf minus -inf is NaN
MASKED = tl.constexpr(-1e30)
NO_MAXIMUM = tl.constexpr(-1e29)
# a chip's maximum passes NaN over. So a patch with NaN comes as a zero row with this bias: above
# any similarity, and NaN in a softmax. And a maximum begins here, below a masked patch: where it
# still is at the end, every similarity was NaN, as those of a row with NaN are
BROKEN = tl.constexpr(float("inf"))
NO_PATCH = tl.constexpr(-2e30)
CONTEXT_FLOOR = tl.constexpr(1e-6)
# no similarity is above 1.004 (bfloat16 rows), so up to this scale exp() needs no row maximum:
# MAX_PATCHES e^75.3 < 3e38
UNSHIFTED_SCALE = tl.constexpr(75.0)


@triton.jit
def _load_patches(
    v_ptr, bias_ptr, first, m, P_PAD: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    SEG: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Patches first .. first + SEG of image m [SEG, D] and their biases [SEG].

    WHOLE: the tiles of an image end where it does.
    """
    offs_p = first + tl.arange(0, SEG)
    offs_d = tl.arange(0, BLOCK_D)
    at = v_ptr + m * (P_PAD * DIM) + offs_p[:, None] * DIM + offs_d[None, :]
    bias_at = bias_ptr + m * P_PAD + offs_p
    if WHOLE:
        return tl.load(at, mask=(offs_d < DIM)[None, :], other=0.0), tl.load(bias_at)
    inside = offs_p < P_PAD
    v = tl.load(at, mask=inside[:, None] & (offs_d < DIM)[None, :], other=0.0)
    return v, tl.load(bias_at, mask=inside, other=MASKED)


@triton.jit
def _load_rows(
    rows_ptr, first, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr
):  # fmt: skip
    """Packed rows first .. first + BLOCK_R [BLOCK_R, D]; the buffer goes on past the last one."""
    offs_r = tl.arange(0, BLOCK_R)
    offs_d = tl.arange(0, BLOCK_D)
    at = rows_ptr + first.to(tl.int64) * DIM + offs_r[:, None] * DIM + offs_d[None, :]
    return tl.load(at, mask=(offs_d < DIM)[None, :], other=0.0)


@triton.jit
def _absorb(
    q, vt, bias, first, top, total, part, where, context, alpha2,
    BLOCK_R: tl.constexpr, SEG: tl.constexpr, POOLING: tl.constexpr, SHIFT: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Fold SEG patches, transposed [D, SEG], into the running pooled state of BLOCK_R rows."""
    s = dot(q, vt, tl.zeros([BLOCK_R, SEG], tl.float32), PRECISION, UPCAST)
    if POOLING == "max":
        x = s + bias[None, :]
        best = tl.max(x, 1)
        # the lowest index that reaches it: half the instructions of a maximum that carries indices
        at = tl.min(tl.where(x == best[:, None], tl.arange(0, SEG)[None, :], SEG), 1)
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
            narrow = p.to(vt.dtype)
            context = dot(narrow, tl.trans(vt), context, PRECISION, UPCAST)
            p = narrow.to(tl.float32)
        part += tl.sum(p * s, 1)
    return top, total, part, where, context


@triton.jit
def _pool_rows(
    rows_ptr, v_ptr, bias_ptr, r_ptr, stat_ptr, alpha2, start, count, stride_rm,
    P_PAD: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
    SEG0: tl.constexpr, SEG1: tl.constexpr, SEG2: tl.constexpr, TILES: tl.constexpr,
    POOLING: tl.constexpr, SHIFT: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Every row tile of this program's share; SHIFT subtracts a running row maximum."""
    m = tl.program_id(0).to(tl.int64)
    SPAN: tl.constexpr = SEG0 + SEG1 + SEG2
    WHOLE: tl.constexpr = TILES * SPAN == P_PAD
    WIDE: tl.constexpr = BLOCK_D if POOLING == "context" else 1
    # turned here: Triton 3.9 puts a product's operand into shared memory where it is turned, and
    # inside the loop would do so for every row tile
    if TILES == 1:
        v0, b0 = _load_patches(v_ptr, bias_ptr, 0, m, P_PAD, DIM, BLOCK_D, SEG0, WHOLE)
        vt0 = tl.trans(v0)
        if SEG1 > 0:
            v1, b1 = _load_patches(v_ptr, bias_ptr, SEG0, m, P_PAD, DIM, BLOCK_D, SEG1, WHOLE)
            vt1 = tl.trans(v1)
        if SEG2 > 0:
            v2, b2 = _load_patches(
                v_ptr, bias_ptr, SEG0 + SEG1, m, P_PAD, DIM, BLOCK_D, SEG2, WHOLE
            )
            vt2 = tl.trans(v2)
    for tile in tl.range(
        tl.program_id(1), tl.cdiv(count, BLOCK_R), tl.num_programs(1), disable_licm=True
    ):
        offs_r = tile * BLOCK_R + tl.arange(0, BLOCK_R)
        mask_r = offs_r < count
        q = _load_rows(rows_ptr, start + tile * BLOCK_R, DIM, BLOCK_D, BLOCK_R)
        if POOLING == "max":
            top = tl.full([BLOCK_R], NO_PATCH, tl.float32)
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
                q, vt0, b0, 0, top, total, part, where, context, alpha2,
                BLOCK_R, SEG0, POOLING, SHIFT, PRECISION, UPCAST,
            )  # fmt: skip
            if SEG1 > 0:
                top, total, part, where, context = _absorb(
                    q, vt1, b1, SEG0, top, total, part, where, context, alpha2,
                    BLOCK_R, SEG1, POOLING, SHIFT, PRECISION, UPCAST,
                )  # fmt: skip
            if SEG2 > 0:
                top, total, part, where, context = _absorb(
                    q, vt2, b2, SEG0 + SEG1, top, total, part, where, context, alpha2,
                    BLOCK_R, SEG2, POOLING, SHIFT, PRECISION, UPCAST,
                )  # fmt: skip
        else:
            for step in range(0, TILES):
                first = step * SPAN
                v0, b0 = _load_patches(v_ptr, bias_ptr, first, m, P_PAD, DIM, BLOCK_D, SEG0, WHOLE)
                top, total, part, where, context = _absorb(
                    q, tl.trans(v0), b0, first, top, total, part, where, context, alpha2,
                    BLOCK_R, SEG0, POOLING, SHIFT, PRECISION, UPCAST,
                )  # fmt: skip
        out = m * stride_rm + offs_r
        if POOLING == "max":
            r = tl.where(top > -1.5, top, 0.0)
            r = tl.where((top == BROKEN) | (top == NO_PATCH), float("nan"), r)
            tl.store(r_ptr + out, r, mask=mask_r)
            tl.store(stat_ptr + out, where, mask=mask_r)
        else:
            some = (total > 0) | (total != total)  # NaN of the inputs stays NaN
            safe = tl.where(some, total, 1.0)
            if POOLING == "context":
                # a mean first: the square of a sum of e^(alpha s) leaves float32 from alpha = 44 on
                small = 1.0 / safe
                context *= small[:, None]
                rho = tl.sqrt(tl.sum(context * context, 1)) / (safe * small)
                r = part / safe / tl.maximum(rho, CONTEXT_FLOOR)
            else:
                r = part / safe
            tl.store(r_ptr + out, tl.where(some, r, 0.0), mask=mask_r)
            tl.store(stat_ptr + out, tl.where(some, top + tl.log2(safe), 0.0), mask=mask_r)


@triton.jit
def _pair_fwd_kernel(
    rows_ptr, bounds_ptr, v_ptr, bias_ptr, alpha_ptr, r_ptr, stat_ptr,
    first_text, last_text, stride_rm,
    P_PAD: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
    SEG0: tl.constexpr, SEG1: tl.constexpr, SEG2: tl.constexpr, TILES: tl.constexpr,
    POOLING: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """r[m, row] and its softmax statistic (or argmax) for one image and every row of a chunk.

    The image's patches stay on chip (TILES == 1) while row tiles stream past; larger images are
    streamed tile by tile under a stationary row tile.
    """
    start = tl.load(bounds_ptr + first_text)
    count = tl.load(bounds_ptr + last_text) - start
    alpha = tl.load(alpha_ptr)
    # the scale is known here and not on the host, which never reads a tensor
    if (POOLING == "max") or (tl.abs(alpha) <= UNSHIFTED_SCALE):
        _pool_rows(
            rows_ptr, v_ptr, bias_ptr, r_ptr, stat_ptr, alpha * LOG2_E, start, count,
            stride_rm, P_PAD, DIM, BLOCK_D, BLOCK_R, SEG0, SEG1, SEG2, TILES, POOLING, False,
            PRECISION, UPCAST,
        )  # fmt: skip
    else:
        _pool_rows(
            rows_ptr, v_ptr, bias_ptr, r_ptr, stat_ptr, alpha * LOG2_E, start, count,
            stride_rm, P_PAD, DIM, BLOCK_D, BLOCK_R, SEG0, SEG1, SEG2, TILES, POOLING, True,
            PRECISION, UPCAST,
        )  # fmt: skip


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
        some = total != 0  # NaN stays NaN
        total = tl.where(some, (top + tl.log(tl.where(some, total, 1.0))) / gamma, 0.0)
    if HAS_VALID:
        valid = tl.load(valid_ptr + offs_m, mask=mask_m, other=0)
        total = tl.where(valid != 0, total, 0.0)
    out = offs_m * stride_sm + first_text + local
    tl.store(score_ptr + out, total, mask=mask_m)
