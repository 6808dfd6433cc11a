"""Triton kernels of symmetric InfoNCE: both log-sum-exps in one pass over the logits, then one pass
a side for the gradients. No logit ever leaves the chip; no atomics; tensors in, tensors out.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mlip.kernels._chip import SHARED_MEMORY, chip_facts
from mlip.kernels._dispatch import is_interpreting

# finite, because -inf minus -inf is NaN; any real logit is above NO_MAXIMUM
LOG2_E = tl.constexpr(1.4426950408889634)
LOG_2 = tl.constexpr(0.6931471805599453)
MASKED = tl.constexpr(-1e30)
NO_MAXIMUM = tl.constexpr(-1e29)
LENGTH_SHARES = 128  # programs that look for the longest row
SHIFT_BLOCK = 1024


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    # the interpreter keeps bfloat16 as raw bits and multiplies those: widen there
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


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
                s = _dot(a, tl.trans(b), s, PRECISION, UPCAST)
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


@triton.jit
def _shift_kernel(
    pull_ptr, lse_ptr, out_ptr, count, EXACT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """pull e^-lse as a power of two, whole powers and the rest apart where EXACT."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < count
    pull = tl.load(pull_ptr + offs, mask=mask, other=0.0)
    lse = tl.load(lse_ptr + offs, mask=mask, other=0.0)
    # nothing pulls: a shift that leaves nothing of any logit
    some = pull > 0
    power = tl.log2(tl.where(some, pull, 1.0))
    if EXACT:
        shift = power.to(tl.float64) - lse.to(tl.float64) * LOG2_E
        whole = tl.floor(shift + 0.5)
        tl.store(out_ptr + offs, tl.where(some, whole.to(tl.float32), MASKED), mask=mask)
        rest = (shift - whole).to(tl.float32)
        tl.store(out_ptr + count + offs, tl.where(some, rest, 0.0), mask=mask)
    else:
        tl.store(out_ptr + offs, tl.where(some, power - lse * LOG2_E, MASKED), mask=mask)


@triton.jit
def _info_nce_bwd_kernel(
    a_ptr, b_ptr, scale_ptr, grad_ptr, ids_a_ptr, ids_b_ptr,
    shift_a_ptr, shift_b_ptr, own_ptr, out_ptr, scale_part_ptr,
    rows, columns, offset, own_first,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_IDS: tl.constexpr, WANT_SCALE: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """The gradient of BLOCK_M rows of a; the same kernel serves both sides, roles exchanged.

    shift: of rows and columns, what takes a logit in powers of two to its share of d z; own: of
    pairs, d z of the positive; row 0 of a belongs to pair own_first
    """
    EXACT: tl.constexpr = PRECISION == "tf32x3"
    scale = tl.load(scale_ptr)
    grad = tl.load(grad_ptr)
    scale2 = scale * LOG2_E
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    mask_m = offs_m < rows
    own_n = offs_m + offset  # of a rank's share some texts have theirs elsewhere
    a = _load_part(_tile_pointers(a_ptr, offs_m, rows - 1, offs_d, DIM), 0, offs_d, DIM, BLOCK_D)
    shift_a = tl.load(shift_a_ptr + offs_m, mask=mask_m, other=0.0)
    if EXACT:
        rest_a = tl.load(shift_a_ptr + rows + offs_m, mask=mask_m, other=0.0)
    has_own = mask_m & (own_n >= 0) & (own_n < columns)
    own = tl.load(own_ptr + own_first + offs_m, mask=has_own, other=0.0)
    if HAS_IDS:
        ids_a = tl.load(ids_a_ptr + offs_m, mask=mask_m, other=0)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    scale_sum = tl.zeros([BLOCK_M], tl.float32)
    for first in tl.range(0, columns, BLOCK_N, disable_licm=True):
        offs_n = first + tl.arange(0, BLOCK_N)
        mask_n = offs_n < columns
        b_at = _tile_pointers(b_ptr, offs_n, columns - 1, offs_d, DIM)
        b = _load_part(b_at, 0, offs_d, DIM, BLOCK_D)
        shift_b = tl.load(shift_b_ptr + offs_n, mask=mask_n, other=0.0)
        s = _dot(a, tl.trans(b), tl.zeros([BLOCK_M, BLOCK_N], tl.float32), PRECISION, UPCAST)
        z = s * scale2
        if EXACT:
            rest_b = tl.load(shift_b_ptr + columns + offs_n, mask=mask_n, other=0.0)
            dz = tl.exp2((z + shift_a[:, None]) + rest_a[:, None])
            dz += tl.exp2((z + shift_b[None, :]) + rest_b[None, :])
        else:
            dz = tl.exp2(z + shift_a[:, None]) + tl.exp2(z + shift_b[None, :])
        dz = tl.where(mask_n[None, :], dz, 0.0)
        if HAS_IDS:
            ids_b = tl.load(ids_b_ptr + offs_n, mask=mask_n, other=0)
            dz = tl.where(ids_a[:, None] == ids_b[None, :], 0.0, dz)
        dz = tl.where((own_n[:, None] == offs_n[None, :]) & mask_n[None, :], own[:, None], dz)
        if WANT_SCALE:
            scale_sum += tl.sum(dz * s, 1)
        acc = _dot(dz.to(b.dtype), b, acc, PRECISION, UPCAST)
    tl.store(
        out_ptr + offs_m.to(tl.int64)[:, None] * DIM + offs_d[None, :],
        (acc * (scale * grad)).to(out_ptr.dtype.element_ty),
        mask=mask_m[:, None] & (offs_d < DIM)[None, :],
    )
    if WANT_SCALE:
        scale_sum = tl.where(mask_m, scale_sum, 0.0)
        tl.store(scale_part_ptr + tl.program_id(0), tl.sum(scale_sum, 0) * grad)


def _block_dim(dim: int) -> int:
    return max(16, triton.next_power_of_2(dim))


def forward_tiling(dim: int, size: int) -> dict[str, int]:
    """Tile map of the forward kernel for an element size in bytes."""
    if size == 4:
        return {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 8, "num_stages": 2}
    block_k = min(64, _block_dim(dim))
    return {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": block_k, "num_warps": 8, "num_stages": 3}


def backward_tiling(dim: int, size: int, is_large: bool) -> dict[str, int]:
    """Tile map of the backward kernel; is_large: 227 KiB of shared memory a block (sm_90)."""
    block_d = _block_dim(dim)
    if size == 4:
        rows, columns, stages = 16, 16, 1
    elif block_d <= 128:
        rows, columns, stages = (128, 64, 2) if is_large else (64, 64, 2)
    elif block_d <= 256:
        rows, columns, stages = (128, 64, 2) if is_large else (64, 32, 1)
    else:
        rows, columns, stages = (64, 64, 1) if is_large else (32, 32, 1)
    return {"BLOCK_M": rows, "BLOCK_N": columns, "num_warps": 8, "num_stages": stages}


def _precision(a: Tensor) -> dict[str, object]:
    # float32 operands: three tf32 products, as exact as float32; bfloat16 ignores it
    return {
        "PRECISION": "tf32x3" if a.dtype == torch.float32 else "ieee",
        "UPCAST": is_interpreting(),
    }


def _merge(top: Tensor, total: Tensor) -> Tensor:
    """Log-sum-exp of partial maxima and sums [S, R], added in order; -inf where all are empty."""
    if top.shape[0] == 1:
        return top[0] + total[0].log()
    peak = top.amax(0)
    return peak + (total * torch.exp(top - peak)).sum(0).log()


def info_nce_statistics(
    a: Tensor, b: Tensor, scale: Tensor, ids_a: Tensor | None, ids_b: Tensor | None, offset: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(row log-sum-exp [M], column log-sum-exp [N], both over negatives; positive logit [M]).

    a [M, D], b [N, D] contiguous in one dtype; scale float32 []; row m's positive is column
    offset + m
    """
    rows, dim = a.shape
    columns = b.shape[0]
    tiling = forward_tiling(dim, a.element_size())
    blocks = triton.cdiv(rows, tiling["BLOCK_M"])
    _, processors = chip_facts(a.device)
    # two programs a multiprocessor: row blocks first, then shares of the columns
    programs = min(blocks, 2 * processors)
    tiles = triton.cdiv(columns, tiling["BLOCK_N"])
    splits = max(1, min(2 * processors // programs, tiles))
    split = triton.cdiv(tiles, splits) * tiling["BLOCK_N"]
    splits = triton.cdiv(columns, split)
    row = torch.empty((2, splits, rows), dtype=torch.float32, device=a.device)
    column = torch.empty((2, programs, columns), dtype=torch.float32, device=a.device)
    positive = torch.empty(rows, dtype=torch.float32, device=a.device)
    longest = torch.empty((2, LENGTH_SHARES), dtype=torch.float32, device=a.device)
    block_d = _block_dim(dim)
    _longest_kernel[(LENGTH_SHARES, 2)](
        a, b, longest, rows, columns, DIM=dim, BLOCK_D=block_d, BLOCK_R=max(1, 8192 // block_d)
    )
    _info_nce_fwd_kernel[(programs, splits)](
        a,
        b,
        scale,
        longest,
        scale if ids_a is None else ids_a,
        scale if ids_b is None else ids_b,
        row[0],
        row[1],
        column[0],
        column[1],
        positive,
        rows,
        columns,
        offset,
        split,
        DIM=dim,
        HAS_IDS=ids_a is not None,
        SHARES=LENGTH_SHARES,
        **_precision(a),
        **tiling,
    )
    return _merge(row[0], row[1]), _merge(column[0], column[1]), positive


def shift_of(pull: Tensor, lse: Tensor, is_exact: bool) -> Tensor:
    """pull e^-lse of rows as a power of two, [R] float32, or [2, R]: whole powers and the rest.

    Rounding a shift of a hundred shows in float32 gradients; bfloat16 rows do not resolve it. An
    lse of -inf (no negatives) must come as a finite number
    """
    count = lse.shape[0]
    out = torch.empty((2 if is_exact else 1, count), dtype=torch.float32, device=lse.device)
    grid = (triton.cdiv(count, SHIFT_BLOCK),)
    _shift_kernel[grid](pull, lse, out, count, EXACT=is_exact, BLOCK=SHIFT_BLOCK)
    return out


def info_nce_gradient(
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    grad: Tensor,
    ids: tuple[Tensor, Tensor] | None,
    shifts: tuple[Tensor, Tensor],
    own: Tensor,
    offset: int,
    own_first: int,
    dtype: torch.dtype,
    want_scale: bool,
) -> tuple[Tensor, Tensor]:
    """(d a [M, D] in dtype, d scale [] in float32 or 0).

    shifts: shift_of a's rows and of b's; own: d z of every pair; row m of a is of pair
    own_first + m, and its positive is row m + offset of b, where they are
    """
    rows, dim = a.shape
    limit, _ = chip_facts(a.device)
    tiling = backward_tiling(dim, a.element_size(), limit >= SHARED_MEMORY[9, 0])
    blocks = triton.cdiv(rows, tiling["BLOCK_M"])
    out = torch.empty((rows, dim), dtype=dtype, device=a.device)
    parts = torch.zeros(blocks if want_scale else 1, dtype=torch.float32, device=a.device)
    _info_nce_bwd_kernel[(blocks,)](
        a,
        b,
        scale,
        grad,
        scale if ids is None else ids[0],
        scale if ids is None else ids[1],
        *shifts,
        own,
        out,
        parts,
        rows,
        b.shape[0],
        offset,
        own_first,
        DIM=dim,
        BLOCK_D=_block_dim(dim),
        HAS_IDS=ids is not None,
        WANT_SCALE=want_scale,
        **_precision(a),
        **tiling,
    )
    return out, parts.sum()
