"""Lines that nobody takes: a pipe behind `| head`, a terminal that is gone, a full disk.

They are lost, and the work that they tell of goes on: hours of training do not end with a reader.
Nor do they end with a letter that the terminal's encoding lacks. What a full disk did not take is
told to the caller, for whom the lines may be the result.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import sys
from collections.abc import Iterable, Iterator
from typing import Any, TextIO

_FULL = (errno.ENOSPC, errno.EDQUOT)
# what a terminal obeys or a reader is misled by: control characters, turns of direction
_OBEYED = re.compile(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def one_line(text: str) -> str:
    """A text fit for a terminal: on one line, and nothing in it is a command to the terminal.

    Messages name columns, ids and terms of files that others wrote.
    """
    return terminal_text([" ".join(text.split())])


def terminal_text(lines: Iterable[str]) -> str:
    """Lines as one text fit for a terminal: blanks stay, commands and turns of direction are shown.

    Names of findings, groups and views are those of tables and results that others wrote.
    """
    shown = (_OBEYED.sub(lambda c: c[0].encode("unicode_escape").decode(), line) for line in lines)
    return "\n".join(shown)


class _Lenient:
    """A text stream that loses what it cannot write; all else is the stream's own."""

    def __init__(self, stream: TextIO, lost: list[str]) -> None:
        self._stream = stream
        self._lost = lost

    def write(self, text: str) -> int:
        with self._losing():
            try:
                self._stream.write(text)
            except UnicodeEncodeError:  # a path with accents where LANG or a setting says ASCII
                encoding = self._stream.encoding
                self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        with self._losing():
            self._stream.flush()

    @contextlib.contextmanager
    def _losing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._note(error)

    def _note(self, error: OSError) -> None:
        if error.errno in _FULL:
            self._lost.append(os.strerror(error.errno))

    def finish(self) -> None:
        """What the stream still holds would be tried once more as Python ends, with exit code 120.

        Until then it is kept: a disk may have room again.
        """
        try:
            self._stream.flush()
        except OSError as error:
            self._note(error)
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _hold_descriptors() -> None:
    """Standard streams that were closed before the start (`2>&-`) lead to nowhere from now on.

    Their numbers would go to the files opened next: a checkpoint that is descriptor 2 takes in
    what a C library has to say.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)  # the lowest free number: this one
            os.set_inheritable(null, True)


@contextlib.contextmanager
def unread_output_is_lost() -> Iterator[list[str]]:
    """While it lasts, printing to stdout and stderr raises no OSError and no UnicodeEncodeError.

    Yields a list: why a disk did not take lines, empty where it took all; whole behind the block.
    """
    lost: list[str] = []
    _hold_descriptors()
    with contextlib.ExitStack() as stack:
        for redirect, stream in (
            (contextlib.redirect_stdout, sys.stdout),
            (contextlib.redirect_stderr, sys.stderr),
        ):
            if stream is None:  # closed before the start: print copes, sys.stdout.flush() does not
                stream = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            lenient: Any = _Lenient(stream, lost)
            stack.enter_context(redirect(lenient))
            stack.callback(lenient.finish)
        yield lost
