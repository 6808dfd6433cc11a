"""Memory of a batch is used again when its last tensor is gone, and never before."""

from __future__ import annotations

import numpy as np
import torch

from mlip.dataloading.pipelines.buffers import Buffers


def test_what_anyone_still_holds_is_never_written_again() -> None:
    rng = np.random.default_rng(0)
    buffers, held = Buffers(), {}
    for number in range(400):
        tensor = buffers.take(4, 1, 8, 8)
        tensor.fill_(number)
        # a batch leaves as channels expanded, as a part of its samples, or as NumPy sees it
        kinds = (tensor, tensor.expand(-1, 3, -1, -1), tensor[1:3], tensor[2].numpy())
        held[number] = kinds[number % 4]
        del tensor, kinds
        for old in rng.choice(list(held), len(held) // 3, replace=False).tolist():
            assert (held.pop(old) == old).all()
    assert all((value == number).all() for number, value in held.items())


def test_the_memory_of_a_batch_that_nobody_holds_is_the_next_ones() -> None:
    buffers = Buffers()
    first = buffers.take(2, 3)
    place, part = first.data_ptr(), first[1]
    del first
    second = buffers.take(2, 3)
    assert second.data_ptr() != place
    del part
    assert buffers.take(2, 3).data_ptr() == place


def test_another_shape_starts_anew_and_old_tensors_stay_whole() -> None:
    buffers = Buffers()
    old = buffers.take(4, 5).fill_(7.0)
    new = buffers.take(3, 5).fill_(1.0)
    assert (old == 7.0).all() and new.shape == (3, 5) and new.dtype == torch.float32
    place = old.data_ptr()
    del old
    # what came back belongs to the shape of before
    assert all(buffers.take(3, 5).data_ptr() != place for _ in range(3))
