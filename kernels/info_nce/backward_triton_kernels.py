"""Backward Triton kernels of symmetric InfoNCE: one pass a side, logits made again."""

from __future__ import annotations

import triton
import triton.language as tl

from mlip.kernels._common_triton_kernels import LOG2_E, dot
from mlip.kernels.info_nce.forward_triton_kernels import (
    MASKED,
    _load_part,
    _tile_pointers,
)


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
        s = dot(a, tl.trans(b), tl.zeros([BLOCK_M, BLOCK_N], tl.float32), PRECISION, UPCAST)
        z = s * scale2
        if EXACT:
            rest_b = tl.load(shift_b_ptr + columns + offs_n, mask=mask_n, other=0.0)
            dz = tl.exp2((z + shift_a[:, None]) + rest_a[:, None])
            dz += tl.exp2((z + shift_b[None, :]) + rest_b[None, :])
        else:
            dz = tl.exp2(z + shift_a[:, None]) + tl.exp2(z + shift_b[None, :])
        if HAS_IDS:
            ids_b = tl.load(ids_b_ptr + offs_n, mask=mask_n, other=0)
            dz = tl.where(ids_a[:, None] == ids_b[None, :], 0.0, dz)
        dz = tl.where(own_n[:, None] == offs_n[None, :], own[:, None], dz)
        dz = tl.where(mask_n[None, :], dz, 0.0)
        if WANT_SCALE:
            scale_sum += tl.sum(dz * s, 1)
        acc = dot(dz.to(b.dtype), b, acc, PRECISION, UPCAST)
    tl.store(
        out_ptr + offs_m.to(tl.int64)[:, None] * DIM + offs_d[None, :],
        (acc * (scale * grad)).to(out_ptr.dtype.element_ty),
        mask=mask_m[:, None] & (offs_d < DIM)[None, :],
    )
    if WANT_SCALE:
        scale_sum = tl.where(mask_m, scale_sum, 0.0)
        tl.store(scale_part_ptr + tl.program_id(0), tl.sum(scale_sum, 0) * grad)
