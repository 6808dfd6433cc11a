"""A line on stderr every few seconds of what takes hours where data are many."""

from __future__ import annotations

import sys
import time

EVERY_S = 5.0


class Progress:
    """Call it with what is done; it says so every EVERY_S seconds, nothing of quick work.

    what       "images": the line is "1200 of 5000 images, 80/s"
    tells_end  a last line where all is done, however quick it was
    """

    def __init__(self, what: str, *, tells_end: bool = False) -> None:
        self._what, self._tells_end = what, tells_end
        self._start = self._last = time.monotonic()

    def __call__(self, done: int, total: int | None = None) -> None:
        now = time.monotonic()
        if now - self._last >= EVERY_S or (self._tells_end and done == total):
            self._last = now
            rate = done / max(now - self._start, 1e-9)
            of = "" if total is None else f" of {total}"
            shown = f"{rate:.0f}" if rate >= 10 else f"{rate:.2g}"  # some take seconds each
            print(f"{done}{of} {self._what}, {shown}/s", file=sys.stderr, flush=True)
