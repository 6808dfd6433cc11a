"""Backward Triton kernels of max pooling: r is the similarity of the one patch that `where` names.

The gradient of a row gathers that patch from every image, D additions where a product with a
one-hot matrix would take P times as many. That of a patch adds the rows that chose it: rows stream
past in order and a one-hot product on the tensor cores adds them. No atomics (README, tile maps).
"""

from __future__ import annotations

import triton
import triton.language as tl

from mlip.kernels._dot_triton_kernels import dot
from mlip.kernels.token_knowledge_patch.backward_triton_kernels import _store_patches
from mlip.kernels.token_knowledge_patch.forward_triton_kernels import _load_rows


@triton.jit(do_not_specialize=["row_base"])
def _max_bwd_rows_kernel(
    index_ptr, bounds_ptr, v_ptr, where_ptr, g_ptr, rows_grad_ptr,
    first_text, last_text, row_base, images, stride_rm, stride_part,
    P_PAD: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """d rows of BLOCK_R rows over a share of the images. Row `row_base` is the buffer's first."""
    start = tl.load(bounds_ptr + first_text)
    count = tl.load(bounds_ptr + last_text) - start
    if tl.program_id(0) * BLOCK_R >= count:
        return
    offs_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_d = tl.arange(0, BLOCK_D)
    mask_r = offs_r < count
    in_d = (offs_d < DIM)[None, :]
    share = tl.cdiv(images, tl.num_programs(1))
    begin = tl.program_id(1) * share
    acc = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for image in range(begin, tl.minimum(begin + share, images)):
        m = tl.full([], 0, tl.int64) + image
        place = m * stride_rm + offs_r
        where = tl.load(where_ptr + place, mask=mask_r, other=0)
        g = tl.load(g_ptr + place, mask=mask_r, other=0.0)
        chosen = tl.load(
            v_ptr + m * (P_PAD * DIM) + where[:, None] * DIM + offs_d[None, :],
            mask=in_d,
            other=0.0,
        )
        acc += g[:, None] * chosen.to(tl.float32)
    # the buffer of a chunk begins at its first text
    index = tl.load(index_ptr + start + offs_r, mask=mask_r, other=0).to(tl.int64) - row_base
    out = rows_grad_ptr + tl.program_id(1).to(tl.int64) * stride_part
    tl.store(out + index[:, None] * DIM + offs_d[None, :], acc, mask=mask_r[:, None] & in_d)


@triton.jit
def _numbered(first, dtype, SEG: tl.constexpr):
    """[16, SEG]: what a row's two digits are multiplied with to subtract a patch's number."""
    part = tl.arange(0, 16)[:, None]
    patch = (first + tl.arange(0, SEG))[None, :]
    made = tl.where(part == 0, 256, tl.where(part == 1, 1, 0))
    made = tl.where(part == 2, -(patch - patch % 256), tl.where(part == 3, -(patch % 256), made))
    return made.to(tl.float32).to(dtype)


@triton.jit
def _patches_step(
    q, chooser, numbers, g, acc,
    BLOCK_R: tl.constexpr, SEG: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    # where - patch by a product of depth 16, exact in bfloat16 (digits below 256 and multiples of
    # 256, up to MAX_PATCHES): it leaves the comparison where the next product wants its operand
    gap = tl.zeros([BLOCK_R, SEG], tl.float32)
    gap = dot(chooser, numbers, gap, PRECISION, UPCAST)
    ds = tl.where(gap == 0, g[:, None], 0.0)
    return dot(tl.trans(q), ds.to(q.dtype), acc, PRECISION, UPCAST)


@triton.jit
def _max_bwd_patches_kernel(
    rows_ptr, bounds_ptr, where_ptr, g_ptr, patch_grad_ptr,
    first_text, last_text, stride_rm, stride_part,
    P_PAD: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
    SEG0: tl.constexpr, TILES: tl.constexpr, ACCUMULATE: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """d patches of one tile of one image over a share of the rows, which stream past in order."""
    m = (tl.program_id(0) // TILES).to(tl.int64)
    first = (tl.program_id(0) % TILES) * SEG0
    start = tl.load(bounds_ptr + first_text)
    count = tl.load(bounds_ptr + last_text) - start
    dtype = rows_ptr.dtype.element_ty
    numbers = _numbered(first, dtype, SEG0)
    acc = tl.zeros([BLOCK_D, SEG0], tl.float32)
    part = tl.arange(0, 16)[None, :]
    tiles = tl.cdiv(count, BLOCK_R)
    share = tl.cdiv(tiles, tl.num_programs(1))
    begin = tl.program_id(1) * share
    for tile in tl.range(begin, tl.minimum(begin + share, tiles), disable_licm=True):
        offs_r = tile * BLOCK_R + tl.arange(0, BLOCK_R)
        mask_r = offs_r < count
        q = _load_rows(rows_ptr, start + tile * BLOCK_R, DIM, BLOCK_D, BLOCK_R)
        place = m * stride_rm + offs_r
        where = tl.load(where_ptr + place, mask=mask_r, other=0)
        g = tl.load(g_ptr + place, mask=mask_r, other=0.0)
        made = tl.where(part < 4, 1, 0)
        made = tl.where(part == 0, where[:, None] // 256, made)
        made = tl.where(part == 1, where[:, None] % 256, made)
        chooser = made.to(tl.float32).to(dtype)
        acc = _patches_step(q, chooser, numbers, g, acc, BLOCK_R, SEG0, PRECISION, UPCAST)
    out = patch_grad_ptr + tl.program_id(1).to(tl.int64) * stride_part
    _store_patches(out, acc, first, m, P_PAD, DIM, BLOCK_D, SEG0, ACCUMULATE)
