"""A lock on a folder's file, also where the file system has none: then a warning says so."""

from __future__ import annotations

import errno
import fcntl
import functools
import logging
from pathlib import Path

# Lustre without -o flock, some network file systems
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


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


@functools.cache
def _warn(folder: Path, reason: str) -> None:
    """Once a folder: several of its files may be locked."""
    logging.getLogger("mlip").warning(
        "%s: its file system has no locks (%s): nothing keeps a second job out", folder, reason
    )
