"""Launchers of the InfoNCE kernels: tensors in, tensors out; nothing is read on the host.

Memory of M rows against N columns, beside inputs, vectors of M or N numbers, and what is handed out
(d image, and d text in float32), in bytes:

    forward   8 N P,          P = min(ceil(M / 128), 2 x multiprocessors) partial statistics
    backward  C (2 N' + 4 D), C = rows of a chunk, N' = N rounded up to 64: 2 C N' <= DS_BYTES,
                              but at least a row tile of 128, or M where that is less

Both in proportion to N up to their caps, one after the other. Of float32 rows the forward pass has
row tiles of 64, the backward pass takes nothing.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from mlip.kernels._chip import SHARED_MEMORY, Chip, chip_facts
from mlip.kernels._dispatch import is_interpreting
from mlip.kernels._products import wide_product
from mlip.kernels.info_nce.backward_triton_kernels import (
    _info_nce_bwd_kernel,
    _info_nce_ds_kernel,
    _shift_kernel,
)
from mlip.kernels.info_nce.forward_triton_kernels import _info_nce_fwd_kernel, _longest_kernel

LENGTH_SHARES = 128  # programs that look for the longest row
SHIFT_BLOCK = 1024
# of the chunk of gradients that the library multiplies: 2048 rows at N = 65536. Every chunk reads
# and writes all of d text, at D = 512 a third of the traffic of the chunk's own three passes; of
# half the bytes it would be two thirds
DS_BYTES = 2**28
DS_ALIGN = 64  # columns: rows of whole lines of 128 bytes, whatever N is


def _block_dim(dim: int) -> int:
    return max(16, triton.next_power_of_2(dim))


def forward_tiling(dim: int, size: int, chip: Chip) -> dict[str, int]:
    """Tile map of the forward kernel for an element size in bytes.

    Out of tensor memory 128 columns come to registers at once, too many beside their powers.
    """
    if size == 4:
        return {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 8, "num_stages": 2}
    block_k = min(64, _block_dim(dim))
    columns = 64 if chip.has_tensor_memory else 128
    return {"BLOCK_M": 128, "BLOCK_N": columns, "BLOCK_K": block_k, "num_warps": 8, "num_stages": 3}


def backward_tiling() -> dict[str, int]:
    """Tile map of the backward kernel of float32 rows."""
    return {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 8, "num_stages": 1}


def ds_tiling(dim: int, chip: Chip) -> dict[str, int]:
    """Tile map of the kernel of gradients of cosines.

    Of 227 KiB of shared memory two programs share a multiprocessor, so that one multiplies while
    the other makes powers: three stages and 128 registers.
    """
    block_k = min(64, max(16, _block_dim(dim) // 2))
    tiling = forward_tiling(dim, 2, chip) | {"BLOCK_K": block_k, "GROUP": 16}
    return tiling | {"maxnreg": 128} if chip.shared >= SHARED_MEMORY[9, 0] else tiling


def _precision(a: Tensor) -> dict[str, object]:
    # float32 operands: three tf32 products, as exact as float32; bfloat16 ignores it
    return {
        "PRECISION": "tf32x3" if a.dtype == torch.float32 else "ieee",
        "UPCAST": is_interpreting(),
    }


def _merge(top: Tensor, total: Tensor) -> Tensor:
    """Log-sum-exp of partial maxima and sums [S, R], added in order; -inf where all are empty.

    top is overwritten
    """
    if top.shape[0] == 1:
        return top[0] + total[0].log()
    peak = top.amax(0)
    # in place: there is one row of N for every program
    return peak + top.sub_(peak).exp_().mul_(total).sum(0).log()


def info_nce_statistics(
    a: Tensor, b: Tensor, scale: Tensor, ids_a: Tensor | None, ids_b: Tensor | None, offset: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(row log-sum-exp [M], column log-sum-exp [N], both over negatives; positive logit [M]).

    a [M, D], b [N, D] contiguous in one dtype; scale float32 []; row m's positive is column
    offset + m
    """
    rows, dim = a.shape
    columns = b.shape[0]
    chip = chip_facts(a.device)
    processors = chip.processors
    tiling = forward_tiling(dim, a.element_size(), chip)
    blocks = triton.cdiv(rows, tiling["BLOCK_M"])
    # two programs a multiprocessor: row blocks first, then shares of the columns
    programs = min(blocks, 2 * processors)
    tiles = triton.cdiv(columns, tiling["BLOCK_N"])
    splits = max(1, min(2 * processors // programs, tiles))
    split = triton.cdiv(tiles, splits) * tiling["BLOCK_N"]
    splits = triton.cdiv(columns, split)
    row = torch.empty((2, splits, rows), dtype=torch.float32, device=a.device)
    column = torch.empty((2, programs, columns), dtype=torch.float32, device=a.device)
    positive = torch.empty(rows, dtype=torch.float32, device=a.device)
    longest = torch.empty((2, LENGTH_SHARES), dtype=torch.float32, device=a.device)
    block_d = _block_dim(dim)
    _longest_kernel[(LENGTH_SHARES, 2)](
        a, b, longest, rows, columns, DIM=dim, BLOCK_D=block_d, BLOCK_R=max(1, 8192 // block_d)
    )
    _info_nce_fwd_kernel[(programs, splits)](
        a,
        b,
        scale,
        longest,
        scale if ids_a is None else ids_a,
        scale if ids_b is None else ids_b,
        row[0],
        row[1],
        column[0],
        column[1],
        positive,
        rows,
        columns,
        offset,
        split,
        DIM=dim,
        HAS_IDS=ids_a is not None,
        SHARES=LENGTH_SHARES,
        **_precision(a),
        **tiling,
    )
    return _merge(row[0], row[1]), _merge(column[0], column[1]), positive


def shift_of(pull: Tensor, lse: Tensor, is_exact: bool) -> Tensor:
    """pull e^-lse of rows as a power of two [1, R] float32, or [2, R]: whole powers and the rest.

    Rounding a shift of a hundred shows in float32 gradients; bfloat16 rows do not resolve it. Where
    nothing pulls, as where lse is -inf (no negatives), a shift that leaves nothing of any logit
    """
    count = lse.shape[0]
    out = torch.empty((2 if is_exact else 1, count), dtype=torch.float32, device=lse.device)
    grid = (triton.cdiv(count, SHIFT_BLOCK),)
    _shift_kernel[grid](pull, lse, out, count, EXACT=is_exact, BLOCK=SHIFT_BLOCK)
    return out


def info_nce_gradients(
    image: Tensor,
    text: Tensor,
    scales: tuple[Tensor, Tensor],
    grad: Tensor,
    ids: tuple[Tensor, Tensor] | None,
    lse: tuple[Tensor, Tensor],
    pull: tuple[Tensor, Tensor],
    offset: int,
    want_scale: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(d image [M, D] in its own type, d text [N, D] float32, d scale [] float32 or 0).

    image [M, D], text [N, D] contiguous in one dtype; scales (scale, center), grad float32 []; ids,
    lse and pull of rows [M] and of columns [N]; row m's positive is column offset + m
    """
    rows, dim = image.shape
    own = (pull[0] + pull[1][offset : offset + rows]).neg_()  # d z of the positives
    is_exact = image.dtype == torch.float32
    shifts = (shift_of(pull[0], lse[0], is_exact), shift_of(pull[1], lse[1], is_exact))
    if not is_exact:
        return _gradients_by_products(
            image, text, scales, grad, ids, shifts, own, offset, want_scale
        )
    image_grad, scale_grad = _gradient_of_a_side(
        image, text, scales, grad, ids, shifts, own, offset, 0, want_scale
    )
    text_grad, _ = _gradient_of_a_side(
        text, image, scales, grad, None if ids is None else ids[::-1], shifts[::-1], own, -offset,
        -offset, False,
    )  # fmt: skip
    return image_grad, text_grad, scale_grad


def _gradients_by_products(
    image: Tensor,
    text: Tensor,
    scales: tuple[Tensor, Tensor],
    grad: Tensor,
    ids: tuple[Tensor, Tensor] | None,
    shifts: tuple[Tensor, Tensor],
    own: Tensor,
    offset: int,
    want_scale: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """info_nce_gradients of bfloat16 rows: gradients of cosines, a chunk of rows at a time."""
    (rows, dim), columns = image.shape, text.shape[0]
    scale = scales[0]
    tiling = ds_tiling(dim, chip_facts(image.device))
    tile = tiling["BLOCK_M"]
    stride = triton.cdiv(columns, DS_ALIGN) * DS_ALIGN
    step = min(rows, max(1, DS_BYTES // (2 * stride * tile)) * tile)
    ds = torch.empty((step, stride), dtype=image.dtype, device=image.device)
    programs = triton.cdiv(step, tile) * triton.cdiv(columns, tiling["BLOCK_N"])
    parts = scale.new_zeros(programs if want_scale else 1)
    image_grad, text_grad = torch.empty_like(image), None
    scale_grad = torch.zeros_like(scale)
    for first in range(0, rows, step):
        last = min(first + step, rows)
        programs = triton.cdiv(last - first, tile) * triton.cdiv(columns, tiling["BLOCK_N"])
        _info_nce_ds_kernel[(programs,)](
            image[first:last],
            text,
            *scales,
            grad,
            scale if ids is None else ids[0][first:last],
            scale if ids is None else ids[1],
            shifts[0][0, first:last],
            shifts[1][0],
            own[first:last],
            ds,
            parts,
            last - first,
            columns,
            offset + first,
            stride,
            DIM=dim,
            HAS_IDS=ids is not None,
            WANT_SCALE=want_scale,
            UPCAST=is_interpreting(),
            **tiling,
        )
        part = ds[: last - first, :columns]
        image_grad[first:last] = wide_product(part, text)
        # chunks are added in order, in float32: the parts of all ranks are still to be added
        text_grad = wide_product(part.T, image[first:last], text_grad)
        if want_scale:
            scale_grad += parts[:programs].sum()
    assert text_grad is not None
    return image_grad, text_grad, scale_grad


def _gradient_of_a_side(
    a: Tensor,
    b: Tensor,
    scales: tuple[Tensor, Tensor],
    grad: Tensor,
    ids: tuple[Tensor, Tensor] | None,
    shifts: tuple[Tensor, Tensor],
    own: Tensor,
    offset: int,
    own_first: int,
    want_scale: bool,
) -> tuple[Tensor, Tensor]:
    """(d a [M, D], d scale [] or 0), all in float32.

    shifts: shift_of a's rows and of b's; own: d z of every pair; row m of a is of pair
    own_first + m, and its positive is row m + offset of b, where they are
    """
    rows, dim = a.shape
    scale = scales[0]
    tiling = backward_tiling()
    blocks = triton.cdiv(rows, tiling["BLOCK_M"])
    out = torch.empty_like(a)
    parts = torch.zeros(blocks if want_scale else 1, dtype=torch.float32, device=a.device)
    _info_nce_bwd_kernel[(blocks,)](
        a,
        b,
        *scales,
        grad,
        scale if ids is None else ids[0],
        scale if ids is None else ids[1],
        *shifts,
        own,
        out,
        parts,
        rows,
        b.shape[0],
        offset,
        own_first,
        DIM=dim,
        BLOCK_D=_block_dim(dim),
        HAS_IDS=ids is not None,
        WANT_SCALE=want_scale,
        **_precision(a),
        **tiling,
    )
    return out, parts.sum()
