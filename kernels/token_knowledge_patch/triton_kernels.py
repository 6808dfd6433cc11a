"""Launchers of the pair-score kernels: tensors in, tensors out.

No autograd and no choice of implementation. Nothing here reads a tensor on the host: how many rows
are real is known to the device alone, grids are sized for all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

from mlip.kernels._chip import chip_facts
from mlip.kernels._dispatch import is_interpreting
from mlip.kernels.token_knowledge_patch.backward_triton_kernels import (
    _aggregate_bwd_kernel,
    _pair_bwd_patches_kernel,
    _pair_bwd_rows_kernel,
)
from mlip.kernels.token_knowledge_patch.context_triton_kernels import (
    _context_bwd_patches_kernel,
    _context_bwd_rows_kernel,
    _context_turn_kernel,
)
from mlip.kernels.token_knowledge_patch.forward_triton_kernels import (
    _aggregate_fwd_kernel,
    _pair_fwd_kernel,
)
from mlip.kernels.token_knowledge_patch.max_triton_kernels import (
    _max_bwd_patches_kernel,
    _max_bwd_rows_kernel,
)
from mlip.kernels.token_knowledge_patch.products_triton_kernels import ProductsBackward
from mlip.kernels.token_knowledge_patch.tiling import (
    Problem,
    block_dim,
    choose_tiling,
    chunk_bytes,
    is_kept,
    takes_products,
    text_chunks,
    workspace_bytes,
)

# r and statistic of a chunk of texts where no backward pass keeps them
FORWARD_CHUNK_BYTES = 2**28
PARTIAL_BUDGET_BYTES = 2**25
PARTIAL_FLOOR_BYTES = 2**22
MOST_PARTS = 4
MOST_PARTS_OF_A_CHUNK = 32  # a context's chunk may be one text: few row tiles, many images


def pair_keywords(p: Problem) -> dict[str, object]:
    """What every kernel of the pair scores is specialised on, tile map apart."""
    return {
        "P_PAD": p.padded,
        "DIM": p.dim,
        "BLOCK_D": block_dim(p.dim),
        # float32 operands: three tf32 products, as exact as float32; bfloat16 ignores it
        "PRECISION": "tf32x3" if p.size == 4 else "ieee",
        "UPCAST": is_interpreting(),
    }


def _groups(
    programs: int, target: int, part_bytes: int, budget: int, most: int = MOST_PARTS
) -> int:
    """Into how many shares to split a pass that would leave the chip idle."""
    by_need = (target + programs // 2) // programs
    by_memory = min(budget, PARTIAL_BUDGET_BYTES) // part_bytes
    return max(1, min(by_need, by_memory, most))


def _ordered_sum(parts: Tensor) -> Tensor:
    return parts[0] if parts.shape[0] == 1 else parts.sum(0)


def _pair_fwd(p: Problem, tensors: dict[str, Tensor], first: int, last: int, out) -> None:
    r, stat = out
    chip = chip_facts(r.device)
    tiling = choose_tiling("forward", p.patches, block_dim(p.dim), p.size, chip, p.pooling)
    tiles = triton.cdiv((last - first) * p.rows_a_text, tiling.block_r)
    # eight programs a multiprocessor, each with at least four row tiles to keep its patches busy
    groups = min(max(1, tiles // 4), max(1, triton.cdiv(8 * chip.processors, p.images)))
    _pair_fwd_kernel[(p.images, groups)](
        tensors["rows"],
        tensors["bounds"],
        tensors["v"],
        tensors["bias"],
        tensors["alpha"],
        r,
        stat,
        first,
        last,
        r.stride(0),
        POOLING=p.pooling,
        **pair_keywords(p),
        **tiling.keywords(),
    )


def _buffers(p: Problem, texts: int, like: Tensor) -> tuple[Tensor, Tensor]:
    shape = (p.images, p.stride(texts))
    r = torch.empty(shape, dtype=torch.float32, device=like.device)
    dtype = torch.int32 if p.pooling == "max" else torch.float32
    stat = torch.empty(shape, dtype=dtype, device=like.device)
    return r, stat


def pair_scores_fwd(
    p: Problem, tensors: dict[str, Tensor], valid: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(scores [M, N], r, stat); the statistics are empty where backward makes them again.

    tensors: rows [N J + ROW_TAIL, D], index, text and bounds of pack_rows, weight [N, J],
             v [M, P_PAD, D], bias [M, P_PAD], alpha [], gamma [1]; valid [M] int8 or None
    """
    keep = keep and is_kept(p)
    chunks = [(0, p.texts)]
    if not keep:
        # not kept for a backward pass, smaller chunks: r is summed at once and dropped
        each = 8 * p.images * p.stride(1)
        step = max(1, FORWARD_CHUNK_BYTES // each)
        chunks = [(first, min(first + step, p.texts)) for first in range(0, p.texts, step)]
    like = tensors["v"]
    scores = torch.empty((p.images, p.texts), dtype=torch.float32, device=like.device)
    out = _buffers(p, max(last - first for first, last in chunks), like)
    for first, last in chunks:
        _pair_fwd(p, tensors, first, last, out)
        block_m = 64 if p.images >= 64 else 16
        _aggregate_fwd_kernel[(last - first, triton.cdiv(p.images, block_m))](
            out[0],
            tensors["weight"],
            tensors["index"],
            tensors["bounds"],
            scores if valid is None else valid,
            tensors["gamma"],
            scores,
            first,
            p.images,
            out[0].stride(0),
            scores.stride(0),
            HAS_VALID=valid is not None,
            LSE=p.aggregation == "lse",
            BLOCK_M=block_m,
            BLOCK_R=32,
        )
    if keep:
        return scores, out[0], out[1]
    return scores, out[0].new_empty(0), out[1].new_empty(0)


def aggregate_bwd(
    p: Problem,
    tensors: dict[str, Tensor],
    of_scores: tuple[Tensor, Tensor, Tensor],
    r: Tensor,
    d_weight: Tensor,
    span: tuple[int, int],
    g: Tensor | None,
) -> Tensor:
    """Writes d weight [N J] of a chunk's real rows and, where asked for, g = dS dS/dr of them
    [M, stride].

    of_scores: valid or scores, scores, d scores
    Returns:   their part of d gamma []
    """
    valid, scores, grad = of_scores
    blocks = triton.cdiv((span[1] - span[0]) * p.rows_a_text, 64)
    parts = torch.empty(blocks, dtype=torch.float32, device=r.device)
    _aggregate_bwd_kernel[(blocks,)](
        r,
        tensors["weight"],
        tensors["index"],
        tensors["text"],
        tensors["bounds"],
        valid,
        tensors["gamma"],
        scores,
        grad,
        r if g is None else g,
        d_weight,
        parts,
        *span,
        p.images,
        r.stride(0),
        scores.stride(0),
        HAS_VALID=valid is not scores,
        LSE=p.aggregation == "lse",
        STORE=g is not None,
        BLOCK_M=16,
        BLOCK_R=64,
    )
    return parts.sum() / tensors["gamma"][0] if p.aggregation == "lse" else parts.new_zeros(())


class _TwoPasses:
    """A pass over rows and one over patches, in which one program owns its output: the backward
    pass where products do not serve.

    texts: of the largest of the chunks; room: whether d rows are held whole, and in one chunk
    """

    def __init__(
        self,
        p: Problem,
        tensors: dict[str, Tensor],
        texts: int,
        want_alpha: bool,
        room: tuple[bool, bool],
    ) -> None:
        like = tensors["v"]
        wide: Any = {"dtype": torch.float32, "device": like.device}
        chip = chip_facts(like.device)
        self._processors = chip.processors
        size = (p.patches, block_dim(p.dim), p.size, chip, p.pooling)
        self._p, self._tensors, self._want_alpha = p, tensors, want_alpha
        self._by_rows = choose_tiling("backward_rows", *size)
        self._by_patches = choose_tiling("backward_patches", *size)
        self.g = torch.empty((p.images, p.stride(texts)), **wide)
        if p.pooling == "context":
            self._turning = choose_tiling("turn", *size)
            self._h = torch.empty_like(self.g)
            self._turned = like.new_empty((*self.g.shape, p.dim))

        is_whole, is_one_chunk = room
        programs = triton.cdiv(texts * p.rows_a_text, self._by_rows.block_r)
        # for partial sums, the rows' first
        spare = workspace_bytes(p, is_whole) - chunk_bytes(p, texts, is_whole)
        held_rows = p.texts * p.rows_a_text if is_whole else texts * p.rows_a_text
        part_bytes = held_rows * p.dim * 4
        most = MOST_PARTS
        if not (is_one_chunk or is_whole):
            most, spare = MOST_PARTS_OF_A_CHUNK, max(spare, PARTIAL_FLOOR_BYTES)
        groups = _groups(programs, 2 * self._processors, part_bytes, spare, most)
        share = triton.cdiv(p.images, min(p.images, groups))
        self.row_parts = triton.cdiv(p.images, share)  # no part is without an image
        spare -= (self.row_parts - 1) * part_bytes
        programs = p.images * self._by_patches.tiles
        groups = _groups(programs, 2 * self._processors, like.numel() * 4, spare)
        # many chunks are many rows: the images alone fill the chip
        self.patch_parts = groups if is_one_chunk else 1

    def run(
        self,
        stats: tuple[Tensor, Tensor],
        _of_scores: tuple[Tensor, Tensor, Tensor],
        d_rows: Tensor,
        span: tuple[int, int],
        row_base: int,
    ) -> Tensor:
        """Parts of the gradient of a chunk's real rows to d_rows [row_parts, rows, D].

        Returns: d alpha of the chunk [], 0 where it is not wanted
        """
        p, tensors = self._p, self._tensors
        r, stat = stats
        rows, index, bounds, v = (tensors[name] for name in ("rows", "index", "bounds", "v"))
        capacity = (span[1] - span[0]) * p.rows_a_text
        grid = (triton.cdiv(capacity, self._by_rows.block_r), self.row_parts)
        row_sizes = (*span, row_base, p.images, r.stride(0), d_rows.stride(0))
        alpha = r.new_zeros(grid[0] * grid[1] if self._want_alpha else 1)
        if p.pooling == "max":
            _max_bwd_rows_kernel[grid](
                index, bounds, v, stat, self.g, d_rows, *row_sizes,
                P_PAD=p.padded, DIM=p.dim, BLOCK_D=block_dim(p.dim),
                BLOCK_R=self._by_rows.block_r, num_warps=self._by_rows.warps,
            )  # fmt: skip
            return alpha.sum()
        inputs, made = self._given(r, stat)
        by_row = _pair_bwd_rows_kernel
        if p.pooling == "context":
            self._turn(span, r, [*inputs, r, *made[:-1]])
            # r: by now the mean similarities; a context's r is never kept
            by_row, made = _context_bwd_rows_kernel, [*made, r]
        by_row[grid](
            rows, index, *inputs, *made, d_rows, alpha, *row_sizes,
            WANT_ALPHA=self._want_alpha, **pair_keywords(p), **self._by_rows.keywords(),
        )  # fmt: skip
        return alpha.sum()

    def finish(self, stats: tuple[Tensor, Tensor], span: tuple[int, int]) -> None:
        """Parts of the gradient of patches to d_v [patch_parts, M, P_PAD, D], after `run`: the
        first chunk makes it, others add to it."""
        p, rows, bounds = self._p, self._tensors["rows"], self._tensors["bounds"]
        r, stat = stats
        if span[0] == 0:
            shape = (self.patch_parts, *self._tensors["v"].shape)
            self.d_v = torch.empty(shape, dtype=torch.float32, device=r.device)
        grid = (p.images * self._by_patches.tiles, self.patch_parts)
        sizes = (*span, r.stride(0), self.d_v.stride(0))
        keywords = pair_keywords(p) | self._by_patches.keywords() | {"ACCUMULATE": span[0] > 0}
        if p.pooling != "context":  # one segment
            del keywords["SEG1"], keywords["SEG2"]
        if p.pooling == "max":
            _max_bwd_patches_kernel[grid](rows, bounds, stat, self.g, self.d_v, *sizes, **keywords)
            return
        inputs, made = self._given(r, stat)
        is_context = p.pooling == "context"
        by_patch = _context_bwd_patches_kernel if is_context else _pair_bwd_patches_kernel
        by_patch[grid](rows, *inputs, *made, self.d_v, *sizes, **keywords)

    def _given(self, r: Tensor, stat: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """What kernels of both passes read, rows apart: inputs, and what was made of them."""
        inputs = [self._tensors[name] for name in ("bounds", "v", "bias", "alpha")]
        if self._p.pooling == "context":
            return inputs, [stat, self.g, self._h, self._turned]
        return inputs, [r, stat, self.g]

    def _turn(self, span: tuple[int, int], r: Tensor, inputs: list[Tensor]) -> None:
        """A context's t of a chunk's rows; overwrites r and g."""
        p, capacity = self._p, (span[1] - span[0]) * self._p.rows_a_text
        blocks = triton.cdiv(capacity, self._turning.block_r)
        shares = min(p.images, triton.cdiv(4 * self._processors, blocks))
        _context_turn_kernel[(blocks, shares)](
            self._tensors["rows"], *inputs, self._turned, *span, p.images, r.stride(0),
            **pair_keywords(p), **self._turning.keywords(),
        )  # fmt: skip


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
    """(d rows [N J, D], d weight [N J], d v [M, P_PAD, D], d alpha [], d gamma []), float32.

    With take_rows d rows is None: that of each chunk of texts is handed to take_rows(d rows, first,
    last) and, in two passes, gone before the chunk's gradient of patches is made.
    """
    like = tensors["v"]
    wide: Any = {"dtype": torch.float32, "device": like.device}
    total_rows = p.texts * p.rows_a_text
    d_weight = torch.zeros(total_rows, **wide)
    d_alpha, d_gamma = torch.zeros((), **wide), torch.zeros((), **wide)
    of_scores = (scores if valid is None else valid, scores, grad)

    is_whole = take_rows is None
    is_kept_here = kept[0].numel() > 0
    chunks = [(0, p.texts)] if is_kept_here else text_chunks(p, is_whole)
    widest = max(last - first for first, last in chunks)
    stats = kept if is_kept_here else _buffers(p, widest, like)
    held_rows = total_rows if is_whole else widest * p.rows_a_text
    g: Tensor | None = None
    way: ProductsBackward | _TwoPasses
    if takes_products(p):
        way = ProductsBackward(p, tensors, widest, want_alpha, chip_facts(like.device))
    else:
        way = _TwoPasses(p, tensors, widest, want_alpha, (is_whole, len(chunks) == 1))
        g = way.g
    d_rows: Tensor | None = None
    for span in chunks:
        first, last = span
        row_base = 0 if is_whole else first * p.rows_a_text
        if d_rows is None:  # zeros: rows of weight 0 are never written
            d_rows = torch.zeros((way.row_parts, held_rows, p.dim), **wide)
        if not is_kept_here:
            _pair_fwd(p, tensors, first, last, stats)
        d_gamma += aggregate_bwd(p, tensors, of_scores, stats[0], d_weight, span, g)
        d_alpha += way.run(stats, of_scores, d_rows, span, row_base)
        if take_rows is not None:
            take_rows(_ordered_sum(d_rows[:, : (last - first) * p.rows_a_text]), first, last)
            d_rows = None  # its memory serves the gradient of patches
        way.finish(stats, span)
    rows_grad = None if d_rows is None else _ordered_sum(d_rows)
    return rows_grad, d_weight, _ordered_sum(way.d_v), d_alpha, d_gamma
