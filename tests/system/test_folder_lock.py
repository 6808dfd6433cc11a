"""What processes of one folder see of each other, and for how long one waits for another."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mlip.system import folder_lock
from mlip.system.folder_lock import is_alive, is_seen, open_lock


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds by which sleeping moves it, and nothing else does."""
    now = [100.0]
    monkeypatch.setattr(folder_lock.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(
        folder_lock.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds)
    )
    return now


@pytest.mark.parametrize(("timeout_s", "waited_s"), [(10.0, 5.0), (300.0, 60.0), (0.0, 0.0)])
def test_what_does_not_show_is_waited_for_half_of_the_timeout_and_a_minute_at_most(
    timeout_s: float, waited_s: float, clock: list[float]
) -> None:
    """The other half is for the ranks that wait for this one."""
    assert not is_seen(lambda: False, timeout_s)
    assert clock[0] - 100.0 == pytest.approx(waited_s, abs=0.21)


def test_what_shows_late_is_seen(clock: list[float]) -> None:
    assert is_seen(lambda: clock[0] > 103.0, 10.0)
    assert clock[0] == pytest.approx(103.0, abs=0.21)


def test_a_process_is_asked_for_and_not_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        assert is_alive(other.pid)
        other.communicate(b"\n")
        assert other.returncode == 0  # no signal reached it
    assert not is_alive(other.pid) and not is_alive(10**30)

    def refuse(pid: int, signal: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "kill", refuse)
    assert is_alive(1)  # another user's


def test_links_above_a_lock_that_lead_nowhere_are_not_the_lock(tmp_path: Path) -> None:
    (tmp_path / "run").symlink_to("run")
    with pytest.raises(OSError) as told:
        open_lock(tmp_path / "run" / "lock")
    assert told.value.strerror == os.strerror(errno.ELOOP)
