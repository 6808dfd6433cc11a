"""A rank that raises fails the test with its traceback, though its peer waits for it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessRaisedException

from tests.spawned_ranks import start_ranks


def _raise_on_the_last(rank: int, folder: Path) -> None:
    if rank == 1:
        raise ArithmeticError(f"rank {rank} fell in {folder.name}")
    dist.all_reduce(torch.ones(1))


@pytest.mark.long
def test_what_a_rank_raises_reaches_the_test_with_its_traceback(tmp_path: Path) -> None:
    with pytest.raises(ProcessRaisedException) as caught:
        start_ranks(_raise_on_the_last, tmp_path)()
    assert f"ArithmeticError: rank 1 fell in {tmp_path.name}" in str(caught.value)
    assert "_raise_on_the_last" in str(caught.value)
