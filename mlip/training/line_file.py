"""Lines that others read while they come, on a disk that may be full or gone for a while."""

from __future__ import annotations

import contextlib
import errno
import os
from collections import deque
from pathlib import Path

from mlip.system.output_file import open_to_append

_MOST_WAITING = 10_000  # lines, a few MB


class LineFile:
    """Each line is there for others as soon as it is written.

    One that cannot be written waits for the next, up to 10,000 of them: then the oldest are lost.
    The file is made by `open`, or with its first line.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor: int | None = None
        self._waiting: deque[bytes] = deque(maxlen=_MOST_WAITING)

    def open(self) -> None:
        """Raises:  OSError"""
        if self._descriptor is None:
            self._descriptor = open_for_lines(self._path)

    def write(self, line: str) -> None:
        """Raises:  OSError where the line waits"""
        self._waiting.append(f"{line}\n".encode())
        self._write()

    def close(self) -> None:
        """Raises:  OSError where lines that waited are lost"""
        try:
            if self._waiting:
                self._write()
        finally:
            self._drop()

    def _write(self) -> None:
        self.open()
        assert self._descriptor is not None
        content = b"".join(self._waiting)
        try:
            written = os.write(self._descriptor, content)
            if written < len(content):
                # one that lacks its end alone is ended when the file is opened again
                for _ in range(content.count(b"\n", 0, written + 1)):
                    self._waiting.popleft()
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            # a network's disk that was gone may take no more by what was opened before
            self._drop()
            raise
        self._waiting.clear()

    def _drop(self) -> None:
        if self._descriptor is not None:
            with contextlib.suppress(OSError):
                os.close(self._descriptor)
        self._descriptor = None


def open_for_lines(path: Path) -> int:
    """A descriptor to append to; a line that was cut off is ended, so that it spoils no other."""
    descriptor = open_to_append(path)
    try:
        # of half a GB of a million steps the last byte
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            os.write(descriptor, b"\n")
    except OSError:
        os.close(descriptor)
        raise
    return descriptor
