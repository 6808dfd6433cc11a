"""Forward Triton kernels of symmetric InfoNCE: both log-sum-exps in one pass over the logits.

No logit but the positives leaves the chip. Every output has one owner: no atomics, the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mlip.kernels._dot_triton_kernels import dot

LOG_2 = tl.constexpr(0.6931471805599453)
LOG2_E = tl.constexpr(1.4426950408889634)  # powers are of two in place of e
# finite, because -inf minus -inf is NaN; any real logit is above NO_MAXIMUM
MASKED = tl.constexpr(-1e30)
NO_MAXIMUM = tl.constexpr(-1e29)


@triton.jit
def _tile_pointers(ptr, offs_r, last, offs_d, DIM: tl.constexpr):
    """Pointers of rows [R, D]; a row past the last is the last one, so that no load has a mask."""
    rows = tl.minimum(offs_r, last).to(tl.int64)
    return ptr + rows[:, None] * DIM + offs_d[None, :]


@triton.jit
def _load_part(at, k, offs_k, DIM: tl.constexpr, BLOCK_K: tl.constexpr):
    if DIM % BLOCK_K == 0:
        return tl.load(at + k)
    return tl.load(at + k, mask=(offs_k < DIM - k)[None, :], other=0.0)


@triton.jit
def _longest_of(x_ptr, rows, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr):
    longest = tl.full([], 0.0, tl.float32)
    offs_d = tl.arange(0, BLOCK_D)
    for first in range(tl.program_id(0) * BLOCK_R, rows, tl.num_programs(0) * BLOCK_R):
        offs_r = tl.minimum(first + tl.arange(0, BLOCK_R), rows - 1).to(tl.int64)
        at = x_ptr + offs_r[:, None] * DIM + offs_d[None, :]
        x = tl.load(at, mask=(offs_d < DIM)[None, :], other=0.0).to(tl.float32)
        longest = tl.maximum(longest, tl.max(tl.sum(x * x, 1), 0))
    return longest


@triton.jit
def _longest_kernel(
    a_ptr, b_ptr, out_ptr, rows, columns,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """out[2, programs]: the largest squared length of a share of the rows of a, and of b."""
    out = out_ptr + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    if tl.program_id(1) == 0:
        tl.store(out, _longest_of(a_ptr, rows, DIM, BLOCK_D, BLOCK_R))
    else:
        tl.store(out, _longest_of(b_ptr, columns, DIM, BLOCK_D, BLOCK_R))


@triton.jit
def _is_bounded(longest_ptr, scale, count, SHARES: tl.constexpr):
    # no logit is above scale |a| |b|: sums of `count` powers of e stay in range, none is lost
    offs = tl.arange(0, SHARES)
    a = tl.max(tl.load(longest_ptr + offs), 0)
    b = tl.max(tl.load(longest_ptr + SHARES + offs), 0)
    bound = tl.abs(scale) * LOG2_E * tl.sqrt(a) * tl.sqrt(b)
    return (bound <= 124.0) & (bound + tl.log2(count.to(tl.float32)) <= 127.0)


@triton.jit
def _statistics_of_blocks(
    a_ptr, b_ptr, scale, ids_a_ptr, ids_b_ptr,
    row_max_ptr, row_sum_ptr, column_max_ptr, column_sum_ptr, positive_ptr,
    rows, columns, offset, split,
    DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    HAS_IDS: tl.constexpr, BOUNDED: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """This program's row blocks against its share of the columns; BOUNDED needs no maxima."""
    scale2 = scale * LOG2_E
    row_out = tl.program_id(1).to(tl.int64) * rows
    column_out = tl.program_id(0).to(tl.int64) * columns
    begin = tl.program_id(1) * split
    end = tl.minimum(begin + split, columns)
    offs_k = tl.arange(0, BLOCK_K)
    for block in range(tl.program_id(0), tl.cdiv(rows, BLOCK_M), tl.num_programs(0)):
        offs_m = block * BLOCK_M + tl.arange(0, BLOCK_M)
        mask_m = offs_m < rows
        own_n = offs_m + offset
        first_own = block * BLOCK_M + offset
        a_at = _tile_pointers(a_ptr, offs_m, rows - 1, offs_k, DIM)
        top = tl.full([BLOCK_M], NO_MAXIMUM, tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        if HAS_IDS:
            ids_a = tl.load(ids_a_ptr + offs_m, mask=mask_m, other=0)
        for first in range(begin, end, BLOCK_N):
            offs_n = first + tl.arange(0, BLOCK_N)
            mask_n = offs_n < end
            b_at = _tile_pointers(b_ptr, offs_n, columns - 1, offs_k, DIM)
            s = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            for k in range(0, DIM, BLOCK_K):
                a = _load_part(a_at, k, offs_k, DIM, BLOCK_K)
                b = _load_part(b_at, k, offs_k, DIM, BLOCK_K)
                s = dot(a, tl.trans(b), s, PRECISION, UPCAST)
            # of a tile without a positive and without an end every logit counts
            has_own = (first_own < first + BLOCK_N) & (first_own + BLOCK_M > first)
            is_cut = (block * BLOCK_M + BLOCK_M > rows) | (first + BLOCK_N > end)
            if BOUNDED:
                x = tl.exp2(s * scale2)
            else:
                x = s * scale2
            NOTHING: tl.constexpr = 0.0 if BOUNDED else MASKED
            if HAS_IDS:
                ids_b = tl.load(ids_b_ptr + offs_n, mask=mask_n, other=0)
                x = tl.where(ids_a[:, None] == ids_b[None, :], NOTHING, x)
            if has_own | is_cut:
                own = own_n[:, None] == offs_n[None, :]
                here = (own_n >= first) & (own_n < first + BLOCK_N)
                positive = tl.sum(tl.where(own, s, 0.0), 1) * scale
                tl.store(positive_ptr + offs_m, positive, mask=mask_m & here)
                x = tl.where(own | ~(mask_m[:, None] & mask_n[None, :]), NOTHING, x)
            # this program alone owns its row of the column statistics, block after block
            if BOUNDED:
                total += tl.sum(x, 1)
                mass = tl.sum(x, 0)
                if block >= tl.num_programs(0):
                    mass += tl.load(column_sum_ptr + column_out + offs_n, mask=mask_n, other=0.0)
                else:
                    zero = tl.zeros([BLOCK_N], tl.float32)
                    tl.store(column_max_ptr + column_out + offs_n, zero, mask=mask_n)
            else:
                new = tl.maximum(top, tl.max(x, 1))
                total = total * tl.exp2(top - new) + tl.sum(tl.exp2(x - new[:, None]), 1)
                top = new
                peak = tl.maximum(tl.max(x, 0), NO_MAXIMUM)
                mass = tl.sum(tl.exp2(x - peak[None, :]), 0)
                peak *= LOG_2
                if block >= tl.num_programs(0):
                    old = tl.load(
                        column_max_ptr + column_out + offs_n, mask=mask_n, other=NO_MAXIMUM
                    )
                    held = tl.load(column_sum_ptr + column_out + offs_n, mask=mask_n, other=0.0)
                    higher = tl.maximum(old, peak)
                    mass = mass * tl.exp(peak - higher) + held * tl.exp(old - higher)
                    peak = higher
                tl.store(column_max_ptr + column_out + offs_n, peak, mask=mask_n)
            tl.store(column_sum_ptr + column_out + offs_n, mass, mask=mask_n)
        if BOUNDED:
            top = tl.zeros([BLOCK_M], tl.float32)
        tl.store(row_max_ptr + row_out + offs_m, top * LOG_2, mask=mask_m)
        tl.store(row_sum_ptr + row_out + offs_m, total, mask=mask_m)


@triton.jit
def _info_nce_fwd_kernel(
    a_ptr, b_ptr, scale_ptr, longest_ptr, ids_a_ptr, ids_b_ptr,
    row_max_ptr, row_sum_ptr, column_max_ptr, column_sum_ptr, positive_ptr,
    rows, columns, offset, split,
    DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    HAS_IDS: tl.constexpr, SHARES: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Maxima and sums over negatives, of rows within a share of the columns, and of columns within
    this program's row blocks; every positive logit."""
    scale = tl.load(scale_ptr)
    if _is_bounded(longest_ptr, scale, tl.maximum(rows, columns), SHARES):
        _statistics_of_blocks(
            a_ptr, b_ptr, scale, ids_a_ptr, ids_b_ptr, row_max_ptr, row_sum_ptr, column_max_ptr,
            column_sum_ptr, positive_ptr, rows, columns, offset, split,
            DIM, BLOCK_M, BLOCK_N, BLOCK_K, HAS_IDS, True, PRECISION, UPCAST,
        )  # fmt: skip
    else:
        _statistics_of_blocks(
            a_ptr, b_ptr, scale, ids_a_ptr, ids_b_ptr, row_max_ptr, row_sum_ptr, column_max_ptr,
            column_sum_ptr, positive_ptr, rows, columns, offset, split,
            DIM, BLOCK_M, BLOCK_N, BLOCK_K, HAS_IDS, False, PRECISION, UPCAST,
        )  # fmt: skip
