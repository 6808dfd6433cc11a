"""What watches every kernel of the interpreter's tests sees each thing that it is there for."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.interpreting import interpreted

pytest.importorskip("triton", reason="triton is not installed")

import triton
import triton.language as tl


@triton.jit
def _copy_kernel(from_ptr, to_ptr, step, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * step + tl.arange(0, BLOCK)
    tl.store(to_ptr + offs, tl.load(from_ptr + offs))


@triton.jit
def _neighbour_kernel(from_ptr, to_ptr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(to_ptr + offs, tl.load(from_ptr + offs + BLOCK))


@triton.jit
def _twice_kernel(to_ptr, BLOCK: tl.constexpr):
    tl.store(to_ptr + tl.arange(0, BLOCK), tl.zeros([BLOCK], tl.float32))
    tl.store(to_ptr + tl.arange(0, BLOCK), tl.zeros([BLOCK], tl.float32))


@triton.jit
def _one_place_kernel(to_ptr, BLOCK: tl.constexpr):
    tl.store(to_ptr + tl.arange(0, BLOCK) // 2, tl.arange(0, BLOCK).to(tl.float32))


@interpreted
def test_programs_that_keep_apart_pass() -> None:
    x, out = torch.arange(16.0), torch.zeros(16)
    _copy_kernel[(2,)](x, out, 8, BLOCK=8)
    _neighbour_kernel[(1,)](x, out, BLOCK=8)
    assert out.tolist() == [*range(8, 16), *range(8, 16)]


@interpreted
@pytest.mark.parametrize("lengths", [(15, 16), (16, 15)])
def test_a_kernel_that_leaves_its_tensors_is_refused(lengths: tuple[int, int]) -> None:
    given = [torch.zeros(length) for length in lengths]
    with pytest.raises(Exception, match="leaves the memory of its tensors"):
        _copy_kernel[(2,)](*given, 8, BLOCK=8)


@interpreted
def test_two_programs_in_one_place_are_refused() -> None:
    x = torch.arange(24.0)
    with pytest.raises(Exception, match="writes what the launch wrote, by another program"):
        _copy_kernel[(2,)](x, torch.zeros(24), 4, BLOCK=8)
    with pytest.raises(Exception, match="writes what the launch read, by another program"):
        _neighbour_kernel[(2,)](x, x, BLOCK=8)
    # the same memory as elements of another length
    with pytest.raises(Exception, match="reads what the launch wrote, by another program"):
        _copy_kernel[(2,)](x.view(torch.int16), x[4:], 8, BLOCK=8)


@interpreted
def test_threads_of_a_program_in_one_place_are_refused() -> None:
    with pytest.raises(Exception, match="writes what the launch wrote, by the same program"):
        _twice_kernel[(1,)](torch.zeros(8), BLOCK=8)
    with pytest.raises(Exception, match="one store has two values for an address"):
        _one_place_kernel[(1,)](torch.zeros(8), BLOCK=8)
    x = torch.zeros(8)
    with pytest.raises(Exception, match="writes what the launch read, by the same program"):
        _copy_kernel[(1,)](x, x, 8, BLOCK=8)
