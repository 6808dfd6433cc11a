"""Launchers of the InfoNCE kernels: tensors in, tensors out; nothing is read on the host."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from mlip.kernels._chip import SHARED_MEMORY, chip_facts
from mlip.kernels._dispatch import is_interpreting
from mlip.kernels.info_nce.backward_triton_kernels import _info_nce_bwd_kernel, _shift_kernel
from mlip.kernels.info_nce.forward_triton_kernels import _info_nce_fwd_kernel, _longest_kernel

LENGTH_SHARES = 128  # programs that look for the longest row
SHIFT_BLOCK = 1024


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
