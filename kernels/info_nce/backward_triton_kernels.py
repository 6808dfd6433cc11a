"""Backward Triton kernels of symmetric InfoNCE.

Of bfloat16 rows one kernel writes the gradient of every cosine, for library products to multiply;
of float32 rows one pass a side makes the logits again and multiplies on chip.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mlip.kernels._dot_triton_kernels import dot
from mlip.kernels.info_nce.forward_triton_kernels import (
    LOG2_E,
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
def _halves(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The left and the right half of a tile, which stay in the registers they are in."""
    return tl.split(tl.permute(tl.reshape(x, [ROWS, 2, COLUMNS // 2]), [0, 2, 1]))


@triton.jit
def _write_ds(
    s, total, scale, middle, factor, ids_a, shift_a, own_n, mask_m, ids_b_ptr, shift_b_ptr,
    own_at, ds_at, offs_n, columns, stride_ds, is_edge, HAS_IDS: tl.constexpr,
    WANT_SCALE: tl.constexpr,
):  # fmt: skip
    """Write ds of a piece of a tile of cosines; returns total [BLOCK_M, 1] + d z (s - middle)."""
    mask_n = offs_n < columns
    shift_b = tl.load(shift_b_ptr + offs_n, mask=mask_n, other=MASKED)
    z = s * (scale * LOG2_E)
    dz = tl.exp2(z + shift_a[:, None]) + tl.exp2(z + shift_b[None, :])
    if HAS_IDS:
        ids_b = tl.load(ids_b_ptr + offs_n, mask=mask_n, other=0)
        dz = tl.where(ids_a[:, None] == ids_b[None, :], 0.0, dz)
    if is_edge:
        own = tl.load(own_at, mask=mask_m, other=0.0)
        dz = tl.where(own_n[:, None] == offs_n[None, :], own[:, None], dz)
        dz = tl.where(mask_m[:, None] & mask_n[None, :], dz, 0.0)
    # up to the stride, a multiple of DS_ALIGN: whole words, whatever the number of columns
    mask = mask_m[:, None] & (offs_n < stride_ds)[None, :]
    ds = (dz * factor).to(ds_at.dtype.element_ty)
    tl.store(ds_at[:, None] + offs_n[None, :], ds, mask=mask)
    if WANT_SCALE:
        total += tl.sum(dz * (s - middle), 1, keep_dims=True)
    return total


@triton.jit
def _info_nce_ds_kernel(
    a_ptr, b_ptr, scale_ptr, middle_ptr, grad_ptr, ids_a_ptr, ids_b_ptr,
    shift_a_ptr, shift_b_ptr, own_ptr, ds_ptr, scale_part_ptr,
    rows, columns, offset, stride_ds,
    DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr, HAS_IDS: tl.constexpr, WANT_SCALE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """ds [rows, stride_ds]: d loss / d cosine, a tile a program, 0 past the columns.

    shift: of rows and columns, what takes a logit in powers of two to its share of d z; own: d z
    of the rows' positives, which are the columns offset + m; middle: _contrastive.center
    """
    # GROUP row tiles go down the columns side by side: what they read stays in L2
    per_group = GROUP * tl.cdiv(columns, BLOCK_N)
    first_block = tl.program_id(0) // per_group * GROUP
    height = tl.minimum(tl.cdiv(rows, BLOCK_M) - first_block, GROUP)
    within = tl.program_id(0) % per_group
    first_m = (first_block + within % height) * BLOCK_M
    first_n = within // height * BLOCK_N
    offs_m = first_m + tl.arange(0, BLOCK_M)
    offs_n = first_n + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    a_at = _tile_pointers(a_ptr, offs_m, rows - 1, offs_k, DIM)
    b_at = _tile_pointers(b_ptr, offs_n, columns - 1, offs_k, DIM)
    s = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, DIM, BLOCK_K):
        a = _load_part(a_at, k, offs_k, DIM, BLOCK_K)
        b = _load_part(b_at, k, offs_k, DIM, BLOCK_K)
        s = dot(a, tl.trans(b), s, "ieee", UPCAST)
    scale = tl.load(scale_ptr)
    grad = tl.load(grad_ptr)
    middle = tl.load(middle_ptr)
    mask_m = offs_m < rows
    shift_a = tl.load(shift_a_ptr + offs_m, mask=mask_m, other=MASKED)
    ids_a = offs_m
    if HAS_IDS:
        ids_a = tl.load(ids_a_ptr + offs_m, mask=mask_m, other=0)
    has_own = (first_m + offset < first_n + BLOCK_N) & (first_m + offset + BLOCK_M > first_n)
    # of a tile without a positive and without an end every logit counts
    is_edge = has_own | (first_m + BLOCK_M > rows) | (first_n + BLOCK_N > columns)
    ds_at = ds_ptr + offs_m.to(tl.int64) * stride_ds
    # in pieces, one after another: gradients of a whole tile beside its cosines are too many for
    # 128 registers
    PIECE: tl.constexpr = BLOCK_N // 4
    left, right = _halves(s, BLOCK_M, BLOCK_N)
    pieces = _halves(left, BLOCK_M, BLOCK_N // 2) + _halves(right, BLOCK_M, BLOCK_N // 2)
    # a column: of a row's sums Triton 3.6 makes no total on chips with tensor memory (sm_100)
    total = tl.zeros([BLOCK_M, 1], tl.float32)
    for piece in tl.static_range(4):
        offs_n = first_n + piece * PIECE + tl.arange(0, PIECE)
        total = _write_ds(
            pieces[piece], total, scale, middle, scale * grad, ids_a, shift_a, offs_m + offset,
            mask_m, ids_b_ptr, shift_b_ptr, own_ptr + offs_m, ds_at, offs_n, columns, stride_ds,
            is_edge, HAS_IDS, WANT_SCALE,
        )  # fmt: skip
    if WANT_SCALE:
        tl.store(scale_part_ptr + tl.program_id(0), tl.sum(total) * grad)


@triton.jit
def _info_nce_bwd_kernel(
    a_ptr, b_ptr, scale_ptr, middle_ptr, grad_ptr, ids_a_ptr, ids_b_ptr,
    shift_a_ptr, shift_b_ptr, own_ptr, out_ptr, scale_part_ptr,
    rows, columns, offset, own_first,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_IDS: tl.constexpr, WANT_SCALE: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """The gradient of BLOCK_M float32 rows of a; serves both sides, roles exchanged.

    shift: of rows and columns, what takes a logit in powers of two to its share of d z; own: of
    pairs, d z of the positive; row 0 of a belongs to pair own_first
    """
    scale = tl.load(scale_ptr)
    grad = tl.load(grad_ptr)
    middle = tl.load(middle_ptr)
    scale2 = scale * LOG2_E
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    mask_m = offs_m < rows
    own_n = offs_m + offset  # of a rank's share some texts have theirs elsewhere
    a = _load_part(_tile_pointers(a_ptr, offs_m, rows - 1, offs_d, DIM), 0, offs_d, DIM, BLOCK_D)
    shift_a = tl.load(shift_a_ptr + offs_m, mask=mask_m, other=0.0)
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
        rest_b = tl.load(shift_b_ptr + columns + offs_n, mask=mask_n, other=0.0)
        s = dot(a, tl.trans(b), tl.zeros([BLOCK_M, BLOCK_N], tl.float32), PRECISION, UPCAST)
        z = s * scale2
        dz = tl.exp2((z + shift_a[:, None]) + rest_a[:, None])
        dz += tl.exp2((z + shift_b[None, :]) + rest_b[None, :])
        if HAS_IDS:
            ids_b = tl.load(ids_b_ptr + offs_n, mask=mask_n, other=0)
            dz = tl.where(ids_a[:, None] == ids_b[None, :], 0.0, dz)
        dz = tl.where(own_n[:, None] == offs_n[None, :], own[:, None], dz)
        dz = tl.where(mask_n[None, :], dz, 0.0)
        if WANT_SCALE:
            scale_sum += tl.sum(dz * (s - middle), 1)
        acc = dot(dz, b, acc, PRECISION, UPCAST)
    tl.store(
        out_ptr + offs_m.to(tl.int64)[:, None] * DIM + offs_d[None, :],
        acc * (scale * grad),
        mask=mask_m[:, None] & (offs_d < DIM)[None, :],
    )
    if WANT_SCALE:
        scale_sum = tl.where(mask_m, scale_sum, 0.0)
        tl.store(scale_part_ptr + tl.program_id(0), tl.sum(scale_sum, 0) * grad)
