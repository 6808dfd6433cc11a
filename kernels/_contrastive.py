"""Symmetric InfoNCE over row chunks of a logit matrix, in the positive-excluded form.

loss = mean over anchors of 1/2 [softplus(R_m - z_mm) + softplus(C_m - z_mm)], R and C being the
log-sum-exp over an anchor's negatives only. The usual softmax-minus-one gradient of the positive
cancels to nothing in float32 once a batch is confident; sigmoid(R - z) does not (README, derivation
1). Nothing here knows where the logits come from: the ops hand in chunks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mlip.kernels._distributed import (
    Group,
    gather,
    group_rank,
    group_size,
    row_counts,
)
from mlip.kernels._scalars import require_tensor

# rows are taken in chunks of at most this many logits: temporaries of 4 MB each, as fast as larger
CHUNK_ELEMENTS = 2**20

ChunkOfLogits = Callable[[int, int], Tensor]


@dataclass(frozen=True)
class Pairing:
    """Which image belongs to which text, over all ranks; images [M] here, texts [N] everywhere."""

    counts: list[int]
    offset: int  # column of this rank's first pair
    ids: Tensor | None  # [N] equal = never each other's negatives
    image_valid: Tensor | None  # [M]
    text_valid: Tensor | None  # [N]
    anchor: Tensor | None  # [N] both halves valid; None = all
    weight: Tensor  # [N] 1 / (2 * number of anchors) for anchors, else 0


def make_pairing(
    like: Tensor,
    pair_ids: Tensor | None,
    image_valid: Tensor | None,
    text_valid: Tensor | None,
    group: Group,
) -> Pairing:
    """Gather what the loss must know about every pair.

    Shapes:  like [M, ...] gives rows, device and dtype; the masks are this rank's, [M]
    """
    rows = like.shape[0]
    for name, value, dtype in (
        ("pair_ids", pair_ids, torch.int64),
        ("image_valid", image_valid, torch.bool),
        ("text_valid", text_valid, torch.bool),
    ):
        if value is None:
            continue
        require_tensor(name, value)
        if tuple(value.shape) != (rows,) or value.dtype != dtype or value.device != like.device:
            raise ValueError(
                f"expected {name} {dtype} of shape [{rows}], one entry per pair of this rank, on "
                f"{like.device}, got {value.dtype} {list(value.shape)} on {value.device}"
            )
    came = {
        "pair_ids": pair_ids is not None,
        # what token_knowledge_patch_loss makes them of
        "image_valid (or patch_mask)": image_valid is not None,
        "text_valid (or token_weights)": text_valid is not None,
    }
    counts = row_counts(like.new_empty((rows, 0)), group, came)
    size, rank = group_size(group), group_rank(group)
    total = sum(counts)

    ids, images, texts = pair_ids, image_valid, text_valid
    given = [x.long() for x in (ids, images, texts) if x is not None]
    if size > 1 and given:
        # one exchange for all three: to a small batch the number of exchanges is what costs
        columns = list(gather(torch.stack(given, 1), group, counts).unbind(1))
        texts = None if texts is None else columns.pop().bool()
        images = None if images is None else columns.pop().bool()
        ids = None if ids is None else columns.pop()
    anchor: Tensor | None = None
    if image_valid is not None or text_valid is not None:
        both = [x for x in (images, texts) if x is not None]
        anchor = both[0] if len(both) == 1 else both[0] & both[1]
        count = anchor.sum().clamp(min=1).to(like.dtype)
        weight = anchor.to(like.dtype) * (0.5 / count)
    else:
        weight = like.new_full((total,), 0.5 / max(total, 1))
    return Pairing(counts, sum(counts[:rank]), ids, image_valid, texts, anchor, weight)


@dataclass(frozen=True)
class Statistics:
    """What the backward pass needs beside the logits themselves."""

    row_lse: Tensor  # [..., N] over an image's negatives
    column_lse: Tensor  # [..., N] over a text's negatives
    positive: Tensor  # [..., N]

    def __getitem__(self, index: int) -> Statistics:
        return Statistics(self.row_lse[index], self.column_lse[index], self.positive[index])


def chunk_bounds(rows: int, columns: int) -> list[tuple[int, int]]:
    if rows * columns <= CHUNK_ELEMENTS:
        # asked first: to torch.compile a condition on a size of any value, where a loop over
        # chunks fixes the size and a batch of another one is compiled again
        return [(0, rows)]
    step = max(1, CHUNK_ELEMENTS // columns)
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def _mask_in_place(z: Tensor, start: int, pairing: Pairing) -> Tensor:
    """Set whatever is no negative to -inf."""
    count = z.shape[0]
    first = pairing.offset + start
    if pairing.ids is not None:
        z.masked_fill_(pairing.ids[first : first + count, None] == pairing.ids, -torch.inf)
    if pairing.text_valid is not None:
        z.masked_fill_(~pairing.text_valid, -torch.inf)
    if pairing.image_valid is not None:
        z.masked_fill_(~pairing.image_valid[start : start + count, None], -torch.inf)
    z.diagonal(first).fill_(-torch.inf)
    return z


def logsumexp_statistics(
    chunk: ChunkOfLogits, rows: int, pairing: Pairing
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-sum-exps over negatives of rows [M] and columns [N], this rank's part; positives [M].

    chunk:   chunk(start, stop) gives fresh logits [stop - start, N] that may be overwritten
    """
    row_parts: list[Tensor] = []
    positive_parts: list[Tensor] = []
    column: Tensor | None = None
    for start, stop in chunk_bounds(rows, pairing.weight.shape[0]):
        z = chunk(start, stop)
        positive_parts.append(z.diagonal(pairing.offset + start).clone())
        _mask_in_place(z, start, pairing)
        row_parts.append(torch.logsumexp(z, 1))
        part = torch.logsumexp(z, 0)
        column = part if column is None else torch.logaddexp(column, part)
    assert column is not None  # a rank without pairs has one chunk, of no row
    return torch.cat(row_parts), column, torch.cat(positive_parts)


def over_ranks(
    row: Tensor, column: Tensor, positive: Tensor, pairing: Pairing, group: Group
) -> Statistics:
    """Statistics of the whole batch from this rank's rows and its part of the columns.

    Shapes:  row and positive [..., M], column [..., N], of any number of losses at once
    """
    counts = pairing.counts
    size, longest = len(counts), max(counts)
    if size > 1:
        # all three in one exchange, as wide as the longest rank
        pad = (0, longest - row.shape[-1])
        mine = torch.cat([F.pad(row, pad), F.pad(positive, pad), column], -1)
        parts = gather(mine[None], group, [1] * size)
        ranks = range(size)
        row = torch.cat([parts[r, ..., : counts[r]] for r in ranks], -1)
        positive = torch.cat([parts[r, ..., longest : longest + counts[r]] for r in ranks], -1)
        # added in rank order, so that every rank holds the same bits
        column = torch.logsumexp(parts[..., 2 * longest :], 0)
    if pairing.anchor is not None:
        # the score of a pair that is no anchor weighs nothing, and may be NaN
        positive = torch.where(pairing.anchor, positive, torch.zeros_like(positive))
    return Statistics(row, column, positive)


def loss_value(stats: Statistics, pairing: Pairing) -> Tensor:
    """The global losses [...], the same bits on every rank."""
    # torch's own threshold of 20 would cost float64 its digits
    row_terms = F.softplus(stats.row_lse - stats.positive, threshold=40.0) * pairing.weight
    column_terms = F.softplus(stats.column_lse - stats.positive, threshold=40.0) * pairing.weight
    return row_terms.sum(-1) + column_terms.sum(-1)


def own_rows(x: Tensor, rows: int, pairing: Pairing) -> Tensor:
    """This rank's entries of [..., N]."""
    return x[..., pairing.offset : pairing.offset + rows]


def pull(stats: Statistics, pairing: Pairing, rows: int) -> tuple[Tensor, Tensor]:
    """How strongly each anchor still pulls: sigmoid(lse - positive) * weight, [M] and [N]."""
    row = torch.sigmoid(stats.row_lse - stats.positive) * pairing.weight
    column = torch.sigmoid(stats.column_lse - stats.positive) * pairing.weight
    return own_rows(row, rows, pairing), column


def center(stats: Statistics, pairing: Pairing, logit_scale: Tensor) -> Tensor:
    """The mean score of the anchors [], the same bits on every rank.

    Gradients of all logits of all ranks sum to 0, so d logit_scale may be taken from scores less
    any one number: near one that they are all close to, a batch that has nearly collapsed loses no
    digits.
    """
    mean = 2.0 * (stats.positive * pairing.weight).sum(-1) / logit_scale
    return torch.where(logit_scale == 0, torch.zeros_like(mean), mean)


def finite(lse: Tensor) -> Tensor:
    """An anchor without negatives has lse = -inf; with any finite value exp(-inf - lse) is 0."""
    return lse.clamp(min=torch.finfo(lse.dtype).min)


def logits_gradient(
    z: Tensor, start: int, stats: Statistics, pulls: tuple[Tensor, Tensor], pairing: Pairing
) -> Tensor:
    """d loss / d logits of a chunk, overwriting the logits `z` [c, N]."""
    stop = start + z.shape[0]
    first = pairing.offset + start
    row_pull, column_pull = pulls
    row_lse = finite(stats.row_lse[first : first + stop - start])
    column_lse = finite(stats.column_lse)
    _mask_in_place(z, start, pairing)
    grad = torch.exp(z - row_lse[:, None]).mul_(row_pull[start:stop, None])
    grad.add_(z.sub_(column_lse).exp_().mul_(column_pull))
    pulled = row_pull[start:stop] + column_pull[first : first + stop - start]
    grad.diagonal(first).copy_(pulled.neg_())
    return grad
