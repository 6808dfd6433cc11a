"""Where a run's lines go: a terminal, pipe or file that takes no more ends no training."""

from __future__ import annotations

import os
import pty
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mlip.system.unread_output import unread_output_is_lost
from mlip.training import checkpoint
from mlip.training.lifecycle import PREEMPTED, leave
from tests.training.toy_run import run_rank

LONG = "train.max_steps=1000000"


def _train(folder: Path, *settings: str) -> None:
    """In a child process: the toy run on what file descriptors 1 and 2 are now."""
    try:
        for number, name in ((1, "stdout"), (2, "stderr")):
            try:
                stream = open(number, "w", closefd=False)
            except OSError:  # closed before the start: as Python itself does
                stream = None
            setattr(sys, name, stream)
        leave(run_rank(f"run.dir={folder}", "train.engine=plain", "train.log_steps=1", *settings))
    finally:
        os._exit(99)


def _exit_code(pid: int) -> int:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    raise AssertionError("the run did not end")


def _to_a_reader_that_left() -> None:
    readable, writable = os.pipe()  # as behind `| head`
    for number in (1, 2):
        os.dup2(writable, number)
    os.close(readable)
    os.close(writable)


def _to_a_full_disk() -> None:
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)


def _to_nobody() -> None:
    os.closerange(1, 3)  # as behind `>&- 2>&-`


@pytest.mark.parametrize("arrange", [_to_a_reader_that_left, _to_a_full_disk, _to_nobody])
def test_a_run_whose_lines_nobody_takes_trains_to_its_end(
    tmp_path: Path, arrange: Callable[[], None]
) -> None:
    pid = os.fork()
    if pid == 0:
        arrange()
        _train(tmp_path, "train.max_steps=6")
    assert _exit_code(pid) == 0
    assert checkpoint.checkpoints_of(tmp_path)[0].name == "step_00000006"


def test_no_file_takes_the_number_of_a_stream_that_was_closed(tmp_path: Path) -> None:
    """A checkpoint would take in what a C library says to descriptor 2, and children its lock."""
    pid = os.fork()
    if pid == 0:
        try:
            os.closerange(0, 3)
            with unread_output_is_lost(), open(tmp_path / "checkpoint", "wb") as file:
                file.write(b"weights")
                file.flush()
                for number in range(3):
                    os.write(number, b"a warning")
                    os.get_inheritable(number) or os._exit(98)
            os._exit(0)
        finally:
            os._exit(99)
    assert _exit_code(pid) == 0
    assert (tmp_path / "checkpoint").read_bytes() == b"weights"


def test_a_stream_that_was_closed_can_be_asked_to_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    """`mlip prepare ... >&-` ended in a traceback."""
    monkeypatch.setattr(sys, "stdout", None)
    with unread_output_is_lost() as lost:
        print("to nobody")
        sys.stdout.flush()
    assert sys.stdout is None and lost == []


def test_a_terminal_that_closes_is_a_request_to_stop(tmp_path: Path) -> None:
    # SIGHUP, and from then on writing fails: an ssh connection that breaks
    pid, terminal = pty.fork()
    if pid == 0:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests may run under nohup
        _train(tmp_path, LONG)
    while os.read(terminal, 4096):
        log = tmp_path / "log.jsonl"
        if log.is_file() and log.read_text().count("\n") > 3:
            break
    os.close(terminal)
    assert _exit_code(pid) == PREEMPTED
    (saved,) = checkpoint.checkpoints_of(tmp_path)
    steps = (tmp_path / "log.jsonl").read_text().count("\n")
    assert saved.name == f"step_{steps:08d}"
