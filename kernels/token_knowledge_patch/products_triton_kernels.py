"""Backward pass of attention pooling by library products, for bfloat16 rows of D above 128: the
gradient of every similarity is written once, and two matrix products read it.

Similarities are made once more and not twice, as a pass over rows and one over patches would; at
D = 256 those keep too few operands on chip to be fast, and at 128 they win (README, tile maps).
What is written is a block of rows at a time: the buffer's bound is `tiling.gradient_rows`. Every
output has one owner that adds in a fixed order: no atomics. Formulas: derivation 2 of the README.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mlip.kernels._chip import Chip
from mlip.kernels._dispatch import is_interpreting
from mlip.kernels._dot_triton_kernels import dot
from mlip.kernels._products import wide_product
from mlip.kernels.token_knowledge_patch.backward_triton_kernels import (
    ABSENT,
    PLAIN_LEAST,
    PLAIN_MOST,
    _bounded_gradient,
    _pull,
)
from mlip.kernels.token_knowledge_patch.forward_triton_kernels import _load_patches, _load_rows
from mlip.kernels.token_knowledge_patch.tiling import (
    Problem,
    block_dim,
    choose_tiling,
    gradient_rows,
)


@triton.jit
def _block(bounds_ptr, first_text, last_text, first_row, most_rows):
    """First packed row of a block of a chunk's rows, and how many of them are real."""
    start = tl.load(bounds_ptr + first_text)
    count = tl.load(bounds_ptr + last_text) - start - first_row
    return start + first_row, tl.minimum(count, most_rows)


@triton.jit
def _pull_kernel(
    r_ptr, weight_ptr, index_ptr, text_ptr, bounds_ptr, valid_ptr, gamma_ptr, score_ptr, grad_ptr,
    g_ptr, first_text, last_text, first_row, most_rows, images, stride_rm, stride_sm,
    stride_gm, HAS_VALID: tl.constexpr, LSE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """g = dS dS/dr of a block of rows [M, most_rows]."""
    begin, count = _block(bounds_ptr, first_text, last_text, first_row, most_rows)
    offs_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_r = offs_r < count
    index = tl.load(index_ptr + begin + offs_r, mask=mask_r, other=0)
    text = tl.load(text_ptr + begin + offs_r, mask=mask_r, other=0)
    weight = tl.load(weight_ptr + index, mask=mask_r, other=0.0)
    offs_m = (tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    mask = (offs_m < images)[:, None] & mask_r[None, :]
    at = offs_m[:, None] * stride_rm + (first_row + offs_r)[None, :]
    r = tl.load(r_ptr + at, mask=mask, other=0.0)
    _, g = _pull(
        r, weight, tl.load(gamma_ptr), valid_ptr, score_ptr, grad_ptr, offs_m, offs_m < images,
        text, mask, stride_sm, HAS_VALID, LSE,
    )  # fmt: skip
    place = offs_m[:, None] * stride_gm + offs_r[None, :]
    tl.store(g_ptr + place, g, mask=mask)


@triton.jit
def _similarity_step(
    q, vt, bias, r, stat, g, alpha, alpha_sum, at, mask,
    BLOCK_R: tl.constexpr, SEG: tl.constexpr, WANT_ALPHA: tl.constexpr, PLAIN: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """ds [BLOCK_R, SEG] to `at`; returns alpha_sum and its part of d alpha."""
    s = dot(q, vt, tl.zeros([BLOCK_R, SEG], tl.float32), PRECISION, UPCAST)
    ds, alpha_sum = _bounded_gradient(s, bias, r, stat, g, alpha, alpha_sum, WANT_ALPHA, PLAIN)
    tl.store(at, ds.to(at.dtype.element_ty), mask=mask)
    return alpha_sum


@triton.jit
def _similarity_tiles(
    rows_ptr, v_ptr, bias_ptr, r_ptr, stat_ptr, g_ptr, ds_ptr, alpha_part_ptr, alpha,
    begin, count, first_row, stride_rm, stride_gm, stride_ds,
    P_PAD: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
    SEG0: tl.constexpr, TILES: tl.constexpr, WANT_ALPHA: tl.constexpr, PLAIN: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Every row tile of this program's share, under patches that stay on chip."""
    m = (tl.program_id(0) // TILES).to(tl.int64)
    first = (tl.program_id(0) % TILES) * SEG0
    WHOLE: tl.constexpr = TILES * SEG0 == P_PAD
    v, bias = _load_patches(v_ptr, bias_ptr, first, m, P_PAD, DIM, BLOCK_D, SEG0, WHOLE)
    vt = tl.trans(v)  # outside the loop, see _pool_rows
    offs_p = first + tl.arange(0, SEG0)
    alpha_sum = tl.zeros([BLOCK_R], tl.float32)
    for tile in tl.range(
        tl.program_id(1), tl.cdiv(count, BLOCK_R), tl.num_programs(1), disable_licm=True
    ):
        offs_r = tile * BLOCK_R + tl.arange(0, BLOCK_R)
        mask_r = offs_r < count
        q = _load_rows(rows_ptr, begin + tile * BLOCK_R, DIM, BLOCK_D, BLOCK_R)
        r = tl.load(r_ptr + m * stride_rm + first_row + offs_r, mask=mask_r, other=0.0)
        stat = tl.load(stat_ptr + m * stride_rm + first_row + offs_r, mask=mask_r, other=ABSENT)
        g = tl.load(g_ptr + m * stride_gm + offs_r, mask=mask_r, other=0.0)
        if PLAIN and WANT_ALPHA:
            alpha_sum -= tl.where(first == 0, g * r, 0.0)
        at = (ds_ptr + offs_r.to(tl.int64) * stride_ds + m * P_PAD)[:, None] + offs_p[None, :]
        mask = mask_r[:, None]
        alpha_sum = _similarity_step(
            q, vt, bias, r, stat, g, alpha, alpha_sum, at,
            mask if WHOLE else mask & (offs_p < P_PAD)[None, :],
            BLOCK_R, SEG0, WANT_ALPHA, PLAIN, PRECISION, UPCAST,
        )  # fmt: skip
    if WANT_ALPHA:
        if PLAIN:
            # ds = g a (1 + alpha (s - r)) makes the sum of ds s over patches g r + alpha d alpha
            alpha_sum /= alpha
        part = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
        tl.store(alpha_part_ptr + part, tl.sum(alpha_sum, 0))


@triton.jit
def _similarity_gradient_kernel(
    rows_ptr, bounds_ptr, v_ptr, bias_ptr, alpha_ptr, r_ptr, stat_ptr, g_ptr, ds_ptr,
    alpha_part_ptr, first_text, last_text, first_row, most_rows, stride_rm, stride_gm, stride_ds,
    P_PAD: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
    SEG0: tl.constexpr, TILES: tl.constexpr, WANT_ALPHA: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """ds of a block's real rows with one tile of one image's patches [most_rows, M P_PAD], and a
    part of d alpha a program."""
    begin, count = _block(bounds_ptr, first_text, last_text, first_row, most_rows)
    alpha = tl.load(alpha_ptr)
    if WANT_ALPHA:
        if (alpha >= PLAIN_LEAST) & (alpha <= PLAIN_MOST):
            _similarity_tiles(
                rows_ptr, v_ptr, bias_ptr, r_ptr, stat_ptr, g_ptr, ds_ptr, alpha_part_ptr, alpha,
                begin, count, first_row, stride_rm, stride_gm, stride_ds,
                P_PAD, DIM, BLOCK_D, BLOCK_R, SEG0, TILES, WANT_ALPHA, True, PRECISION, UPCAST,
            )  # fmt: skip
            return
    _similarity_tiles(
        rows_ptr, v_ptr, bias_ptr, r_ptr, stat_ptr, g_ptr, ds_ptr, alpha_part_ptr, alpha,
        begin, count, first_row, stride_rm, stride_gm, stride_ds,
        P_PAD, DIM, BLOCK_D, BLOCK_R, SEG0, TILES, WANT_ALPHA, False, PRECISION, UPCAST,
    )  # fmt: skip


@triton.jit
def _block_rows_kernel(
    rows_ptr, bounds_ptr, block_ptr, ds_ptr, first_text, last_text, first_row, most_rows, columns,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One row of a block [most_rows, D]; a row that is not real is zeros, and so is its row of ds:
    the library multiplies what is there."""
    begin, count = _block(bounds_ptr, first_text, last_text, first_row, most_rows)
    row = tl.program_id(0).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    real = row < count
    at = rows_ptr + (begin + row) * DIM + offs_d
    # not `real &`: a number and a block make a mask that newer interpreters refuse
    x = tl.load(at, mask=offs_d < tl.where(real, DIM, 0), other=0.0)
    tl.store(block_ptr + row * DIM + offs_d, x, mask=offs_d < DIM)
    if not real:
        for first in range(0, columns, BLOCK_C):
            offs_c = first + tl.arange(0, BLOCK_C)
            nothing = tl.zeros([BLOCK_C], ds_ptr.dtype.element_ty)
            tl.store(ds_ptr + row * columns + offs_c, nothing, mask=offs_c < columns)


@triton.jit(do_not_specialize=["row_base"])
def _place_rows_kernel(
    product_ptr, index_ptr, bounds_ptr, rows_grad_ptr,
    first_text, last_text, first_row, most_rows, row_base,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """A block's real rows, where they came from. Row `row_base` is the buffer's first."""
    begin, count = _block(bounds_ptr, first_text, last_text, first_row, most_rows)
    offs_r = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    real = offs_r < count
    mask = real[:, None] & (offs_d < DIM)[None, :]
    index = tl.load(index_ptr + begin + offs_r, mask=real, other=0).to(tl.int64) - row_base
    x = tl.load(product_ptr + offs_r[:, None] * DIM + offs_d[None, :], mask=mask, other=0.0)
    tl.store(rows_grad_ptr + index[:, None] * DIM + offs_d[None, :], x, mask=mask)


class ProductsBackward:
    """The products of one backward pass, chunk by chunk of texts; holds their buffers.

    texts: of the largest chunk
    """

    # parts of the gradients of rows and of patches: products leave none to be added up
    row_parts = patch_parts = 1

    def __init__(
        self,
        p: Problem,
        tensors: dict[str, Tensor],
        texts: int,
        want_alpha: bool,
        chip: Chip,
    ) -> None:
        like = tensors["v"]
        wide: Any = {"dtype": torch.float32, "device": like.device}
        narrow: Any = {"dtype": like.dtype, "device": like.device}
        self._p, self._tensors, self._want_alpha = p, tensors, want_alpha
        self._columns = p.images * p.padded
        self._block = gradient_rows(p, texts)
        self._ds = torch.empty((self._block, self._columns), **narrow)
        self._rows = torch.empty((self._block, p.dim), **narrow)
        self._g = torch.empty((p.images, self._block), **wide)
        tiling = choose_tiling("gradient", p.patches, block_dim(p.dim), p.size, chip)
        self._tile = tiling.keywords()
        del self._tile["SEG1"], self._tile["SEG2"]  # one segment
        programs = p.images * tiling.tiles
        tiles = triton.cdiv(self._block, tiling.block_r)
        # four programs a multiprocessor, and no more than there are row tiles
        self._grid = (programs, min(tiles, max(1, triton.cdiv(4 * chip.processors, programs))))

    def run(
        self,
        stats: tuple[Tensor, Tensor],
        of_scores: tuple[Tensor, Tensor, Tensor],
        d_rows: Tensor,
        span: tuple[int, int],
        row_base: int,
    ) -> Tensor:
        """Writes the gradient of a chunk's real rows to d_rows and adds that of patches to d_v (the
        first chunk makes it).

        Shapes:  stats r and softmax statistic [M, stride]; of_scores valid or scores, scores and
                 d scores [M, N]; d_rows [1, rows, D], d_v [1, M, P_PAD, D] float32
        Returns: d alpha of the chunk [], 0 where it is not wanted
        """
        p, tensors, block = self._p, self._tensors, self._block
        r, stat = stats
        valid, scores, grad = of_scores
        index, bounds, rows, v = (tensors[name] for name in ("index", "bounds", "rows", "v"))
        shape: dict[str, object] = {"DIM": p.dim, "BLOCK_D": block_dim(p.dim)}
        if span[0] == 0:
            self.d_v = torch.zeros((1, *v.shape), dtype=torch.float32, device=v.device)
        flat_v, flat_d_v = (x.view(self._columns, p.dim) for x in (v, self.d_v))
        firsts = range(0, (span[1] - span[0]) * p.rows_a_text, block)
        alpha = torch.empty(
            (len(firsts), self._grid[0] * self._grid[1]), dtype=torch.float32, device=v.device
        )
        for number, first in enumerate(firsts):
            at = (*span, first, block)
            _pull_kernel[(triton.cdiv(block, 128), triton.cdiv(p.images, 16))](
                r, tensors["weight"], index, tensors["text"], bounds, valid, tensors["gamma"],
                scores, grad, self._g, *at, p.images, r.stride(0), scores.stride(0), block,
                HAS_VALID=valid is not scores, LSE=p.aggregation == "lse", BLOCK_M=16, BLOCK_R=128,
            )  # fmt: skip
            _similarity_gradient_kernel[self._grid](
                rows, bounds, v, tensors["bias"], tensors["alpha"], r, stat, self._g,
                self._ds, alpha[number], *at, r.stride(0), block, self._columns,
                P_PAD=p.padded, WANT_ALPHA=self._want_alpha, PRECISION="ieee",
                UPCAST=is_interpreting(), **shape, **self._tile,
            )  # fmt: skip
            _block_rows_kernel[(block,)](
                rows, bounds, self._rows, self._ds, *at, self._columns, BLOCK_C=1024, **shape
            )
            _place_rows_kernel[(triton.cdiv(block, 16),)](
                wide_product(self._ds, flat_v), index, bounds, d_rows, *at, row_base,
                BLOCK_R=16, **shape,
            )  # fmt: skip
            wide_product(self._ds.T, self._rows, out=flat_d_v)
        return alpha.sum() if self._want_alpha else alpha.new_zeros(())

    def finish(self, _stats: tuple[Tensor, Tensor], _span: tuple[int, int]) -> None:
        """Nothing: each block gave its part to both gradients."""
