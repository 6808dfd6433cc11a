"""The rows of positive weight one behind another: padding then costs the pair kernels nothing."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mlip.kernels.token_knowledge_patch.tiling import ROW_TAIL, block_dim

BLOCK_ROWS = 32


@triton.jit
def _counts(weight):
    return (weight > 0) | (weight != weight)  # NaN is packed, to be seen in the score


@triton.jit
def _count_rows_kernel(weight_ptr, count_ptr, rows, BLOCK_J: tl.constexpr):
    """count[n + 1] = rows of positive weight of text n; count[0] = 0."""
    n = tl.program_id(0)
    offs_j = tl.arange(0, BLOCK_J)
    weight = tl.load(weight_ptr + n.to(tl.int64) * rows + offs_j, mask=offs_j < rows, other=0.0)
    tl.store(count_ptr + n + 1, tl.sum(_counts(weight).to(tl.int32), 0))
    if n == 0:
        tl.store(count_ptr, 0)


@triton.jit
def _pack_rows_kernel(
    rows_ptr, weight_ptr, bounds_ptr, packed_ptr, index_ptr, text_ptr, texts, rows,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_J: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Text n's rows of positive weight from row bounds[n] on; a last program clears the tail."""
    n = tl.program_id(0)
    offs_d = tl.arange(0, BLOCK_D)
    in_d = (offs_d < DIM)[None, :]
    base = tl.load(bounds_ptr + n)
    if n == texts:
        for first in range(0, TAIL, BLOCK_J):
            to = (base + first + tl.arange(0, BLOCK_J)).to(tl.int64)
            nothing = tl.zeros([BLOCK_J, BLOCK_D], packed_ptr.dtype.element_ty)
            tl.store(packed_ptr + to[:, None] * DIM + offs_d[None, :], nothing, mask=in_d)
        return
    for first in range(0, rows, BLOCK_J):
        offs_j = first + tl.arange(0, BLOCK_J)
        row = n.to(tl.int64) * rows + offs_j
        real = _counts(tl.load(weight_ptr + row, mask=offs_j < rows, other=0.0))
        to = (base + tl.cumsum(real.to(tl.int32), 0) - 1).to(tl.int64)
        tl.store(index_ptr + to, row.to(tl.int32), mask=real)
        tl.store(text_ptr + to, n, mask=real)
        mask = real[:, None] & in_d
        x = tl.load(rows_ptr + row[:, None] * DIM + offs_d[None, :], mask=mask, other=0.0)
        tl.store(packed_ptr + to[:, None] * DIM + offs_d[None, :], x, mask=mask)
        base += tl.sum(real.to(tl.int32), 0)


def pack_rows(rows_NJD: Tensor, weight_NJ: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(packed [N J + ROW_TAIL, D], index [N J], text [N J], bounds [N + 1]): the rows of positive
    weight one behind another, in order, and where each came from.

    Entries past bounds[N] are not written and never used, except that a row tile of a pair kernel
    may reach past the last row: ROW_TAIL rows of zeros follow it. Nothing is read on the host.
    """
    texts, rows, dim = rows_NJD.shape
    rows_NJD, weight_NJ = rows_NJD.contiguous(), weight_NJ.contiguous()
    numbers: dict[str, Any] = {"dtype": torch.int32, "device": weight_NJ.device}
    counts = torch.empty(texts + 1, **numbers)
    _count_rows_kernel[(texts,)](weight_NJ, counts, rows, BLOCK_J=triton.next_power_of_2(rows))
    bounds = torch.cumsum(counts, 0, dtype=torch.int32)
    packed = rows_NJD.new_empty((texts * rows + ROW_TAIL, dim))
    index = torch.empty(texts * rows, **numbers)
    text = torch.empty_like(index)
    _pack_rows_kernel[(texts + 1,)](
        rows_NJD, weight_NJ, bounds, packed, index, text, texts, rows,
        DIM=dim, BLOCK_D=block_dim(dim), BLOCK_J=BLOCK_ROWS, TAIL=ROW_TAIL,
    )  # fmt: skip
    return packed, index, text, bounds
