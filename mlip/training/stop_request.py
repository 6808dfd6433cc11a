"""A training that is asked to stop: by a signal, or as its launcher is gone.

What does not live here: saving on the way out (loop.py), and commands that have nothing to save
(system/stop_signal.py).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from types import FrameType

import psutil

from mlip.ranks import distributed
from mlip.training.lifecycle import Preempted

# of schedulers, and of a terminal: Ctrl-C, or its end
_STOP = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def _lives(process: psutil.Process) -> bool:
    """A dead one stays for psutil until its parent has asked for its code: a wrapper that first
    reads the output to its end never asks while ranks run."""
    with contextlib.suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


class StopRequest:
    """Whether this process was asked to stop: by a signal of _STOP, or its launcher is gone.

    While steps run the wish is only noted (a second Ctrl-C ends them); `raise_at_once` makes the
    next signal, and one already noted, end the process: before the first step, after the last save.
    """

    def __init__(self) -> None:
        self._noted = False
        self._ends: str | None = None  # what is said where a signal ends the process at once
        for number in _STOP:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup
                signal.signal(number, self._note)
        self._launcher: psutil.Process | None = None
        if "RANK" in os.environ:
            self._follow_launcher()

    def _note(self, number: int, frame: FrameType | None) -> None:
        is_second, self._noted = self._noted, True
        if self._ends is not None:
            raise Preempted(f"stopped on request {self._ends}")
        if number == signal.SIGINT and is_second:
            raise KeyboardInterrupt

    def _follow_launcher(self) -> None:
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        # the `deepspeed` command does not pass SIGTERM on: it dies and leaves its child launcher
        # training; so its death counts as a request to stop
        with contextlib.suppress(psutil.Error, AttributeError):
            parent = psutil.Process().parent()
            if parent is not None and "deepspeed.launcher.launch" in parent.cmdline():
                runner = parent.parent()
                if runner is not None and any("deepspeed" in part for part in runner.cmdline()):
                    self._launcher = runner

    @property
    def is_set(self) -> bool:
        if self._launcher is not None and not _lives(self._launcher):
            self._noted = True
        return self._noted

    def raise_at_once(self, when: str) -> None:
        """From now on a wish, noted or to come, is Preempted; `when` says where the run stands."""
        self._ends = when
        if self._noted:
            raise Preempted(f"stopped on request {when}")

    def of_any_rank(self) -> bool:
        """Whether any rank was asked by now; from here on a wish is only noted again. A collective
        call."""
        self._ends = None
        return any(distributed.gather_objects(self.is_set))
