"""A training that is asked to stop: what is noted, what ends it at once, and whose wish counts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import types

import pytest

from mlip.training import stop_request
from mlip.training.lifecycle import Preempted
from mlip.training.stop_request import StopRequest


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP])
def test_a_signal_is_noted_and_the_step_goes_on(number):
    signal.signal(number, signal.SIG_DFL)  # these tests may run under nohup
    stop = StopRequest()
    assert not stop.is_set
    os.kill(os.getpid(), number)
    assert stop.is_set


def test_a_second_sigterm_changes_nothing_but_a_second_ctrl_c_interrupts():
    stop = StopRequest()
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.is_set
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1.0)


def test_under_nohup_the_end_of_the_terminal_stops_nothing():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup leaves it
    stop = StopRequest()
    os.kill(os.getpid(), signal.SIGHUP)
    assert not stop.is_set


def test_after_the_last_save_a_signal_ends_the_run_at_once():
    stop = StopRequest()
    stop.raise_at_once("here")
    with pytest.raises(Preempted, match="stopped on request here"):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1.0)


def test_a_stop_noted_before_the_evaluation_ends_the_run_there():
    stop = StopRequest()
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Preempted):
        stop.raise_at_once("here")


def test_before_training_a_signal_ends_the_run_and_one_that_was_swallowed_is_not_lost():
    stop = StopRequest()
    stop.raise_at_once("before training")
    for _ in range(2):  # a library that catches everything
        with pytest.raises(Preempted, match="before training"):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1.0)
    assert stop.of_any_rank()
    os.kill(os.getpid(), signal.SIGTERM)  # noted only, once steps run
    assert stop.is_set


@pytest.mark.parametrize("is_asked_for", [True, False])
def test_a_launcher_that_is_gone_counts_as_a_request_to_stop(is_asked_for):
    """Below a wrapper that read all output before it asked for the code, the run went on."""
    stop = StopRequest()
    launcher = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    stop._launcher = stop_request.psutil.Process(launcher.pid)
    assert not stop.is_set
    launcher.kill()
    os.waitid(os.P_PID, launcher.pid, os.WEXITED | (0 if is_asked_for else os.WNOWAIT))
    assert stop.is_set
    launcher.wait()


@pytest.mark.parametrize(
    ("parent", "runner", "is_followed"),
    [
        (["python", "-m", "deepspeed.launcher.launch"], ["python", "/bin/deepspeed"], True),
        (["python", "-m", "deepspeed.launcher.launch"], ["bash"], False),
        (["torchrun"], ["python", "/bin/deepspeed"], False),
        (["python", "-m", "deepspeed.launcher.launch"], None, False),
        (None, None, False),
    ],
)
def test_a_rank_ends_with_its_parent_and_asks_after_the_command_that_leaves_it(
    monkeypatch, parent, runner, is_followed
):
    class Launched:
        def __init__(self, *above: list[str] | None) -> None:
            self.above, self.is_alive = above, True

        def parent(self) -> Launched | None:
            return Launched(*self.above[1:]) if self.above[1] is not None else None

        def cmdline(self) -> list[str]:
            assert self.above[0] is not None
            return self.above[0]

    told: list[tuple[int, int]] = []
    library = types.SimpleNamespace(prctl=lambda *given: told.append(given))
    monkeypatch.setattr(stop_request.ctypes, "CDLL", lambda name: library)
    monkeypatch.setattr(stop_request.psutil, "Process", lambda: Launched([], parent, runner, None))
    monkeypatch.delenv("RANK", raising=False)
    assert StopRequest()._launcher is None and not told  # no launcher
    monkeypatch.setenv("RANK", "0")
    assert (StopRequest()._launcher is not None) == is_followed
    assert told == [(1, signal.SIGTERM)]  # PR_SET_PDEATHSIG of man 2 prctl


def test_a_wish_of_any_rank_stops_all(monkeypatch):
    stop, others = StopRequest(), [False]
    monkeypatch.setattr(stop_request.distributed, "gather_objects", lambda mine: [mine, *others])
    assert not stop.of_any_rank()
    others.append(True)
    assert stop.of_any_rank()
