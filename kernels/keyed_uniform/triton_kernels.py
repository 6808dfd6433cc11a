"""splitmix64 in one launch: in torch it is 34, each of which moves eight bytes a number."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mlip.kernels.keyed_uniform import reference

BLOCK = 1024
GAMMA = tl.constexpr(reference.GAMMA)
MIX_1 = tl.constexpr(reference.MIX_1)
MIX_2 = tl.constexpr(reference.MIX_2)
BELOW_1 = tl.constexpr(reference.BELOW_1)


@triton.jit
def _mix(x):
    x = (x ^ (x >> 30)) * MIX_1
    x = (x ^ (x >> 27)) * MIX_2
    return x ^ (x >> 31)


# the word is another number in every step: a kernel for each would be compiled for its divisors
@triton.jit(do_not_specialize=["word"])
def _keyed_uniform_kernel(index_ptr, out_ptr, word, count, width, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row, lane = at // width, at % width
    index = tl.load(index_ptr + row, mask=at < count, other=0)
    key = _mix((index + 1).to(tl.uint64) * GAMMA + word.to(tl.uint64))
    bits = _mix(key + (lane + 1).to(tl.uint64) * GAMMA)
    number = ((bits >> 11).to(tl.float64) + 0.5) * 2.0**-53
    tl.store(out_ptr + at, tl.where(number < BELOW_1, number, BELOW_1), mask=at < count)


def uniform(word: int, index: Tensor, width: int) -> Tensor:
    """What op.splitmix_uniform says, bit for bit that of reference.py."""
    index = index.contiguous()
    out = torch.empty((index.shape[0], width), dtype=torch.float64, device=index.device)
    if out.numel() > 0:
        grid = (triton.cdiv(out.numel(), BLOCK),)
        word = reference.signed(word)
        _keyed_uniform_kernel[grid](index, out, word, out.numel(), width, BLOCK=BLOCK)
    return out
