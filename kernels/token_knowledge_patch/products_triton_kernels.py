"""Backward pass of attention pooling by products: the gradient of every similarity is written once,
in the rows' type, and two plain matrix products read it.

Similarities are made once more and not twice, as a pass over rows and one over patches would. What
is written is a block of rows at a time: the buffer's bound is `tiling.gradient_rows`. The library
multiplies bfloat16; float32, which is for exactness, is multiplied here, whatever precision of
float32 products torch was told to be content with. Every output has one owner that adds in a fixed
order: no atomics, the same bits every time. Formulas: derivation 2 of the README.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mlip.kernels._common_triton_kernels import LOG2_E, dot
from mlip.kernels._dispatch import is_interpreting
from mlip.kernels._products import wide_product
from mlip.kernels.token_knowledge_patch.backward_triton_kernels import _pull
from mlip.kernels.token_knowledge_patch.forward_triton_kernels import _load_patches, _load_rows
from mlip.kernels.token_knowledge_patch.tiling import (
    Problem,
    block_dim,
    choose_tiling,
    gradient_rows,
)

# a learned attention scale in this range takes the short way. Up to the upper bound a weight on
# padding stays below 2^58; from the lower bound on, d alpha may be told from a sum over ds by alpha
PLAIN_LEAST = tl.constexpr(1.0)
PLAIN_MOST = tl.constexpr(40.0)
# the softmax statistic of a row that is not there: every weight 0
ABSENT = tl.constexpr(1e30)
# of the products of float32, three tf32 products a dot hold three times the operands
PRODUCT_TILE = {"BLOCK_M": 32, "BLOCK_K": 32, "num_warps": 4, "num_stages": 1}
MOST_SHARES = 16  # of the columns, in the gradient of a block's rows: each is a buffer of its own
LEAST_STEPS = 16  # of a share's loop, below which its begin and end outweigh it


@triton.jit
def _block(bounds_ptr, first_text, last_text, first_row, most_rows):
    """First packed row of a block of a chunk's rows, and how many of them are real."""
    start = tl.load(bounds_ptr + first_text)
    count = tl.load(bounds_ptr + last_text) - start - first_row
    return start + first_row, tl.minimum(count, most_rows)


@triton.jit
def _pull_kernel(
    r_ptr, weight_ptr, index_ptr, text_ptr, bounds_ptr, valid_ptr, gamma_ptr, score_ptr, grad_ptr,
    g_ptr, h_ptr, first_text, last_text, first_row, most_rows, images, stride_rm, stride_sm,
    stride_gm, HAS_VALID: tl.constexpr, LSE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """g = dS dS/dr and h = g r of a block of rows [M, most_rows]."""
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
    tl.store(h_ptr + place, g * r, mask=mask)


@triton.jit
def _similarity_step(
    q, v, bias, stat, g, h, alpha, alpha_sum, at, mask,
    BLOCK_R: tl.constexpr, SEG: tl.constexpr, WANT_ALPHA: tl.constexpr, PLAIN: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """ds [BLOCK_R, SEG], written at `at`; PLAIN: an attention scale of the range above."""
    s = dot(q, tl.trans(v), tl.zeros([BLOCK_R, SEG], tl.float32), PRECISION, UPCAST)
    x = s * (alpha * LOG2_E) - stat[:, None]
    # padding has s = 0: a weight that overflowed there would turn the zero it multiplies into NaN
    if not PLAIN:
        if WANT_ALPHA:
            x += bias[None, :]  # no weight at all, as the sum below needs it
        else:
            x = tl.minimum(x, 0.0)  # a real weight is at most 1
    a = tl.exp2(x)
    if WANT_ALPHA and not PLAIN:
        # g (s - r)^2 by patch, the form that cancels least; g apart, whose square underflows
        away = s - tl.where(g != 0, h / g, 0.0)[:, None]
        alpha_sum += tl.where(g != 0, g * tl.sum(a * away * away, 1), 0.0)
        ds = a * (g[:, None] + (alpha * g)[:, None] * away)
    else:
        ds = a * ((g - alpha * h)[:, None] + (alpha * g)[:, None] * s)
        if WANT_ALPHA:
            alpha_sum += tl.sum(ds * s, 1)
    tl.store(at, ds.to(at.dtype.element_ty), mask=mask)
    return alpha_sum


@triton.jit
def _similarity_tiles(
    rows_ptr, v_ptr, bias_ptr, stat_ptr, g_ptr, h_ptr, ds_ptr, alpha_part_ptr, alpha,
    begin, count, first_row, most_rows, stride_rm, stride_gm, stride_ds,
    P_PAD: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
    SEG0: tl.constexpr, SEG1: tl.constexpr, SEG2: tl.constexpr, TILES: tl.constexpr,
    WANT_ALPHA: tl.constexpr, PLAIN: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Every row tile of this program's share, under patches that stay on chip."""
    m = (tl.program_id(0) // TILES).to(tl.int64)
    SPAN: tl.constexpr = SEG0 + SEG1 + SEG2
    WHOLE: tl.constexpr = TILES * SPAN == P_PAD
    first0 = (tl.program_id(0) % TILES) * SPAN
    first1 = first0 + SEG0
    first2 = first1 + SEG1
    v0, b0 = _load_patches(v_ptr, bias_ptr, first0, m, P_PAD, DIM, BLOCK_D, SEG0, WHOLE)
    offs0 = first0 + tl.arange(0, SEG0)
    if SEG1 > 0:
        v1, b1 = _load_patches(v_ptr, bias_ptr, first1, m, P_PAD, DIM, BLOCK_D, SEG1, WHOLE)
        offs1 = first1 + tl.arange(0, SEG1)
    if SEG2 > 0:
        v2, b2 = _load_patches(v_ptr, bias_ptr, first2, m, P_PAD, DIM, BLOCK_D, SEG2, WHOLE)
        offs2 = first2 + tl.arange(0, SEG2)
    alpha_sum = tl.zeros([BLOCK_R], tl.float32)
    # rows that are not real get zeros: the library's product reads them too
    for tile in tl.range(
        tl.program_id(1), tl.cdiv(most_rows, BLOCK_R), tl.num_programs(1), disable_licm=True
    ):
        offs_r = tile * BLOCK_R + tl.arange(0, BLOCK_R)
        mask_r = offs_r < count
        inside = (offs_r < most_rows)[:, None]
        q = _load_rows(rows_ptr, begin + tile * BLOCK_R, DIM, BLOCK_D, BLOCK_R)
        stat = tl.load(stat_ptr + m * stride_rm + first_row + offs_r, mask=mask_r, other=ABSENT)
        g = tl.load(g_ptr + m * stride_gm + offs_r, mask=mask_r, other=0.0)
        h = tl.load(h_ptr + m * stride_gm + offs_r, mask=mask_r, other=0.0)
        if PLAIN and WANT_ALPHA:
            alpha_sum -= tl.where(first0 == 0, h, 0.0)
        at = (ds_ptr + offs_r.to(tl.int64) * stride_ds + m * P_PAD)[:, None]
        alpha_sum = _similarity_step(
            q, v0, b0, stat, g, h, alpha, alpha_sum, at + offs0[None, :],
            inside if WHOLE else inside & (offs0 < P_PAD)[None, :],
            BLOCK_R, SEG0, WANT_ALPHA, PLAIN, PRECISION, UPCAST,
        )  # fmt: skip
        if SEG1 > 0:
            alpha_sum = _similarity_step(
                q, v1, b1, stat, g, h, alpha, alpha_sum, at + offs1[None, :],
                inside if WHOLE else inside & (offs1 < P_PAD)[None, :],
                BLOCK_R, SEG1, WANT_ALPHA, PLAIN, PRECISION, UPCAST,
            )  # fmt: skip
        if SEG2 > 0:
            alpha_sum = _similarity_step(
                q, v2, b2, stat, g, h, alpha, alpha_sum, at + offs2[None, :],
                inside if WHOLE else inside & (offs2 < P_PAD)[None, :],
                BLOCK_R, SEG2, WANT_ALPHA, PLAIN, PRECISION, UPCAST,
            )  # fmt: skip
    if WANT_ALPHA:
        if PLAIN:
            # ds = g a (1 + alpha (s - r)) makes the sum of ds s over patches h + alpha d alpha
            alpha_sum /= alpha
        part = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
        tl.store(alpha_part_ptr + part, tl.sum(alpha_sum, 0))


@triton.jit
def _similarity_gradient_kernel(
    rows_ptr, bounds_ptr, v_ptr, bias_ptr, alpha_ptr, stat_ptr, g_ptr, h_ptr, ds_ptr,
    alpha_part_ptr, first_text, last_text, first_row, most_rows, stride_rm, stride_gm, stride_ds,
    P_PAD: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
    SEG0: tl.constexpr, SEG1: tl.constexpr, SEG2: tl.constexpr, TILES: tl.constexpr,
    WANT_ALPHA: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """ds of a block's rows with one tile of one image's patches [most_rows, M P_PAD], and a part of
    d alpha a program."""
    begin, count = _block(bounds_ptr, first_text, last_text, first_row, most_rows)
    alpha = tl.load(alpha_ptr)
    # float32 operands are for exactness: there d alpha is summed in the form that cancels least
    if WANT_ALPHA and (PRECISION != "tf32x3"):
        if (alpha >= PLAIN_LEAST) & (alpha <= PLAIN_MOST):
            _similarity_tiles(
                rows_ptr, v_ptr, bias_ptr, stat_ptr, g_ptr, h_ptr, ds_ptr, alpha_part_ptr, alpha,
                begin, count, first_row, most_rows, stride_rm, stride_gm, stride_ds,
                P_PAD, DIM, BLOCK_D, BLOCK_R, SEG0, SEG1, SEG2, TILES, WANT_ALPHA, True,
                PRECISION, UPCAST,
            )  # fmt: skip
            return
    _similarity_tiles(
        rows_ptr, v_ptr, bias_ptr, stat_ptr, g_ptr, h_ptr, ds_ptr, alpha_part_ptr, alpha,
        begin, count, first_row, most_rows, stride_rm, stride_gm, stride_ds,
        P_PAD, DIM, BLOCK_D, BLOCK_R, SEG0, SEG1, SEG2, TILES, WANT_ALPHA, False,
        PRECISION, UPCAST,
    )  # fmt: skip


@triton.jit
def _rows_product(
    ds_ptr, v_ptr, part_ptr, tile, share, shares, columns, most_rows, stride_ds, stride_part,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """ds v of BLOCK_M rows over a share of the columns; rows that are not real are left wrong."""
    offs_r = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    in_d = (offs_d < DIM)[None, :]
    wide = tl.cdiv(tl.cdiv(columns, BLOCK_K), shares) * BLOCK_K
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    # past the block the last row again, whose product nobody takes
    ds_at = ds_ptr + tl.minimum(offs_r, most_rows - 1).to(tl.int64)[:, None] * stride_ds
    for first in tl.range(share * wide, tl.minimum((share + 1) * wide, columns), BLOCK_K):
        offs_c = first + tl.arange(0, BLOCK_K)
        inside = offs_c < columns
        ds = tl.load(ds_at + offs_c[None, :], mask=inside[None, :], other=0.0)
        v_at = v_ptr + offs_c.to(tl.int64)[:, None] * DIM + offs_d[None, :]
        v = tl.load(v_at, mask=inside[:, None] & in_d, other=0.0)
        acc = dot(ds, v, acc, PRECISION, UPCAST)
    out = part_ptr + share.to(tl.int64) * stride_part + offs_r[:, None] * DIM + offs_d[None, :]
    tl.store(out, acc, mask=(offs_r < most_rows)[:, None] & in_d)


@triton.jit
def _patches_product(
    ds_ptr, rows_ptr, out_ptr, tile, begin, count, columns, stride_ds,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """ds^T rows of BLOCK_M patches over the block's real rows, added to what is there."""
    offs_c = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    inside = offs_c < columns
    in_d = (offs_d < DIM)[None, :]
    at = out_ptr + offs_c.to(tl.int64)[:, None] * DIM + offs_d[None, :]
    mask = inside[:, None] & in_d
    acc = tl.load(at, mask=mask, other=0.0)
    for first in tl.range(0, count, BLOCK_K):
        offs_r = first + tl.arange(0, BLOCK_K)
        real = (offs_r < count)[:, None]
        ds_at = ds_ptr + offs_r.to(tl.int64)[:, None] * stride_ds + offs_c[None, :]
        ds = tl.load(ds_at, mask=real & inside[None, :], other=0.0)
        q_at = rows_ptr + (begin + offs_r).to(tl.int64)[:, None] * DIM + offs_d[None, :]
        q = tl.load(q_at, mask=real & in_d, other=0.0)
        acc = dot(tl.trans(ds), q, acc, PRECISION, UPCAST)
    tl.store(at, acc, mask=mask)


@triton.jit
def _products_kernel(
    ds_ptr, rows_ptr, v_ptr, bounds_ptr, part_ptr, patch_grad_ptr,
    first_text, last_text, first_row, most_rows, row_tiles, shares, columns, stride_ds, stride_part,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Both products of a block: its rows' gradient in shares first, then what it adds to that of
    every patch."""
    begin, count = _block(bounds_ptr, first_text, last_text, first_row, most_rows)
    number = tl.program_id(0)
    if number < row_tiles * shares:
        tile = number % row_tiles
        if tile * BLOCK_M < count:
            _rows_product(
                ds_ptr, v_ptr, part_ptr, tile, number // row_tiles, shares, columns, most_rows,
                stride_ds, stride_part, DIM, BLOCK_D, BLOCK_M, BLOCK_K, PRECISION, UPCAST,
            )  # fmt: skip
    else:
        _patches_product(
            ds_ptr, rows_ptr, patch_grad_ptr, number - row_tiles * shares, begin, count, columns,
            stride_ds, DIM, BLOCK_D, BLOCK_M, BLOCK_K, PRECISION, UPCAST,
        )  # fmt: skip


@triton.jit
def _block_rows_kernel(
    rows_ptr, bounds_ptr, block_ptr, first_text, last_text, first_row, most_rows,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """A block's rows, zeros behind the real ones [most_rows, D]."""
    begin, count = _block(bounds_ptr, first_text, last_text, first_row, most_rows)
    offs_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_d = tl.arange(0, BLOCK_D)
    in_d = (offs_d < DIM)[None, :]
    at = rows_ptr + (begin + offs_r).to(tl.int64)[:, None] * DIM + offs_d[None, :]
    x = tl.load(at, mask=(offs_r < count)[:, None] & in_d, other=0.0)
    out = block_ptr + offs_r[:, None] * DIM + offs_d[None, :]
    tl.store(out, x, mask=(offs_r < most_rows)[:, None] & in_d)


@triton.jit(do_not_specialize=["row_base"])
def _place_rows_kernel(
    part_ptr, index_ptr, bounds_ptr, rows_grad_ptr,
    first_text, last_text, first_row, most_rows, row_base, shares, stride_part,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """The sum of a block's shares, where its rows came from. Row `row_base` is the buffer's first."""
    begin, count = _block(bounds_ptr, first_text, last_text, first_row, most_rows)
    offs_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_d = tl.arange(0, BLOCK_D)
    real = offs_r < count
    mask = real[:, None] & (offs_d < DIM)[None, :]
    index = tl.load(index_ptr + begin + offs_r, mask=real, other=0).to(tl.int64) - row_base
    total = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    part_at = part_ptr + offs_r[:, None] * DIM + offs_d[None, :]
    for share in range(0, shares):
        total += tl.load(part_at + share * stride_part, mask=mask, other=0.0)
    tl.store(rows_grad_ptr + index[:, None] * DIM + offs_d[None, :], total, mask=mask)


class AttentionBackward:
    """The products of one backward pass, chunk by chunk of texts; holds their buffers.

    texts: of the largest chunk; chip: bytes of shared memory a block, multiprocessors
    """

    def __init__(
        self,
        p: Problem,
        tensors: dict[str, Tensor],
        texts: int,
        want_alpha: bool,
        chip: tuple[int, int],
    ) -> None:
        like = tensors["v"]
        wide: Any = {"dtype": torch.float32, "device": like.device}
        self._p, self._tensors, self._want_alpha = p, tensors, want_alpha
        self._columns = p.images * p.padded
        self._block = gradient_rows(p, texts)
        self._ds = torch.empty((self._block, self._columns), dtype=like.dtype, device=like.device)
        self._g = torch.empty((p.images, self._block), **wide)
        self._h = torch.empty_like(self._g)
        limit, processors = chip
        self._tiling = choose_tiling("gradient", p.patches, block_dim(p.dim), p.size, limit)
        programs = p.images * self._tiling.tiles
        tiles = triton.cdiv(self._block, self._tiling.block_r)
        # four programs a multiprocessor, and no more than there are row tiles
        self._grid = (programs, min(tiles, max(1, triton.cdiv(4 * processors, programs))))
        self._shape: dict[str, object] = {"DIM": p.dim, "BLOCK_D": block_dim(p.dim)}
        self._precise: dict[str, object] = {
            "PRECISION": "tf32x3" if p.size == 4 else "ieee",
            "UPCAST": is_interpreting(),
        }
        self._shares = 1
        if p.size == 4:
            steps = triton.cdiv(self._columns, PRODUCT_TILE["BLOCK_K"])
            self._shares = max(1, min(MOST_SHARES, steps // LEAST_STEPS))

    def run(
        self,
        stats: tuple[Tensor, Tensor],
        of_scores: tuple[Tensor, Tensor, Tensor],
        d_rows: Tensor,
        d_v: Tensor,
        span: tuple[int, int],
        row_base: int,
    ) -> Tensor:
        """Writes the gradient of a chunk's real rows to d_rows and adds that of patches to d_v.

        Shapes:  stats r and softmax statistic [M, stride]; of_scores valid or scores, scores and
                 d scores [M, N]; d_rows [rows, D], d_v [M, P_PAD, D] float32
        Returns: d alpha of the chunk [], 0 where it is not wanted
        """
        p, tensors, block = self._p, self._tensors, self._block
        r, stat = stats
        valid, scores, grad = of_scores
        index, bounds = tensors["index"], tensors["bounds"]
        firsts = range(0, (span[1] - span[0]) * p.rows_a_text, block)
        alpha = self._g.new_empty((len(firsts), self._grid[0] * self._grid[1]))
        for number, first in enumerate(firsts):
            at = (*span, first, block)
            _pull_kernel[(triton.cdiv(block, 128), triton.cdiv(p.images, 16))](
                r, tensors["weight"], index, tensors["text"], bounds, valid, tensors["gamma"],
                scores, grad, self._g, self._h, *at, p.images, r.stride(0), scores.stride(0), block,
                HAS_VALID=valid is not scores, LSE=p.aggregation == "lse", BLOCK_M=16, BLOCK_R=128,
            )  # fmt: skip
            _similarity_gradient_kernel[self._grid](
                tensors["rows"], bounds, tensors["v"], tensors["bias"], tensors["alpha"], stat,
                self._g, self._h, self._ds, alpha[number], *at, r.stride(0), block, self._columns,
                P_PAD=p.padded, WANT_ALPHA=self._want_alpha, **self._shape, **self._precise,
                **self._tiling.keywords(),
            )  # fmt: skip
            multiply = self._multiply_exactly if p.size == 4 else self._multiply
            parts = multiply(d_v.view(self._columns, p.dim), at)
            _place_rows_kernel[(triton.cdiv(block, 16),)](
                parts, index, bounds, d_rows, *at, row_base, self._shares, parts.stride(0),
                BLOCK_R=16, **self._shape,
            )  # fmt: skip
        return alpha.sum() if self._want_alpha else alpha.new_zeros(())

    def _multiply(self, d_v: Tensor, at: tuple[int, int, int, int]) -> Tensor:
        """Adds ds^T rows to d_v [M P_PAD, D]; ds v of the block [1, block, D]."""
        gathered = torch.empty(
            (self._block, self._p.dim), dtype=self._ds.dtype, device=self._ds.device
        )
        # where a chunk begins is known to the device alone
        _block_rows_kernel[(triton.cdiv(self._block, 32),)](
            self._tensors["rows"], self._tensors["bounds"], gathered, *at, BLOCK_R=32, **self._shape
        )
        wide_product(self._ds.T, gathered, out=d_v)
        return wide_product(self._ds, self._tensors["v"].view(self._columns, -1)).unsqueeze(0)

    def _multiply_exactly(self, d_v: Tensor, at: tuple[int, int, int, int]) -> Tensor:
        """_multiply of float32; ds v in shares [shares, block, D]."""
        shape = (self._shares, self._block, self._p.dim)
        parts = torch.empty(shape, dtype=torch.float32, device=d_v.device)
        row_tiles = triton.cdiv(self._block, PRODUCT_TILE["BLOCK_M"])
        column_tiles = triton.cdiv(self._columns, PRODUCT_TILE["BLOCK_M"])
        _products_kernel[(row_tiles * self._shares + column_tiles,)](
            self._ds, self._tensors["rows"], self._tensors["v"], self._tensors["bounds"], parts,
            d_v, *at, row_tiles, self._shares, self._columns, self._columns, parts.stride(0),
            **self._shape, **self._precise, **PRODUCT_TILE,
        )  # fmt: skip
        return parts
