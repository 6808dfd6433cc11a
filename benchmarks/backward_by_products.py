"""The other design of the backward pass: one kernel writes the gradient of every similarity, the
library's matrix products do the rest.

Three products a pair in place of four, at the library's speed; against it stand two bytes written
and four read for every similarity, a workspace, and products that cannot leave padding out (the
host does not know how many rows are real). Attention pooling, one process, to be timed beside the
design that ships: bench_kernels.py, provider "fused_products".
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from benchmarks.providers import wide_product
from mlip.kernels._chip import chip_facts
from mlip.kernels._common_triton_kernels import dot
from mlip.kernels.token_knowledge_patch import triton_kernels
from mlip.kernels.token_knowledge_patch.backward_triton_kernels import (
    ABSENT,
    _log2_weight,
    _similarity_gradient,
)
from mlip.kernels.token_knowledge_patch.forward_triton_kernels import (
    _load_patches,
    _load_rows,
)
from mlip.kernels.token_knowledge_patch.tiling import (
    Problem,
    Tiling,
    block_dim,
    choose_tiling,
)

CHUNK_BYTES = 2**30  # of similarity gradients: the cap of the operator's own workspace


@triton.jit
def _gradient_step(
    q, v, stat, g, h, alpha, alpha_sum, ds_ptr, inside, first,
    P_PAD: tl.constexpr, BLOCK_R: tl.constexpr, SEG: tl.constexpr, WHOLE: tl.constexpr,
    WANT_ALPHA: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    s = dot(q, tl.trans(v), tl.zeros([BLOCK_R, SEG], tl.float32), PRECISION, UPCAST)
    ds = _similarity_gradient(s, tl.exp2(_log2_weight(s, stat, alpha)), g, h, alpha)
    offs_p = first + tl.arange(0, SEG)
    mask = inside[:, None] if WHOLE else inside[:, None] & (offs_p < P_PAD)[None, :]
    tl.store(ds_ptr[:, None] + offs_p[None, :], ds.to(v.dtype), mask=mask)
    if WANT_ALPHA:
        alpha_sum += tl.sum(ds * s, 1)
    return alpha_sum


@triton.jit
def _similarity_gradient_kernel(
    rows_ptr, v_ptr, bias_ptr, alpha_ptr, stat_ptr, g_ptr, h_ptr, ds_ptr, alpha_part_ptr,
    count_ptr, first_row, last_row, stride_rm, stride_ds,
    P_PAD: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
    SEG0: tl.constexpr, SEG1: tl.constexpr, SEG2: tl.constexpr, TILES: tl.constexpr,
    WANT_ALPHA: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """ds of a share of the packed rows first_row .. last_row with one tile of one image's patches
    [rows, M P_PAD]; rows that are not there get zeros. A part of d alpha a program."""
    m = (tl.program_id(0) // TILES).to(tl.int64)
    SPAN: tl.constexpr = SEG0 + SEG1 + SEG2
    WHOLE: tl.constexpr = TILES * SPAN == P_PAD
    first0 = (tl.program_id(0) % TILES) * SPAN
    first1 = first0 + SEG0
    first2 = first1 + SEG1
    count = tl.load(count_ptr)
    alpha = tl.load(alpha_ptr)
    v0, _ = _load_patches(v_ptr, bias_ptr, first0, m, P_PAD, DIM, BLOCK_D, SEG0, WHOLE)
    if SEG1 > 0:
        v1, _ = _load_patches(v_ptr, bias_ptr, first1, m, P_PAD, DIM, BLOCK_D, SEG1, WHOLE)
    if SEG2 > 0:
        v2, _ = _load_patches(v_ptr, bias_ptr, first2, m, P_PAD, DIM, BLOCK_D, SEG2, WHOLE)
    alpha_sum = tl.zeros([BLOCK_R], tl.float32)
    tiles = tl.cdiv(last_row - first_row, BLOCK_R)
    for tile in tl.range(tl.program_id(1), tiles, tl.num_programs(1), disable_licm=True):
        offs_r = first_row + tile * BLOCK_R + tl.arange(0, BLOCK_R)
        inside = offs_r < last_row
        real = inside & (offs_r < count)
        q = _load_rows(rows_ptr, first_row + tile * BLOCK_R, DIM, BLOCK_D, BLOCK_R)
        place = m * stride_rm + offs_r
        stat = tl.load(stat_ptr + place, mask=real, other=ABSENT)
        g = tl.load(g_ptr + place, mask=real, other=0.0)
        h = tl.load(h_ptr + place, mask=real, other=0.0)
        if WANT_ALPHA:
            # ds = g a (1 + alpha (s - r)): the sum of ds s over patches is h + alpha d alpha
            alpha_sum -= tl.where(first0 == 0, h, 0.0)
        at = ds_ptr + (offs_r - first_row).to(tl.int64) * stride_ds + m * P_PAD
        alpha_sum = _gradient_step(
            q, v0, stat, g, h, alpha, alpha_sum, at, inside, first0,
            P_PAD, BLOCK_R, SEG0, WHOLE, WANT_ALPHA, PRECISION, UPCAST,
        )  # fmt: skip
        if SEG1 > 0:
            alpha_sum = _gradient_step(
                q, v1, stat, g, h, alpha, alpha_sum, at, inside, first1,
                P_PAD, BLOCK_R, SEG1, WHOLE, WANT_ALPHA, PRECISION, UPCAST,
            )  # fmt: skip
        if SEG2 > 0:
            alpha_sum = _gradient_step(
                q, v2, stat, g, h, alpha, alpha_sum, at, inside, first2,
                P_PAD, BLOCK_R, SEG2, WHOLE, WANT_ALPHA, PRECISION, UPCAST,
            )  # fmt: skip
    if WANT_ALPHA:
        part = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
        tl.store(alpha_part_ptr + part, tl.sum(alpha_sum, 0) / alpha)


def tile_map(patches: int, dim: int, size: int, limit: int) -> Tiling:
    """Patches on chip, as in the forward pass where all of an image fit."""
    tiling = choose_tiling("forward", patches, block_dim(dim), size, limit)
    if tiling.tiles == 1:
        return tiling
    return choose_tiling("backward_patches", patches, block_dim(dim), size, limit)


def pair_scores_bwd(
    p: Problem,
    tensors: dict[str, Tensor],
    valid: Tensor | None,
    scores: Tensor,
    grad: Tensor,
    kept: tuple[Tensor, Tensor],
    want_alpha: bool,
    take_rows: Callable[[Tensor, int, int], None] | None = None,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor, Tensor]:
    """triton_kernels.pair_scores_bwd by this design, for attention scales from 1 to 40 (above, a
    weight on padding may overflow).

    Raises:  ValueError for another pooling, or where the forward pass kept no statistics
    """
    r, stat = kept
    if p.pooling != "attention" or r.numel() == 0:
        raise ValueError(
            "expected attention pooling and kept statistics (a smaller batch), got "
            f"{p.pooling} pooling of {p.texts} texts"
        )
    total, device = p.texts * p.rows_a_text, r.device
    wide: Any = {"dtype": torch.float32, "device": device}
    g, h, d_weight = torch.empty_like(r), torch.empty_like(r), torch.zeros(total, **wide)
    d_gamma = triton_kernels.aggregate_bwd(
        p, tensors, valid, scores, grad, r, (g, h, d_weight), 0, p.texts
    )
    count, v = tensors["bounds"][-1:], tensors["v"]
    numbers = torch.arange(tensors["rows"].shape[0], device=device)
    # behind the packed rows lies whatever was in memory
    rows = tensors["rows"].masked_fill((numbers >= count)[:, None], 0.0)

    limit, processors = chip_facts(device)
    tiling = tile_map(p.patches, p.dim, p.size, limit)
    columns = p.images * p.padded
    step = max(1, CHUNK_BYTES // (p.size * columns) // tiling.block_r) * tiling.block_r
    out = torch.empty((min(step, total), columns), dtype=v.dtype, device=device)
    flat_v, d_packed = v.reshape(columns, p.dim), torch.empty((total, p.dim), **wide)
    d_v, d_alpha = torch.zeros((columns, p.dim), **wide), torch.zeros((), **wide)
    programs = p.images * tiling.tiles
    for first in range(0, total, step):
        last = min(first + step, total)
        shares = triton.cdiv(4 * processors, programs)
        shares = min(shares, triton.cdiv(last - first, tiling.block_r))
        parts = torch.empty(programs * shares, **wide)
        _similarity_gradient_kernel[(programs, shares)](
            rows, v, tensors["bias"], tensors["alpha"], stat, g, h, out, parts, count,
            first, last, r.stride(0), out.stride(0), WANT_ALPHA=want_alpha,
            **triton_kernels.pair_keywords(p), **tiling.keywords(),
        )  # fmt: skip
        ds = out[: last - first]
        d_packed[first:last] = wide_product(ds, flat_v)
        d_v += wide_product(ds.T, rows[first:last])
        if want_alpha:
            d_alpha += parts.sum()
    # back to the places the rows came from; those that are not there share one that is dropped
    place = torch.where(numbers[:total] < count, tensors["index"], total).long()
    d_rows = torch.zeros((total + 1, p.dim), **wide).index_copy_(0, place, d_packed)[:total]
    d_v = d_v.view(v.shape)
    if take_rows is None:
        return d_rows, d_weight, d_v, d_alpha, d_gamma
    take_rows(d_rows, 0, p.texts)
    return None, d_weight, d_v, d_alpha, d_gamma


@contextlib.contextmanager
def in_place() -> Iterator[None]:
    """The operator's backward pass is this design's, for everything inside."""
    plain = triton_kernels.pair_scores_bwd
    triton_kernels.pair_scores_bwd = pair_scores_bwd
    try:
        yield
    finally:
        triton_kernels.pair_scores_bwd = plain
