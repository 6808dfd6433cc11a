"""One `mlip prepare` at a time in an output folder; parts of one job work side by side.

Two whole runs at once would each replace the other's shards, and the manifest of the one that ends
first would name places in files that are gone.
"""

from __future__ import annotations

import errno
import fcntl
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)  # file systems without locks


@contextmanager
def sole_writer(out: Path, part: tuple[int, int]) -> Iterator[bool]:
    """Yields whether the folder is ours: False where another process works on the same part.

    The lock ends with the process, however that ends.

    Raises:  OSError where no file can be made in the folder.
    """
    whole = part[1] == 1
    with ExitStack() as stack:
        wanted = [(".lock", fcntl.LOCK_EX if whole else fcntl.LOCK_SH)]
        if not whole:
            wanted.append((f".lock-{part[0] + 1}", fcntl.LOCK_EX))
        for name, kind in wanted:
            file = stack.enter_context(open(out / name, "a"))
            try:
                fcntl.flock(file, kind | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
        yield True
