"""How the ranks' process group begins and ends, and waiting that outlasts a collective's timeout.

What ranks do together in between is in distributed.py.
"""

from __future__ import annotations

import contextlib
import os
import queue
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from mlip.ranks import distributed
from mlip.ranks.launcher import name_interface, require_gpu, require_launcher, require_one_task
from mlip.system.machine import require_threads

_POLL_S, _DONE = 0.5, "mlip/done"
# of a process group, where gloo aborts or waits for ever with fewer
_GROUP_THREADS = 8


def start(timeout_s: float) -> torch.device:
    """Join the launcher's process group (none without a launcher); this rank's device.

    Raises:  ValueError where another program holds the port that rank 0 was to listen on, where
             several processes were started that know nothing of each other, where a launcher's
             variables are there in part, or where LOCAL_RANK is of no GPU that is here
    """
    if not dist.is_initialized():
        require_launcher() if "RANK" in os.environ else require_one_task()
    here = distributed.device()
    if here.type == "cuda":
        require_gpu(here.index)
        torch.cuda.set_device(here)
    if "RANK" in os.environ and not dist.is_initialized():
        # objects and checkpoints travel over gloo where tensors of a GPU travel over NCCL
        backend = "cpu:gloo,cuda:nccl" if here.type == "cuda" else "gloo"
        require_threads(_GROUP_THREADS)
        name_interface(is_one_host=distributed.local_ranks() >= int(os.environ["WORLD_SIZE"]))
        try:
            dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
        except RuntimeError as error:
            if "EADDRINUSE" not in str(error):
                if isinstance(error, dist.DistError) or "Gloo" in str(error):
                    raise dist.DistNetworkError(_not_met(error)) from error
                raise
            raise ValueError(
                f"port {os.environ.get('MASTER_PORT')} of this machine is in use, most likely by "
                "another training run; give this one a port of its own: deepspeed --master_port "
                "N train.py ..., or torchrun --master_port N train.py ..."
            ) from error
    return here


def _not_met(error: Exception) -> str:
    """What a rank says that could not join the others."""
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    who = f"rank {os.environ['RANK']} on {socket.gethostname()}"
    if "connectFullMesh" in str(error):
        own = os.environ.get("GLOO_SOCKET_IFNAME", "the one of its host's name")
        text = (
            f"{who} met the others at {place}, and not each of them can reach it or be reached: "
            "let TCP pass between the nodes on all ports, and set GLOO_SOCKET_IFNAME on each to "
            f"its interface of the network that they share (here {own})"
        )
    else:
        text = (
            f"{who} did not meet all {os.environ['WORLD_SIZE']} ranks at {place}: start all nodes "
            "within run.timeout_s, each with the address of rank 0's node and one port that its "
            "firewall lets through (--master_addr, --master_port)"
        )
    return f"{text}. {error}"


def start_alone() -> None:
    """A process group of one where no launcher made one: DeepSpeed does not run without."""
    os.environ.setdefault("LOCAL_RANK", "0")
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        require_threads(_GROUP_THREADS)
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def stop() -> None:
    """Leave the process group; without this NCCL warns and may hang at exit."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def main_first(work: Callable[[], None]) -> None:
    """Rank 0 works, the others wait, for hours if need be, where a collective has its timeout.

    Raises:  what `work` raises, on rank 0; DistError on the others where rank 0 failed, is gone, or
             cannot be reached any more
    """
    if not distributed.is_distributed():
        work()
        return
    # a word of an earlier life, which torchrun has started again, must not be taken for this one's
    store, key = _store(), f"mlip/main_first/{distributed.broadcast_object(secrets.token_hex(8))}"
    if distributed.is_main():
        try:
            work()
        except BaseException:
            store.set(key, "failed")
            raise
        store.set(key, "done")
        return
    while (word := _ask(store, key)) is None:
        time.sleep(_POLL_S)
    if word != b"done":
        raise dist.DistError("rank 0 could not do what the others wait for; its line says why")


@contextlib.contextmanager
def rank_0_alone() -> Iterator[bool]:
    """Leave the process group: rank 0 goes on, and other ranks wait where that keeps it alive.

    A torchrun none of whose ranks is left ends after five minutes, and with it the meeting point
    (c10d) that it may keep for all nodes: torchrun of rank 0's node would then kill rank 0.
    Yields:  whether this is rank 0
    """
    is_first = distributed.is_main()
    waits = (
        "TORCHELASTIC_RUN_ID" in os.environ and distributed.local_ranks() < distributed.world_size()
    )
    store = _store() if waits else None
    distributed.barrier()
    stop()
    try:
        yield is_first
        # rank 0 may be gone: its own launcher says so
        with contextlib.suppress(RuntimeError):
            while store is not None and not is_first and _ask(store, _DONE) is None:
                time.sleep(_POLL_S)
    finally:
        if store is not None and is_first:
            with contextlib.suppress(RuntimeError):
                store.set(_DONE, "")


def _store() -> Any:
    """What the ranks met by: it has no timeout but that of a question."""
    return dist.distributed_c10d._get_default_store()


def _ask(store: Any, key: str) -> bytes | None:
    """What the store holds under the key; None where nothing.

    Raises:  DistError where it has not answered within its timeout: over a link that is down TCP
             asks again for a quarter of an hour and more, and the store waits for it
    """
    answers: queue.SimpleQueue[bytes | Exception | None] = queue.SimpleQueue()

    def ask() -> None:
        try:
            answers.put(store.get(key) if store.check([key]) else None)
        except RuntimeError as error:
            answers.put(error)

    threading.Thread(target=ask, daemon=True).start()
    wait_s = store.timeout.total_seconds()
    try:
        answer = answers.get(timeout=wait_s)
    except queue.Empty:
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise dist.DistError(
            f"the meeting point of all ranks, {place}, has not answered for {wait_s:.0f} s: its "
            "node or the network is gone"
        ) from None
    if isinstance(answer, Exception):
        raise answer
    return answer
