"""A command that is asked to end: by Ctrl-C, by a scheduler, by a terminal that is closed.

What is half written is removed on the way out, as by any error. What does not live here: a
training, which saves first (training/stop_request.py).
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

_STOP = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(KeyboardInterrupt):
    """A signal asked this process to end."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.signal = signal.Signals(number)

    @property
    def exit_code(self) -> int:
        return 128 + self.signal  # as shells report a process that a signal ended

    def __str__(self) -> str:
        return "interrupted" if self.signal == signal.SIGINT else f"ended by {self.signal.name}"


@contextlib.contextmanager
def signals_stop() -> Iterator[None]:
    """While it lasts, the first signal of _STOP raises Stopped; the second ends the process there.

    One that is ignored stays so (nohup; Ctrl-C in a shell's background). Left to itself, SIGTERM
    would leave half-written files, and process 1 of a container would not notice it.
    """
    kept = {}
    if threading.current_thread() is threading.main_thread():  # no other may set a handler
        kept = {n: h for n in _STOP if (h := signal.getsignal(n)) != signal.SIG_IGN}

    def stop(number: int, frame: FrameType | None) -> None:
        for own in kept:
            signal.signal(own, signal.SIG_DFL)  # a second one has no traceback of the way out
        kept.clear()
        raise Stopped(number)

    for number in tuple(kept):
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
