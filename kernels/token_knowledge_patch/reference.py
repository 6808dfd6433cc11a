"""Token-knowledge-patch scores in plain torch: any device, float32 or float64 inside.

The definition of correct for the Triton kernels, and product code for CPUs and old GPUs; how texts
become rows is in rows_reference.py. Pairs are taken in tiles; similarities are kept for the
backward pass while they fit half of what unit rows leave of MEMORY_BUDGET_BYTES, else made again
tile by tile. The backward formulas are derivations 2 and 3 of the README.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mlip.kernels._autograd import no_second_derivative
from mlip.kernels._scalars import has_values, widest_dtype
from mlip.kernels.token_knowledge_patch.rows_reference import prepare_rows

MEMORY_BUDGET_BYTES = 512 * 2**20
# similarities of a tile: on a CPU a tile and its temporaries should stay in the cache
CPU_TILE_ELEMENTS = 2**19
GPU_TILE_ELEMENTS = 2**24
CONTEXT_FLOOR = 1e-6
# |similarity| <= 1: up to this scale exp() neither overflows nor leaves the normal float32 range
UNSHIFTED_SCALE = 75.0


def prepare_rows_in_budget(tokens_NTD: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """prepare_rows, in checkpointed chunks of texts where its temporaries would be large."""
    knowledge, u, s, mask, scale, gain, share, dtype = rest
    texts = tokens_NTD.shape[0]
    entities = 0 if knowledge is None else knowledge.shape[1]
    per_text = (tokens_NTD.shape[1] + entities) * tokens_NTD.shape[2]
    # about eight copies of the rows are alive in prepare_rows, which may take an eighth
    step = max(1, MEMORY_BUDGET_BYTES // max(1, 64 * per_text * dtype.itemsize))
    if step >= texts:
        return prepare_rows(tokens_NTD, *rest)

    def cut(x: Tensor | None, start: int) -> Tensor | None:
        return None if x is None else x[start : start + step]

    parts = [
        checkpoint(
            prepare_rows,
            tokens_NTD[start : start + step],
            *(cut(x, start) for x in (knowledge, u, s, mask)),
            scale,
            gain,
            share,
            dtype,
            use_reentrant=False,
        )
        for start in range(0, texts, step)
    ]
    return torch.cat([rows for rows, _ in parts]), torch.cat([weight for _, weight in parts])


@dataclass(frozen=True)
class Spec:
    """What does not carry a gradient."""

    pooling: str
    aggregation: str
    shift: bool  # subtract the row maximum before exp
    bounds: list[int]  # rows of text n are bounds[n] .. bounds[n + 1]
    text_of_row: Tensor  # [R]
    patch_mask: Tensor | None  # [M, P]
    images: int
    patches: int
    width: int  # numbers of the widest temporary of one row and image: patches, or D for contexts
    is_tracked: bool  # a backward pass may come


@dataclass
class Tile:
    texts: slice
    images: slice
    rows: slice
    kept: tuple[Tensor, ...] | None = None  # similarities or argmax, then row statistics


def _tiles(spec: Spec, budget_elements: int, on_cpu: bool) -> Iterator[Tile]:
    limit = min(CPU_TILE_ELEMENTS if on_cpu else GPU_TILE_ELEMENTS, budget_elements)
    texts, per_row = len(spec.bounds) - 1, spec.images * spec.width
    first = 0
    while first < texts:
        last = first + 1
        while last < texts and (spec.bounds[last + 1] - spec.bounds[first]) * per_row <= limit:
            last += 1
        rows = slice(spec.bounds[first], spec.bounds[last])
        count = max(1, rows.stop - rows.start)
        step = max(1, limit // max(1, count * spec.width))
        for start in range(0, spec.images, step):
            yield Tile(slice(first, last), slice(start, min(start + step, spec.images)), rows)
        first = last


def _tile_budget_bytes(rows_RD: Tensor, patch_MPD: Tensor) -> int:
    """What tiles and kept similarities may take beside the unit rows and their gradients."""
    copies = 4 * rows_RD.element_size() * (rows_RD.numel() + patch_MPD.numel())
    return max(MEMORY_BUDGET_BYTES - copies, MEMORY_BUDGET_BYTES // 4)


def _softmax_terms(s: Tensor, spec: Spec, tile: Tile, alpha: Tensor) -> Tensor:
    """exp(alpha s), up to a factor per row, zero where the patch is masked."""
    weights = s * alpha
    mask = None if spec.patch_mask is None else spec.patch_mask[tile.images]
    if spec.shift:
        if mask is not None:
            weights = weights.masked_fill_(~mask, torch.finfo(s.dtype).min)
        weights.sub_(weights.amax(-1, keepdim=True))
    weights.exp_()
    return weights if mask is None else weights.mul_(mask)


def _similarities(rows_RD: Tensor, patch_MPD: Tensor, tile: Tile) -> Tensor:
    v = patch_MPD[tile.images]
    return (rows_RD[tile.rows] @ v.reshape(-1, v.shape[2]).T).view(-1, v.shape[0], v.shape[1])


def _contexts(a: Tensor, v: Tensor) -> Tensor:
    return torch.bmm(a.transpose(0, 1), v)  # [m, R, D]


def _pool(s: Tensor, patch_MPD: Tensor, spec: Spec, tile: Tile, alpha: Tensor):
    """r of a tile [R, m], and what backward wants beside the similarities."""
    if spec.pooling == "max":
        if spec.patch_mask is not None:
            s = s.masked_fill(~spec.patch_mask[tile.images], -2.0)  # below any cosine
        r, where = s.max(-1)  # documented to return the first of equal maxima
        return r, (where, r)
    e = _softmax_terms(s, spec, tile, alpha)
    total = e.sum(-1)
    total = torch.where(total > 0, total, torch.ones_like(total))
    if spec.pooling == "attention":
        r = e.mul_(s).sum(-1).div_(total)
        return r, (total, r)
    e.div_(total[..., None])
    rho = torch.linalg.vector_norm(_contexts(e, patch_MPD[tile.images]), dim=-1).T
    r = e.mul_(s).sum(-1).div_(rho.clamp(min=CONTEXT_FLOOR))
    return r, (total, r)


def _aggregate(r: Tensor, weight: Tensor, seg: Tensor, texts: int, spec: Spec, gamma: Tensor):
    """S of a tile [texts, m] from r [R, m]."""
    out = r.new_zeros((texts, r.shape[1]))
    if spec.aggregation == "mean":
        return out.index_add_(0, seg, r * weight[:, None])
    x = torch.where(weight[:, None] > 0, r * gamma, -torch.inf)
    top = torch.full_like(out, -torch.inf)
    top.scatter_reduce_(0, seg[:, None].expand_as(x), x, "amax")
    top = torch.where(top > -torch.inf, top, torch.zeros_like(top))
    out.index_add_(0, seg, weight[:, None] * torch.exp(x - top[seg]))
    # 0 where no row weighs anything; NaN stays NaN
    return torch.where(out == 0, torch.zeros_like(out), (top + torch.log(out)) / gamma)


def _aggregate_backward(grad, score, r, weight, seg, spec: Spec, gamma):
    """(d r [R, m], d weight [R], d gamma) from d S [texts, m]."""
    grad_r = grad[seg]
    if spec.aggregation == "mean":
        return grad_r * weight[:, None], (grad_r * r).sum(1), None
    power = torch.exp(torch.where(weight[:, None] > 0, (r - score[seg]) * gamma, -torch.inf))
    pulled = grad_r * power
    d_r = pulled * weight[:, None]
    # d r of a text's rows sums to its d S
    d_gamma = (d_r * (r - score[seg])).sum(dtype=widest_dtype(r.device)) / gamma
    return d_r, pulled.sum(1) / gamma, d_gamma


def _pool_backward(g, tile, patch_MPD, spec, alpha, wants_alpha):
    """d similarity [R, m, P] from d r `g` [R, m]; d alpha; and the context's own d patches."""
    v = patch_MPD[tile.images]
    assert tile.kept is not None
    if spec.pooling == "max":
        where, _ = tile.kept
        ds = g.new_zeros((*g.shape, v.shape[1]))
        return ds.scatter_(2, where[..., None], g[..., None]), None, None
    s, total, r = tile.kept
    e = _softmax_terms(s, spec, tile, alpha)
    if spec.pooling == "attention":
        # g over the total, up to P e^75, would leave float32 at either end
        e.div_(total[..., None])
        d_alpha = None
        if wants_alpha:
            # centred: the mean of squares less the square of the mean would lose two digits
            spread = (s - r[..., None]).square_().mul_(e).sum(-1)
            d_alpha = (g * spread).sum(dtype=widest_dtype(g.device))
        ds = torch.addcmul((g * (1 - alpha * r))[..., None], s, (g * alpha)[..., None])
        return ds.mul_(e), d_alpha, None
    a = e.div_(total[..., None])
    context = _contexts(a, v)  # [m, R, D]
    rho = torch.linalg.vector_norm(context, dim=-1).T
    free = (rho > CONTEXT_FLOOR).to(g.dtype)
    rho = rho.clamp(min=CONTEXT_FLOOR)
    pull = (free * r / rho)[..., None]
    y = torch.bmm(context, v.mT).transpose(0, 1)
    dl = (s - pull * y).div_(rho[..., None]).sub_(((1 - free) * r)[..., None])
    dl.mul_(a).mul_(g[..., None])
    d_alpha = None
    if wants_alpha:
        # centred: dl of a row sums to 0, so its mean similarity may go, which nearly all of s is
        # where patches are alike
        d_alpha = (dl * (s - (r * rho)[..., None])).sum(dtype=widest_dtype(g.device))
    k = a * (-g * free * r / rho.square())[..., None]
    d_patch = torch.bmm(k.permute(1, 2, 0), context)  # [m, P, D]
    return dl.mul_(alpha).add_(a.mul_((g / rho)[..., None])), d_alpha, d_patch


def _to_keep(s: Tensor, extra: tuple[Tensor, ...], spec: Spec) -> tuple[Tensor, ...]:
    return extra if spec.pooling == "max" else (s, *extra)


class _PairScores(torch.autograd.Function):
    """S [M, N] from rows [R, D], weights [R] and patches [M, P, D], tile by tile."""

    @staticmethod
    def forward(ctx: Any, rows_RD, weight_R, patch_MPD, alpha, gamma, spec: Spec) -> Tensor:
        element = rows_RD.element_size()
        budget = _tile_budget_bytes(rows_RD, patch_MPD) // element
        pairs = rows_RD.shape[0] * spec.images
        # an int64 argmax and r, or similarities with two statistics of each row
        stored = pairs * (8 // element + 1) if spec.pooling == "max" else pairs * (spec.patches + 2)
        keep = spec.is_tracked and stored <= budget // 2
        scores = rows_RD.new_zeros((spec.images, len(spec.bounds) - 1))
        tiles = []
        # a tile has up to eight temporaries of its own size: a quarter of the budget
        for tile in _tiles(spec, budget // 32, rows_RD.device.type == "cpu"):
            s = _similarities(rows_RD, patch_MPD, tile)
            r, extra = _pool(s, patch_MPD, spec, tile, alpha)
            if keep:
                tile.kept = _to_keep(s, extra, spec)
            tiles.append(tile)
            seg = spec.text_of_row[tile.rows] - tile.texts.start
            count = tile.texts.stop - tile.texts.start
            part = _aggregate(r, weight_R[tile.rows], seg, count, spec, gamma)
            scores[tile.images, tile.texts] = part.T
        if spec.patch_mask is not None:
            scores = torch.where(spec.patch_mask.any(1)[:, None], scores, 0.0)
        # through save_for_backward, so that autograd frees them as soon as backward is done
        kept = [x for tile in tiles for x in tile.kept or ()]
        # the mask as well: changed in place before the backward pass it is torch's error
        ctx.save_for_backward(
            rows_RD, weight_R, patch_MPD, alpha, gamma, scores, spec.patch_mask, *kept
        )
        ctx.spec = replace(spec, patch_mask=None)
        ctx.tiles = [replace(tile, kept=None) for tile in tiles]
        return scores

    @staticmethod
    @no_second_derivative
    def backward(ctx: Any, grad: Tensor):
        rows_RD, weight_R, patch_MPD, alpha, gamma, scores, mask, *kept = ctx.saved_tensors
        spec: Spec = replace(ctx.spec, patch_mask=mask)
        each = len(kept) // len(ctx.tiles)
        if mask is not None:
            grad = torch.where(mask.any(1)[:, None], grad, 0.0)
        d_rows, d_weight = torch.zeros_like(rows_RD), torch.zeros_like(weight_R)
        # in rows whatever the strides of patches, which may be a grid of features turned around
        d_patch = torch.zeros_like(patch_MPD, memory_format=torch.contiguous_format)
        # the scales' terms nearly cancel over all pairs: summed in float64 whatever the inputs
        wide = widest_dtype(grad.device)
        d_alpha, d_gamma = (torch.zeros_like(x, dtype=wide) for x in (alpha, gamma))
        for index, tile in enumerate(ctx.tiles):
            seg = spec.text_of_row[tile.rows] - tile.texts.start
            g_tile = grad[tile.images, tile.texts].T
            score = scores[tile.images, tile.texts].T
            if kept:
                held = tuple(kept[index * each : (index + 1) * each])
            else:
                s = _similarities(rows_RD, patch_MPD, tile)
                held = _to_keep(s, _pool(s, patch_MPD, spec, tile, alpha)[1], spec)
            tile, r = replace(tile, kept=held), held[-1]
            g, dw, dg = _aggregate_backward(g_tile, score, r, weight_R[tile.rows], seg, spec, gamma)
            d_weight[tile.rows] += dw
            if dg is not None:
                d_gamma += dg
            ds, da, context_grad = _pool_backward(
                g, tile, patch_MPD, spec, alpha, ctx.needs_input_grad[3]
            )
            if da is not None:
                d_alpha += da
            ds = ds.flatten(1)
            v = patch_MPD[tile.images].reshape(-1, patch_MPD.shape[2])
            d_rows[tile.rows].addmm_(ds, v)
            own = d_patch[tile.images]
            own.view(-1, own.shape[2]).addmm_(ds.T, rows_RD[tile.rows])
            if context_grad is not None:
                own += context_grad
        d_alpha, d_gamma = d_alpha.to(alpha.dtype), d_gamma.to(gamma.dtype)
        return d_rows, d_weight, d_patch, d_alpha, d_gamma, None


def pair_scores(
    rows_NJD: Tensor,
    weight_NJ: Tensor,
    patch_MPD: Tensor,
    patch_mask_MP: Tensor | None,
    alpha: Tensor,
    gamma: Tensor,
    *,
    pooling: str,
    aggregation: str,
) -> Tensor:
    """S [M, N] of prepared rows against unit patches.

    Shapes:  rows [N, J, D], weights [N, J], patches [M, P, D] unit length or zero, mask [M, P]
    On a CPU rows of weight 0 are dropped before any arithmetic: padding costs nothing.
    """
    texts, rows_a_text, dim = rows_NJD.shape
    images, patches = patch_MPD.shape[:2]
    rows_RD, weight_R = rows_NJD.reshape(-1, dim), weight_NJ.reshape(-1)
    # torch.export has no values, and a graph of it no shapes that hang on them
    reads = has_values(rows_NJD)
    if reads:
        real = ~(weight_R.detach() <= 0)  # a weight of NaN is to be seen in the score
        lengths = real.view(texts, rows_a_text).sum(1)
        bounds = [0, *torch.cumsum(lengths, 0).tolist()]
        index = real.nonzero()[:, 0]
        if index.shape[0] < real.shape[0]:
            rows_RD, weight_R = rows_RD[index], weight_R[index]
        text_of_row = torch.div(index, max(rows_a_text, 1), rounding_mode="floor")
    else:
        bounds = list(range(0, texts * rows_a_text + 1, max(rows_a_text, 1)))
        text_of_row = torch.arange(texts * rows_a_text, device=rows_NJD.device)
        text_of_row = torch.div(text_of_row, max(rows_a_text, 1), rounding_mode="floor")
    # reading a scale on the GPU would synchronise, so there the maximum is always subtracted
    shift = not reads or float(alpha.detach()) > UNSHIFTED_SCALE
    width = max(patches, dim) if pooling == "context" else patches
    # asked here: inside a Function gradients are off, and of a leaf needs_input_grad is true even
    # under no_grad
    made = (rows_RD, weight_R, patch_MPD, alpha, gamma)
    is_tracked = torch.is_grad_enabled() and any(x.requires_grad for x in made)
    spec = Spec(
        pooling, aggregation, shift, bounds, text_of_row, patch_mask_MP, images, patches, width,
        is_tracked,
    )  # fmt: skip
    return _PairScores.apply(rows_RD, weight_R, patch_MPD, alpha, gamma, spec)
