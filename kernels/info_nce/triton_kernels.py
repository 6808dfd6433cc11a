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
MASKED = tl.constexpr(-1e30)
NO_MAXIMUM = tl.constexpr(-1e29)
MAX_DIM = 512  # of the backward kernel, which holds a row tile of D accumulators


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    # the interpreter keeps bfloat16 as raw bits and multiplies those: widen there
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _load_tile(ptr, offs_r, mask_r, offs_d, DIM: tl.constexpr):
    return tl.load(
        ptr + offs_r[:, None] * DIM + offs_d[None, :],
        mask=mask_r[:, None] & (offs_d < DIM)[None, :],
        other=0.0,
    )


@triton.jit
def _info_nce_fwd_kernel(
    a_ptr, b_ptr, scale_ptr, ids_a_ptr, ids_b_ptr,
    row_max_ptr, row_sum_ptr, column_max_ptr, column_sum_ptr, positive_ptr,
    rows, columns, offset, split,
    DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    HAS_IDS: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Running maxima and sums over negatives, of rows within a share of the columns, and of columns
    within this program's row blocks; every positive logit."""
    scale = tl.load(scale_ptr)
    row_out = tl.program_id(1).to(tl.int64) * rows
    column_out = tl.program_id(0).to(tl.int64) * columns
    begin = tl.program_id(1) * split
    end = tl.minimum(begin + split, columns)
    for block in range(tl.program_id(0), tl.cdiv(rows, BLOCK_M), tl.num_programs(0)):
        offs_m = (block * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
        mask_m = offs_m < rows
        top = tl.full([BLOCK_M], NO_MAXIMUM, tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        if HAS_IDS:
            ids_a = tl.load(ids_a_ptr + offs_m, mask=mask_m, other=0)
        for first in range(begin, end, BLOCK_N):
            offs_n = (first + tl.arange(0, BLOCK_N)).to(tl.int64)
            mask_n = offs_n < end
            z = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            for k in range(0, DIM, BLOCK_K):
                offs_k = k + tl.arange(0, BLOCK_K)
                a = _load_tile(a_ptr, offs_m, mask_m, offs_k, DIM)
                b = _load_tile(b_ptr, offs_n, mask_n, offs_k, DIM)
                z = _dot(a, tl.trans(b), z, PRECISION, UPCAST)
            z = z * scale
            own = (offs_m + offset)[:, None] == offs_n[None, :]
            here = (offs_m + offset >= first) & (offs_m + offset < first + BLOCK_N)
            positive = tl.sum(tl.where(own, z, 0.0), 1)
            tl.store(positive_ptr + offs_m, positive, mask=mask_m & here)
            drop = own | ~(mask_m[:, None] & mask_n[None, :])
            if HAS_IDS:
                ids_b = tl.load(ids_b_ptr + offs_n, mask=mask_n, other=0)
                drop = drop | (ids_a[:, None] == ids_b[None, :])
            z = tl.where(drop, MASKED, z)
            new = tl.maximum(top, tl.max(z, 1))
            total = total * tl.exp(top - new) + tl.sum(tl.exp(z - new[:, None]), 1)
            top = new
            # this program alone owns its row of the column statistics, block after block
            peak = tl.maximum(tl.max(z, 0), NO_MAXIMUM)
            mass = tl.sum(tl.exp(z - peak[None, :]), 0)
            if block >= tl.num_programs(0):
                old = tl.load(column_max_ptr + column_out + offs_n, mask=mask_n, other=NO_MAXIMUM)
                held = tl.load(column_sum_ptr + column_out + offs_n, mask=mask_n, other=0.0)
                higher = tl.maximum(old, peak)
                mass = mass * tl.exp(peak - higher) + held * tl.exp(old - higher)
                peak = higher
            tl.store(column_max_ptr + column_out + offs_n, peak, mask=mask_n)
            tl.store(column_sum_ptr + column_out + offs_n, mass, mask=mask_n)
        tl.store(row_max_ptr + row_out + offs_m, top, mask=mask_m)
        tl.store(row_sum_ptr + row_out + offs_m, total, mask=mask_m)


@triton.jit
def _info_nce_bwd_kernel(
    a_ptr, b_ptr, scale_ptr, grad_ptr, ids_a_ptr, ids_b_ptr,
    lse_a_ptr, lse_b_ptr, pull_a_ptr, pull_b_ptr, out_ptr, scale_part_ptr,
    rows, columns, offset,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_IDS: tl.constexpr, WANT_SCALE: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """The gradient of BLOCK_M rows of a; the same kernel serves both sides, roles exchanged."""
    scale = tl.load(scale_ptr)
    offs_m = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    mask_m = offs_m < rows
    a = _load_tile(a_ptr, offs_m, mask_m, offs_d, DIM)
    lse_a = tl.load(lse_a_ptr + offs_m, mask=mask_m, other=0.0)
    pull_a = tl.load(pull_a_ptr + offs_m, mask=mask_m, other=0.0)
    if HAS_IDS:
        ids_a = tl.load(ids_a_ptr + offs_m, mask=mask_m, other=0)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    scale_sum = tl.zeros([BLOCK_M], tl.float32)
    for first in range(0, columns, BLOCK_N):
        offs_n = (first + tl.arange(0, BLOCK_N)).to(tl.int64)
        mask_n = offs_n < columns
        b = _load_tile(b_ptr, offs_n, mask_n, offs_d, DIM)
        lse_b = tl.load(lse_b_ptr + offs_n, mask=mask_n, other=0.0)
        pull_b = tl.load(pull_b_ptr + offs_n, mask=mask_n, other=0.0)
        s = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        s = _dot(a, tl.trans(b), s, PRECISION, UPCAST)
        z = s * scale
        own = (offs_m + offset)[:, None] == offs_n[None, :]
        drop = ~(mask_m[:, None] & mask_n[None, :])
        if HAS_IDS:
            ids_b = tl.load(ids_b_ptr + offs_n, mask=mask_n, other=0)
            drop = drop | (ids_a[:, None] == ids_b[None, :])
        dz = pull_a[:, None] * tl.exp(z - lse_a[:, None])
        dz += pull_b[None, :] * tl.exp(z - lse_b[None, :])
        dz = tl.where(drop, 0.0, dz)
        dz = tl.where(own, -(pull_a[:, None] + pull_b[None, :]), dz)
        if WANT_SCALE:
            scale_sum += tl.sum(dz * s, 1)
        acc = _dot(dz.to(b.dtype), b, acc, PRECISION, UPCAST)
    grad = tl.load(grad_ptr)
    tl.store(
        out_ptr + offs_m[:, None] * DIM + offs_d[None, :],
        (acc * (scale * grad)).to(out_ptr.dtype.element_ty),
        mask=mask_m[:, None] & (offs_d < DIM)[None, :],
    )
    if WANT_SCALE:
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
        rows, columns, stages = (128, 64, 1) if is_large else (64, 32, 1)
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
    _info_nce_fwd_kernel[(programs, splits)](
        a,
        b,
        scale,
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
        **_precision(a),
        **tiling,
    )
    return _merge(row[0], row[1]), _merge(column[0], column[1]), positive


def info_nce_gradient(
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    grad: Tensor,
    ids: tuple[Tensor, Tensor] | None,
    lse: tuple[Tensor, Tensor],
    pulls: tuple[Tensor, Tensor],
    offset: int,
    dtype: torch.dtype,
    want_scale: bool,
) -> tuple[Tensor, Tensor]:
    """(d a [M, D] in dtype, d scale [] in float32 or 0).

    lse, pulls: of a's rows and of b's; an lse of -inf (no negatives) must come as a finite number
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
        *lse,
        *pulls,
        out,
        parts,
        rows,
        b.shape[0],
        offset,
        DIM=dim,
        BLOCK_D=_block_dim(dim),
        HAS_IDS=ids is not None,
        WANT_SCALE=want_scale,
        **_precision(a),
        **tiling,
    )
    return out, parts.sum()
