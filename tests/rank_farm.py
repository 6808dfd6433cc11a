"""Ranks in a second instead of ten: forked from a server that has imported everything already.

    farm = start(function, 2, "argument", environment={"FAULT": "kill@1:3:forward"})
    codes = farm.wait(60)

Each rank runs ``function(*arguments)`` in its own process with a launcher's environment and ends
with what it returns as exit code (None is 0). Its output goes to <folder>/rank<r>.log. The server
is Python's own forkserver: single-threaded, so that a fork of it is clean, and started once for all
tests of a session. With enough GPUs the ranks use them (NCCL), else the CPU (gloo).
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from tests.temporary import shared_folder

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.rank_farm_imports"])


@dataclass
class Farm:
    """Running ranks of one world."""

    processes: list[BaseProcess]
    folder: Path

    def wait(self, timeout_s: float = 120.0) -> list[int]:
        """Exit codes in rank order (-9 is SIGKILL).

        Raises:  TimeoutError, with every rank killed, where one of them does not end in time.
        """
        deadline = time.monotonic() + timeout_s
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        alive = [r for r, p in enumerate(self.processes) if p.is_alive()]
        if alive:
            self.kill()
            raise TimeoutError(f"ranks {alive} still ran after {timeout_s} s\n{self.output()}")
        return [int(p.exitcode or 0) for p in self.processes]

    def signal(self, number: int, rank: int | None = None) -> None:
        """To one rank or to all; one that has ended already is left out."""
        chosen = self.processes if rank is None else [self.processes[rank]]
        for process in chosen:
            if process.is_alive() and process.pid is not None:
                os.kill(process.pid, number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        for process in self.processes:
            process.join(10)

    def output(self) -> str:
        """What the ranks printed, the last of it."""
        logs = sorted(self.folder.glob("rank*.log"))
        return "\n".join(f"--- {p.name}\n{p.read_text(errors='replace')[-3000:]}" for p in logs)


def free_port() -> int:
    """One that ranks can open seconds later: below 32768, where Linux gives none away by itself,
    and at random, since other test processes look for theirs at the same time."""
    for port in random.SystemRandom().sample(range(15_000, 32_000), 100):
        with socket.socket() as sock, contextlib.suppress(OSError):  # in use
            sock.bind(("127.0.0.1", port))
            return port
    raise OSError("none of 100 ports of 127.0.0.1 can be bound")


def start(
    function: Callable[..., int | None],
    world: int,
    *arguments: Any,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> Farm:
    """Start the ranks; ``function`` is importable by name."""
    place = folder or shared_folder("ranks")
    place.mkdir(parents=True, exist_ok=True)
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "FAULT": "",
        **(environment or {}),
    }
    if torch.cuda.device_count() < world:
        shared |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    processes: list[BaseProcess] = []
    for rank in range(world):
        own = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        log = str(place / f"rank{rank}.log")
        process = _CONTEXT.Process(target=_enter, args=(function, arguments, own, log), daemon=True)
        process.start()
        processes.append(process)
    return Farm(processes, place)


def run(function: Callable[..., int | None], world: int, *arguments: Any, **named: Any) -> Farm:
    """Start, wait, and raise AssertionError with the output where a rank does not end with 0."""
    timeout_s = named.pop("timeout_s", 900.0)  # a machine may be busy with other things
    farm = start(function, world, *arguments, **named)
    codes = farm.wait(timeout_s)
    assert codes == [0] * world, f"exit codes {codes}\n{farm.output()}"
    return farm


def _enter(
    function: Callable[..., int | None],
    arguments: tuple[Any, ...],
    environment: Mapping[str, str],
    log: str,
) -> None:
    os.environ.update(environment)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    torch.set_num_threads(1)
    try:
        code = function(*arguments) or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
