"""A folder that processes and nodes share: its lock, and what another of them wrote there.

Where the file system has no locks a warning says so.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import logging
import os
import stat
import time
from collections.abc import Callable
from pathlib import Path

# Lustre without -o flock, some network file systems
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
_LAG_S = 60.0  # man 5 nfs: how long a node may go by what it knows of a folder (acdirmax)


def open_lock(path: Path, mode: int = 0o666) -> int:
    """A descriptor of a lock's file, as `open_own` gives it."""
    return open_own(path, os.O_RDWR, mode, "lock ")


def open_own(path: Path, flags: int, mode: int, kind: str = "") -> int:
    """A descriptor of a file that stays what it is under its name, made where there is none.

    Not through a link: in a folder of several people it may lead to a file that is to be lost; nor
    of a pipe, and not waiting for its other end.
    mode    before the umask
    kind    of file, to be told
    Raises:  OSError, whose strerror tells of a link or of what else is no file
    """
    flags |= os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
    what = "no file"
    try:
        descriptor = os.open(path, flags, mode)
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            return descriptor
        os.close(descriptor)
    except OSError as error:
        if error.errno == errno.ELOOP and path.is_symlink():
            what = "a link, which may lead anywhere"
        elif error.errno not in (errno.EISDIR, errno.ENXIO):  # a socket, a pipe that nobody reads
            raise
    reason = f"its {kind}{path.name} is {what}: remove it"
    raise OSError(errno.ELOOP, reason, str(path))


def lock(descriptor: int, folder: Path, *, shared: bool = False) -> None:
    """Hold an open file of the folder until it is closed; the kernel frees it when a process dies.

    Raises:  BlockingIOError where another process holds it; OSError
    """
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        _warn(folder, error.strerror)


def release(descriptor: int) -> None:
    """Free a lock by closing its file; on a network's disk that was gone meanwhile the system may
    not take even that, and the lock is gone with it."""
    with contextlib.suppress(OSError):
        os.close(descriptor)


def is_seen(question: Callable[[], bool], timeout_s: float) -> bool:
    """Whether what another process wrote shows here, after a while where the disk is a network's.

    Units:   timeout_s seconds that other ranks wait for this one: at most half of them are taken
    """
    deadline = time.monotonic() + min(_LAG_S, timeout_s / 2)
    while not question():
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.2)
    return True


def is_alive(pid: int) -> bool:
    """Whether this host has a process of that number: one that is gone left its files as they are.

    Of another host's number it says nothing.
    """
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):  # more digits than a process's number has
        return False
    except PermissionError:  # another user's
        pass
    return True


@functools.cache
def _warn(folder: Path, reason: str) -> None:
    """Once a folder: several of its files may be locked."""
    logging.getLogger("mlip").warning(
        "%s: its file system has no locks (%s): nothing keeps a second job out", folder, reason
    )
