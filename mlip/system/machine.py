"""What of the machine this process may use: limits of a container or an account, where there are.

`docker --cpus 4`, Kubernetes and SLURM limit processor time and memory by control groups, which
neither os.cpu_count nor psutil knows: 64 threads in a share of 4 cores are stopped most of the
time, and memory that the machine has is not the container's.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path

_GROUPS = Path("/sys/fs/cgroup")
_OWN_GROUPS = Path("/proc/self/cgroup")

_THREADS = (
    "this account or container may start no more processes or threads: raise its limit (ulimit -u, "
    "pids.max of a control group), end others, or take fewer (data.workers, --workers, run.threads)"
)
_MEMORY = (
    "there is no more memory for this process: raise its limit (ulimit -v, memory.max of a control "
    "group), or take less (`mlip doctor --plan` says what a training needs)"
)
_FILES = "too many files are open: raise the limit (ulimit -n), or take fewer workers"
# errors of Python, of C++ (gloo, Arrow) and of torch's allocator, whose types say nothing
_NO_THREAD = re.compile(
    r"^can't start new thread$|^Resource temporarily unavailable$|Failed to launch worker thread"
)
_NO_MEMORY = re.compile(r"DefaultCPUAllocator: .*memory|^std::bad_alloc$|^bad allocation$")


class LimitError(ValueError):
    """A limit of the account or container stands in the way."""


def usable_cores() -> int:
    """Cores by affinity (taskset, SLURM) and by the share of processor time, rounded up.

    Source:  Linux, cpu.max of control groups version 2, cpu.cfs_quota_us of version 1.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    shares = [float(cores or 1)]
    for folder in _groups("cpu"):
        with contextlib.suppress(OSError, ValueError):  # "max": no limit
            quota, period = (folder / "cpu.max").read_text().split()
            shares.append(int(quota) / int(period))
        with contextlib.suppress(OSError, ValueError):
            quota = (folder / "cpu.cfs_quota_us").read_text()
            if int(quota) > 0:  # -1: no limit
                shares.append(int(quota) / int((folder / "cpu.cfs_period_us").read_text()))
    return max(1, math.ceil(min(shares)))


def usable_memory() -> int:
    """Bytes: the machine's memory, or the least that a control group allows.

    Source:  Linux, memory.max of version 2, memory.limit_in_bytes of version 1.
    """
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for folder in _groups("memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            with contextlib.suppress(OSError, ValueError):  # "max": no limit
                limits.append(int((folder / name).read_text()))
    return min(limits)


def require_threads(count: int) -> None:
    """Starts that many threads at once and ends them.

    Arrow waits for ever, and DALI aborts the process, where one of theirs cannot be started.
    Raises:  LimitError where they cannot all be started.
    """
    over = threading.Event()
    threads = [threading.Thread(target=over.wait, daemon=True) for _ in range(count)]
    started = []
    try:
        for thread in threads:
            thread.start()
            started.append(thread)
    except RuntimeError:
        raise LimitError(_THREADS) from None
    finally:
        over.set()
        for thread in started:
            thread.join()


def limit_reached(error: BaseException) -> str | None:
    """One line for an error that a limit of the machine has caused; None for any other."""
    code = error.errno if isinstance(error, OSError) else None
    text = str(error)
    # a stream that does not wait counts what it took, an open names the file that is held: neither
    # a full terminal nor a lease is a limit on processes
    is_other = hasattr(error, "characters_written") or getattr(error, "filename", None) is not None
    if (code == errno.EAGAIN and not is_other) or _NO_THREAD.search(text):
        told = _THREADS
    elif code in (errno.EMFILE, errno.ENFILE):
        told = _FILES
    elif code == errno.ENOMEM or isinstance(error, MemoryError) or _NO_MEMORY.search(text):
        told = _MEMORY
    else:
        return None
    return f"{told} ({text})" if text else told


def _groups(controller: str) -> Iterator[Path]:
    """Folders of this process's control groups and of all above: the least of their limits holds.

    A container may see its own group as the root, under a path that is not there: the root counts.
    """
    with contextlib.suppress(OSError):
        for line in os.fsdecode(_OWN_GROUPS.read_bytes()).splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "":  # version 2: one tree for all
                root = _GROUPS
            elif controller in controllers.split(","):
                root = _GROUPS / controller
            else:
                continue
            folder = root / path.lstrip("/")
            while folder != root and root in folder.parents:
                yield folder
                folder = folder.parent
            yield root
