"""Where every rank is, so that a survivor can say which one is missing and what it waited in.

Each rank of a run with several keeps run.dir/ranks/rank<r>.json: step and phase from its main
thread, and a sign of life each second from a thread of its own. A rank that was stopped gives no
sign; one that is slow gives signs from an earlier phase. Nothing is read until something is wrong.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from mlip.ranks import distributed
from mlip.system.output_file import new_file

_BEAT_S = 1.0
_SILENT_BEATS = 3.5
_DYING_S = 1.0  # how long a rank whose connections are closed may still look alive
_ROOM = 256  # bytes of the file: each writing covers the one before
_present: Presence | None = None


class Presence:
    """This rank's file and its sign of life."""

    def __init__(self, run_dir: str | Path) -> None:
        self.folder = Path(run_dir) / "ranks"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.step, self.phase = -1, "start"
        self.ahead_s = [0.0] * distributed.world_size()  # rank -> its host's clock before this one
        self._lock = threading.Lock()
        path = self.folder / f"rank{distributed.rank()}.json"
        self._file = new_file(path, 0o600)
        self._stopped = threading.Event()
        self._write()
        self._thread = threading.Thread(target=self._beat, name="presence", daemon=True)
        self._thread.start()

    def at(self, step: int, phase: str) -> None:
        self.step, self.phase = step, phase
        self._write()

    def _write(self) -> None:
        now = {"step": self.step, "phase": self.phase, "time": round(time.time(), 3)}
        now |= {"pid": os.getpid(), "host": _host()}
        # a sign that a full disk does not take is missed only where something else is wrong too
        with self._lock, contextlib.suppress(OSError):
            os.pwrite(self._file, json.dumps(now).ljust(_ROOM).encode(), 0)

    def _beat(self) -> None:
        while not self._stopped.wait(_BEAT_S):
            self._write()
            with contextlib.suppress(OSError):
                os.close(os.dup(self._file))  # NFS sends what was written when a file is closed

    def close(self) -> None:
        self._stopped.set()
        self._thread.join(2 * _BEAT_S)
        with contextlib.suppress(OSError):  # of a network's disk that was gone meanwhile
            os.close(self._file)


def start(run_dir: str | Path) -> None:
    """Show this rank's place from here on; nothing where there is one rank. A collective call."""
    global _present
    stop()
    if distributed.is_distributed():
        _present = Presence(run_dir)
        distributed.barrier()  # all look at their clocks at one moment
        own = time.time()
        _present.ahead_s = [there - own for there in distributed.gather_objects(own)]


def stop() -> None:
    global _present
    if _present is not None:
        _present.close()
        _present = None


def at(step: int, phase: str) -> None:
    """The main thread is here now."""
    if _present is not None:
        _present.at(step, phase)


def explain(error: BaseException) -> str | None:
    """For an error of a collective: its name, and the ranks it waited for; None where unknown."""
    if _present is None:
        return None
    place = f"in {collective_of(error)} (step {_present.step}, phase {_present.phase})"
    # a killed process closes its connections before the system shows it as dead, and of another
    # host nothing is shown but that signs do not come any more
    is_one_host = distributed.local_ranks() >= distributed.world_size()
    wait_s = _DYING_S if is_one_host else _DYING_S + _SILENT_BEATS * _BEAT_S
    deadline = time.monotonic() + wait_s
    silent, behind = _missing_ranks(_present)
    while not silent and time.monotonic() < deadline:
        time.sleep(0.02)
        silent, behind = _missing_ranks(_present)
    missing = silent or behind
    if not missing:
        network = "" if is_one_host else ": look at the network between the nodes"
        return f"{place}; every other rank still gives signs of life from the same place{network}"
    return f"{place}, waiting for " + "; ".join(missing)


def collective_of(error: BaseException) -> str:
    """The collective that failed and who called it, from the error's traceback."""
    called, caller = "a collective", ""
    for frame in traceback.extract_tb(error.__traceback__):
        if frame.filename.endswith(("zero/partition_parameters.py", "utils/nvtx.py")):
            called = "all_gather" if frame.name == "wait" else called  # ZeRO-3's, begun before
        elif "torch/distributed" in frame.filename or "deepspeed/comm" in frame.filename:
            if frame.name not in ("wrapper", "log_wrapper") and not frame.name.startswith("_"):
                called = frame.name
        elif f"{os.sep}torch{os.sep}" not in frame.filename:
            caller = frame.name
    return f"{called} of {caller}" if caller else called


def _missing_ranks(own: Presence) -> tuple[list[str], list[str]]:
    """Other ranks that are dead, stopped or silent; and those behind this one; with states."""
    silent, behind = [], []
    for rank in range(distributed.world_size()):
        if rank == distributed.rank():
            continue
        try:
            seen = json.loads((own.folder / f"rank{rank}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            silent.append(f"rank {rank}: never gave a sign")
            continue
        state = _state(seen)
        age = time.time() - seen["time"]
        if seen["host"] != _host():
            age += own.ahead_s[rank]
        text = f"rank {rank}: {state}, last sign {age:.1f} s ago in step {seen['step']}, "
        text += f"phase {seen['phase']}"
        if state in ("gone", "stopped") or age > _SILENT_BEATS * _BEAT_S:
            silent.append(text)
        elif (seen["step"], seen["phase"]) != (own.step, own.phase):
            behind.append(text)
    return silent, behind


def _host() -> str:
    return socket.gethostname()[:100]


def _state(seen: Mapping[str, Any]) -> str:
    """What this host knows of the process; of another host's it knows the place."""
    if seen["host"] != _host():
        return f"on {seen['host']}"
    try:
        status = psutil.Process(seen["pid"]).status()
    except psutil.Error:
        return "gone"
    if status in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP):
        return "stopped"
    return "gone" if status in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD) else "alive"
