"""Items through killable worker processes, results in order; a bad item costs itself alone.

A worker is `python -m <module> <argument>`. It writes one line when its imports are done, then
reads one JSON line an item and answers with one JSON line whose "size" says how many raw bytes
follow. One that crashes or works on an item for too long is killed and replaced; the item is tried
once more, then given up as "crashed" or "timeout". Processor time is what counts, so that a busy
machine costs no good file; waiting for a file system has a longer limit of its own.

Items of a few milliseconds go out several to a message, and answers are taken several at a time;
a worker still sends every answer before it begins the next item, so that the first item without an
answer is the one that a dead or hung worker was on.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from mlip.system.machine import limit_reached

# A worker that has one item waiting never idles while the parent writes a shard.
_QUEUED = 2
# Quick items: a message and a look at the clock for each would cost as much as a tenth of them.
_QUEUED_QUICK = 8
_QUICK_SECONDS = 0.02
_GATHER_SECONDS = 0.004  # how long answers of quick items may gather before they are taken
_PIPE_BYTES = 1 << 18  # eight small members: a worker must not wait while they gather
_READ_BYTES = 1 << 18
_LOOK_SECONDS = 0.1  # an item's processor time counts from here: no file read for a quick one
_START_SECONDS = 600.0  # imports from a cold network file system, on a busy machine
_TICK_HZ = os.sysconf("SC_CLK_TCK")


class WorkerError(RuntimeError):
    """Workers end before they begin; no item is at fault."""

    exit_code = 3


@dataclass(frozen=True)
class Reply:
    """A worker's answer; `fields` is empty where `fault` is "crashed" or "timeout"."""

    fields: dict[str, Any]
    content: bytes
    fault: str = ""


@dataclass
class _Task:
    number: int
    item: dict[str, Any]
    tries: int = 0


@dataclass
class _Worker:
    process: subprocess.Popen[bytes]
    tasks: deque[_Task] = field(default_factory=deque)
    since: float = 0.0  # when the first of its tasks became the first
    cpu_since: float | None = None  # its processor seconds soon after, None until looked at
    is_quick: bool = False  # its last items took a few milliseconds
    arrived: bytearray = field(default_factory=bytearray)  # of answers not yet whole
    ready: bool = False  # imports are over: from now on the clock runs

    def send(self, tasks: list[_Task]) -> bool:
        assert self.process.stdin is not None
        if not self.tasks:
            self._restart_clock()
        self.tasks.extend(tasks)
        lines = [json.dumps(task.item).encode() + b"\n" for task in tasks]
        block = memoryview(b"".join(lines))
        try:
            while block:
                block = block[self.process.stdin.write(block) :]
        except OSError:
            return False
        return True

    def wants(self) -> int:
        """How many more items it should have waiting."""
        if not self.is_quick:
            return _QUEUED - len(self.tasks)
        return _QUEUED_QUICK - len(self.tasks) if len(self.tasks) <= _QUEUED_QUICK // 2 else 0

    def receive(self) -> list[Reply] | None:
        """The answers that have arrived whole, None where the worker died.

        The pipe is read here and not through a buffered file: select would not see an answer that
        such a file has already taken in behind another one.
        """
        assert self.process.stdout is not None
        block = os.read(self.process.stdout.fileno(), _READ_BYTES)
        if not block:
            return None
        self.arrived += block
        replies = []
        while (end := self.arrived.find(b"\n")) >= 0:
            if not self.ready:
                del self.arrived[: end + 1]
                self.ready = True
                self._restart_clock()
                continue
            fields = json.loads(self.arrived[:end])
            stop = end + 1 + fields["size"]
            if len(self.arrived) < stop:
                break
            replies.append(Reply(fields, bytes(self.arrived[end + 1 : stop])))
            del self.arrived[:stop]
        if replies:
            self.is_quick = time.monotonic() - self.since < _QUICK_SECONDS * len(replies)
            self._restart_clock()
        return replies

    def _restart_clock(self) -> None:
        self.since, self.cpu_since = time.monotonic(), None

    def cpu_seconds(self) -> float:
        try:
            with open(f"/proc/{self.process.pid}/stat", "rb") as file:
                # the name in parentheses may hold any bytes, blanks too: count behind it
                fields = file.read().rpartition(b")")[2].split()
        except OSError:
            return 0.0
        return (int(fields[11]) + int(fields[12])) / _TICK_HZ

    def is_overdue(self, cpu_s: float, wall_s: float) -> bool:
        if not self.tasks:
            return False
        waited = time.monotonic() - self.since
        if not self.ready:
            return waited > _START_SECONDS
        if self.cpu_since is None:
            if waited > _LOOK_SECONDS:
                self.cpu_since = self.cpu_seconds()
            return waited > wall_s
        return waited > wall_s or (waited > cpu_s and self.cpu_seconds() - self.cpu_since > cpu_s)

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                try:
                    stream.close()
                except OSError:
                    pass  # an item was still in the buffer of the dead worker's pipe


class WorkerPool:
    """ordered(items) over `count` processes; use as a context manager.

    Units: timeout_s processor seconds of one item; wall_s seconds of waiting, default 12 times that
    """

    def __init__(
        self, module: str, argument: str, count: int, timeout_s: float, wall_s: float = 0.0
    ) -> None:
        self._command = [sys.executable, "-m", module, argument]
        self._timeout_s = timeout_s
        self._wall_s = wall_s or 12.0 * timeout_s
        self._unstarted = 0  # workers in a row that died in their imports
        self._workers = [self._start() for _ in range(count)]

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *exception: object) -> None:
        for worker in self._workers:
            worker.stop()

    def _start(self) -> _Worker:
        # a codec's own message could quote the file: it goes nowhere
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENCV_LOG_LEVEL": "OFF"}
        # pictures come and go: giving their memory back each time costs a tenth of a small file in
        # page faults. glibc keeps at most this much; other C libraries do not read it.
        environment |= {"MALLOC_MMAP_THRESHOLD_": "33554432", "MALLOC_TRIM_THRESHOLD_": "134217728"}
        try:
            process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=environment,
                bufsize=0,
            )
        except OSError as error:
            told = limit_reached(error) or error.strerror
            raise WorkerError(f"a worker process cannot be started: {told}") from None
        assert process.stdout is not None
        try:
            fcntl.fcntl(process.stdout, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        except OSError:
            pass  # over the user's limit for pipes: workers then wait a little more often
        return _Worker(process)

    def ordered(self, items: Iterable[dict[str, Any]]) -> Iterator[Reply]:
        """One Reply an item, in the items' order; reads only a few items ahead.

        Raises:  WorkerError where no worker starts any more.
        """
        source = enumerate(items)
        done: dict[int, Reply] = {}
        again: deque[_Task] = deque()
        taken, given, exhausted = 0, 0, False
        while True:
            # bounds what a slow item makes its successors wait, and what is held meanwhile
            window = (24 if all(w.is_quick for w in self._workers) else 8) * len(self._workers)
            for place in range(len(self._workers)):
                tasks: list[_Task] = []
                while len(tasks) < self._workers[place].wants():
                    if again:
                        tasks.append(again.popleft())
                    elif not exhausted and taken - given < window:
                        entry = next(source, None)
                        if entry is None:
                            exhausted = True
                            break
                        tasks.append(_Task(*entry))
                        taken += 1
                    else:
                        break
                if tasks and not self._workers[place].send(tasks):
                    self._replace(place, "crashed", done, again)
            while given in done:
                yield done.pop(given)
                given += 1
            if exhausted and given == taken:
                return
            self._collect(done, again)

    def _collect(self, done: dict[int, Reply], again: deque[_Task]) -> None:
        """Takes at least one answer, or finds a worker dead or silent for too long."""
        busy = {
            w.process.stdout: i
            for i, w in enumerate(self._workers)
            if w.tasks and w.process.stdout is not None
        }
        ready, _, _ = select.select(list(busy), [], [], 0.2)
        if ready and all(w.is_quick and len(w.tasks) > _QUEUED for w in self._workers):
            # every worker has more to do: take several answers at once
            time.sleep(_GATHER_SECONDS)
            ready, _, _ = select.select(list(busy), [], [], 0.0)
        for stream in ready:
            place = busy[stream]
            worker = self._workers[place]
            replies = worker.receive()
            if replies is None:
                self._replace(place, "crashed", done, again)
                continue
            if worker.ready:
                self._unstarted = 0
            for reply in replies:
                done[worker.tasks.popleft().number] = reply
        for place, worker in enumerate(self._workers):
            if worker.is_overdue(self._timeout_s, self._wall_s):
                self._replace(place, "timeout", done, again)

    def _replace(self, place: int, fault: str, done: dict[int, Reply], again: deque[_Task]) -> None:
        """Kills a worker; its first task is blamed, the waiting ones start anew elsewhere."""
        worker = self._workers[place]
        worker.stop()
        if fault == "crashed" and not worker.ready:
            self._unstarted += 1
            if self._unstarted > 2 * len(self._workers):
                raise WorkerError(
                    f"{self._unstarted} worker processes in a row ended before they began (status "
                    f"{worker.process.returncode}): expected them to start; look at the limits of "
                    "this account or container (ulimit -v, ulimit -u, memory), take fewer workers, "
                    f"or see what {' '.join(self._command[1:3])} says"
                )
            again.extendleft(reversed(worker.tasks))
            self._workers[place] = self._start()
            return
        blamed = worker.tasks.popleft()
        again.extend(worker.tasks)
        blamed.tries += 1
        if blamed.tries > 1:
            done[blamed.number] = Reply({}, b"", fault)
        else:
            again.appendleft(blamed)
        self._workers[place] = self._start()
