"""Start the gloo ranks of a test, raise what one of them raised, and let all leave safely.

Needs nothing but torch, so that machines which only run the kernels' tests have it too. Ranks are
forks of the server of tests/rank_farm.py, which imports what that machine has.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

PEER_S = 5
multiprocessing.set_forkserver_preload(["tests.rank_farm_imports"])


def _run_rank(
    rank: int,
    work: Callable[[int, Path], None],
    folder: Path,
    world: int,
    environment: Mapping[str, str],
) -> None:
    os.environ.clear()  # a fork has that of the moment in which its server started
    os.environ.update(environment)
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    try:
        work(rank, folder)
    except BaseException:
        # the first one's error reaches the parent, which ends the others: what they raise for want
        # of their peer would hide it
        if store.add("fallen", 1) > 1:
            time.sleep(PEER_S)
        raise
    # no rank closes its sockets while another still reads from them
    store.set(f"done{rank}", "yes")
    store.wait([f"done{other}" for other in range(world)])
    # not through the interpreter's shutdown: it can abort inside gloo's threads after a success
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def start_ranks(
    work: Callable[[int, Path], None], folder: Path, world: int = 2, *, is_fresh: bool = False
) -> Callable[[], None]:
    """Start `work(rank, folder)` in `world` processes with a gloo group.

    is_fresh  each with an interpreter of its own, which has imported nothing of this project
    Returns: a function that waits for all; it raises what a rank raised, with the traceback.
    """
    ranks = mp.start_processes(
        _run_rank,
        args=(work, folder, world, dict(os.environ)),
        nprocs=world,
        join=False,
        start_method="spawn" if is_fresh else "forkserver",
    )

    def finish() -> None:
        while not ranks.join():
            pass

    return finish


def save_result(result: Any, rank: int, folder: Path) -> None:
    """For a rank: leave what `results_of_ranks` returns."""
    torch.save(result, folder / f"rank{rank}.pt")


def results_of_ranks(
    work: Callable[[int, Path], None], folder: Path, world: int = 2, *, is_fresh: bool = False
) -> list[Any]:
    """What every rank's `work` left with `save_result`, in rank order."""
    start_ranks(work, folder, world, is_fresh=is_fresh)()
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(world)]
