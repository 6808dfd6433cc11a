"""The thread that hands a run's numbers to one experiment tracker.

A server that is gone or slow, or a full disk, costs points there, and the training neither time nor
its end. Which trackers there are is in trackers.py.
"""

from __future__ import annotations

import collections
import itertools
import logging
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from mlip.settings.config import ConfigError
from mlip.system.unread_output import one_line

logger = logging.getLogger("mlip")

RETRY_S = 60.0  # after a failure
LAST_WAIT_S = 30.0  # for all that is left at the end; schedulers give about a minute to stop in
MOST_WAITING = 10_000  # points, about 15 MB, that wait for a tracker; more are lost to it


Kind = Literal["step", "val", "evaluation"]


@dataclass(frozen=True)
class Point:
    """Numbers after `step` steps; of the step itself, of val, or of the evaluation at the end."""

    step: int
    numbers: Mapping[str, float]
    kind: Kind
    time_ms: int


class Tracker(Protocol):
    """One of them, open.  seen, seen_val  the last steps of which it already holds numbers"""

    setting: str
    at_once: int  # points that one write takes
    seen: int
    seen_val: int

    def write(self, points: Sequence[Point]) -> None: ...

    def close(self, ended: str) -> None: ...


class Feed(threading.Thread):
    """Hands points to one tracker, in their order, and waits for it in place of the training."""

    def __init__(self, tracker: Tracker) -> None:
        super().__init__(name=tracker.setting, daemon=True)
        self.tracker = tracker
        self._points: collections.deque[Point] = collections.deque()
        self._change = threading.Condition()
        self._ended: str | None = None
        self._lost = 0
        self._has_told = False

    def put(self, point: Point) -> None:
        """Returns at once."""
        seen = {"step": self.tracker.seen, "val": self.tracker.seen_val}
        if point.step <= seen.get(point.kind, -1):
            return  # of a step that is trained again after a crash
        with self._change:
            if len(self._points) >= MOST_WAITING:
                self._lost += 1
                return
            self._points.append(point)
            self._change.notify()

    def run(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(lambda: self._points or self._ended is not None)
                points = list(itertools.islice(self._points, self.tracker.at_once))
                ended = self._ended
            try:
                if points:
                    self.tracker.write(points)
                elif ended is not None:
                    self.tracker.close(ended)
                    return
            except Exception as error:  # whatever it is: it must not end the training
                self._tell(error)
                if ended is not None:
                    return
                with self._change:
                    self._change.wait_for(lambda: self._ended is not None, RETRY_S)
            else:
                with self._change:
                    for _ in points:
                        self._points.popleft()

    def _tell(self, error: Exception) -> None:
        if not self._has_told:
            logger.warning(
                "%s: %s; training goes on, and log.jsonl has every step; tried again every %d s",
                self.tracker.setting,
                told(error),
                RETRY_S,
            )
        self._has_told = True

    def end(self, ended: str) -> None:
        with self._change:
            self._ended = ended
            self._change.notify()

    def wait(self, seconds: float) -> None:
        """For what is left to be handed over; says so where it is not."""
        self.join(max(seconds, 0.0))
        left = len(self._points) + self._lost
        if left:
            logger.warning("%s: it lacks the last %d points", self.tracker.setting, left)
        elif self.is_alive():
            logger.warning(
                "%s: still at work after %d s: not waited for", self.tracker.setting, LAST_WAIT_S
            )


def told(error: Exception) -> str:
    """One line of it; the rest may be a page of a server's."""
    kind = "" if isinstance(error, ConfigError) else f"{type(error).__name__}: "
    return one_line(without_password(f"{kind}{error}"))[:300]


def without_password(text: str) -> str:
    """Without what an address names before its host; a password may hold an @ itself."""
    return re.sub(r"//[^/\s]*@", "//", text)
