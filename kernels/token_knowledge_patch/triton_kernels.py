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
from mlip.kernels.token_knowledge_patch.tiling import (
    Problem,
    block_dim,
    choose_tiling,
    chunk_bytes,
    is_kept,
    text_chunks,
    workspace_bytes,
)

# r and statistic of a chunk of texts where no backward pass will come
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
    limit, processors = chip_facts(r.device)
    tiling = choose_tiling("forward", p.patches, block_dim(p.dim), p.size, limit, p.pooling)
    tiles = triton.cdiv((last - first) * p.rows_a_text, tiling.block_r)
    # eight programs a multiprocessor, each with at least four row tiles to keep its patches busy
    groups = min(max(1, tiles // 4), max(1, triton.cdiv(8 * processors, p.images)))
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

    tensors: rows [N J + ROW_TAIL, D], index, text and bounds of pack_rows, weight [N J],
             v [M, P_PAD, D], bias [M, P_PAD], alpha [1], gamma [1]; valid [M] int8 or None
    """
    keep = keep and is_kept(p)
    chunks = [(0, p.texts)]
    if not keep:
        # without a backward pass to come, smaller chunks: r is summed at once and dropped
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
    valid: Tensor | None,
    scores: Tensor,
    grad: Tensor,
    r: Tensor,
    out: tuple[Tensor, Tensor, Tensor],
    first: int,
    last: int,
) -> Tensor:
    """Writes g = dS dS/dr and h = g r of texts first .. last [M, stride], and d weight [N J].

    Returns their part of d gamma [].
    """
    blocks = triton.cdiv((last - first) * p.rows_a_text, 64)
    parts = torch.empty(blocks, dtype=torch.float32, device=r.device)
    _aggregate_bwd_kernel[(blocks,)](
        r,
        tensors["weight"],
        tensors["index"],
        tensors["text"],
        tensors["bounds"],
        scores if valid is None else valid,
        tensors["gamma"],
        scores,
        grad,
        *out,
        parts,
        first,
        last,
        p.images,
        r.stride(0),
        scores.stride(0),
        HAS_VALID=valid is not None,
        LSE=p.aggregation == "lse",
        BLOCK_M=16,
        BLOCK_R=64,
    )
    return parts.sum() / tensors["gamma"][0] if p.aggregation == "lse" else parts.new_zeros(())


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

    With take_rows d rows is None: each chunk of texts is handed to take_rows(d rows, first, last)
    and its buffer used again.
    """
    like = tensors["v"]
    wide: Any = {"dtype": torch.float32, "device": like.device}
    limit, processors = chip_facts(like.device)
    block_d = block_dim(p.dim)
    by_rows = choose_tiling("backward_rows", p.patches, block_d, p.size, limit, p.pooling)
    by_patches = choose_tiling("backward_patches", p.patches, block_d, p.size, limit, p.pooling)
    total_rows = p.texts * p.rows_a_text
    d_weight = torch.zeros(total_rows, **wide)
    d_alpha, d_gamma = torch.zeros((), **wide), torch.zeros((), **wide)

    is_whole = take_rows is None
    chunks = text_chunks(p, is_whole) if kept[0].numel() == 0 else [(0, p.texts)]
    widest = max(last - first for first, last in chunks)
    g = torch.empty((p.images, p.stride(widest)), **wide)
    h = torch.empty_like(g)
    turned = torch.empty(
        (*g.shape, p.dim) if p.pooling == "context" else 1, dtype=like.dtype, device=like.device
    )
    stats = kept if kept[0].numel() else _buffers(p, widest, like)

    programs = triton.cdiv(widest * p.rows_a_text, by_rows.block_r)
    # for partial sums, the rows' first
    spare = workspace_bytes(p, is_whole) - chunk_bytes(p, widest, is_whole)
    held_rows = total_rows if is_whole else widest * p.rows_a_text
    part_bytes = held_rows * p.dim * 4
    most = MOST_PARTS
    if len(chunks) > 1 and not is_whole:
        most, spare = MOST_PARTS_OF_A_CHUNK, max(spare, PARTIAL_FLOOR_BYTES)
    row_groups = min(p.images, _groups(programs, 2 * processors, part_bytes, spare, most))
    spare -= (row_groups - 1) * part_bytes
    d_rows = torch.zeros((row_groups, held_rows, p.dim), **wide)
    programs = p.images * by_patches.tiles
    patch_groups = _groups(programs, 2 * processors, like.numel() * 4, spare)
    if len(chunks) > 1:
        patch_groups = 1  # many chunks are many rows: the images alone fill the chip
    d_v = torch.empty((patch_groups, *like.shape), **wide)

    for first, last in chunks:
        if first > 0 and not is_whole:
            d_rows.zero_()  # rows of weight 0 are never written
        if not kept[0].numel():
            _pair_fwd(p, tensors, first, last, stats)
        r, stat = stats
        d_gamma += aggregate_bwd(p, tensors, valid, scores, grad, r, (g, h, d_weight), first, last)
        grid = (triton.cdiv((last - first) * p.rows_a_text, by_rows.block_r), row_groups)
        alpha_parts = torch.zeros(grid[0] * grid[1] if want_alpha else 1, **wide)
        row_base = 0 if is_whole else first * p.rows_a_text
        span, across = (first, last), r.stride(0)
        row_sizes = (*span, row_base, p.images, across, d_rows.stride(0))
        patch_grid = (p.images * by_patches.tiles, patch_groups)
        patch_sizes = (*span, across, d_v.stride(0))
        rows, index, bounds, v = (tensors[name] for name in ("rows", "index", "bounds", "v"))
        if p.pooling == "max":
            _max_bwd_rows_kernel[grid](
                index, bounds, v, stat, g, d_rows, *row_sizes,
                P_PAD=p.padded, DIM=p.dim, BLOCK_D=block_d, BLOCK_R=by_rows.block_r,
                num_warps=by_rows.warps,
            )  # fmt: skip
            _max_bwd_patches_kernel[patch_grid](
                rows, bounds, stat, g, d_v, *patch_sizes,
                ACCUMULATE=first > 0, **pair_keywords(p), **by_patches.keywords(),
            )  # fmt: skip
        else:
            made = [stat, g, h]
            inputs = [bounds, v, tensors["bias"], tensors["alpha"]]
            by_row, by_patch = _pair_bwd_rows_kernel, _pair_bwd_patches_kernel
            if p.pooling == "context":
                turning = choose_tiling("turn", p.patches, block_d, p.size, limit, p.pooling)
                blocks = triton.cdiv((last - first) * p.rows_a_text, turning.block_r)
                shares = min(p.images, triton.cdiv(4 * processors, blocks))
                _context_turn_kernel[(blocks, shares)](
                    rows, *inputs, r, *made, turned, *span, p.images, across,
                    **pair_keywords(p), **turning.keywords(),
                )  # fmt: skip
                made.append(turned)
                by_row, by_patch = _context_bwd_rows_kernel, _context_bwd_patches_kernel
            by_row[grid](
                rows, index, *inputs, *made, d_rows, alpha_parts, *row_sizes,
                WANT_ALPHA=want_alpha, **pair_keywords(p), **by_rows.keywords(),
            )  # fmt: skip
            by_patch[patch_grid](
                rows, *inputs, *made, d_v, *patch_sizes,
                ACCUMULATE=first > 0, **pair_keywords(p), **by_patches.keywords(),
            )  # fmt: skip
        if want_alpha:
            d_alpha += alpha_parts.sum()
        if take_rows is not None:
            take_rows(_ordered_sum(d_rows[:, : (last - first) * p.rows_a_text]), first, last)
    rows_grad = _ordered_sum(d_rows) if is_whole else None
    return rows_grad, d_weight, _ordered_sum(d_v), d_alpha, d_gamma
