"""Cores and memory under a container's limits, from made-up trees of control groups; threads,
processes, memory and files that a limit of the account withholds.
"""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import psutil
import pytest

from mlip.system import machine

GIB = 2**30


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tree of control groups in place of the machine's, of which eight cores may be used."""
    monkeypatch.setattr(machine, "_GROUPS", tmp_path / "groups")
    monkeypatch.setattr(machine, "_OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    return tmp_path / "groups"


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


def test_a_group_whose_name_is_no_text_of_the_locale_counts(groups: Path) -> None:
    (groups.parent / "own").write_bytes(b"0::/caf\xe9\n")
    _write(groups / os.fsdecode(b"caf\xe9") / "cpu.max", "200000 100000")
    assert machine.usable_cores() == 2


def test_without_limits_the_affinity_and_the_machines_memory_hold(groups: Path) -> None:
    total = psutil.virtual_memory().total
    assert machine.usable_cores() == 8 and machine.usable_memory() == total  # no groups at all
    _write(groups.parent / "own", "0::/")
    _write(groups / "cpu.max", "max 100000")
    _write(groups / "memory.max", "max")
    assert machine.usable_cores() == 8 and machine.usable_memory() == total


def test_a_docker_container_of_version_2_sees_its_group_as_the_root(groups: Path) -> None:
    _write(groups.parent / "own", "0::/")
    _write(groups / "cpu.max", "250000 100000")
    _write(groups / "memory.max", str(GIB))
    assert machine.usable_cores() == 3 and machine.usable_memory() == GIB


def test_a_job_of_slurm_is_limited_by_a_group_above_its_own(groups: Path) -> None:
    _write(groups.parent / "own", "0::/system.slice/job_7/step_0")
    _write(groups / "system.slice/job_7/step_0/memory.max", "max")
    _write(groups / "system.slice/job_7/memory.max", str(GIB))
    _write(groups / "system.slice/job_7/step_0/cpu.max", "400000 100000")
    _write(groups / "system.slice/job_7/cpu.max", "200000 100000")
    assert machine.usable_cores() == 2 and machine.usable_memory() == GIB


def test_version_1_has_a_tree_for_each_limit_and_hides_the_containers_path(groups: Path) -> None:
    own = "9:memory:/docker/0123\n4:cpu,cpuacct:/docker/0123\n2:cpuset:/docker/0123\n0::/"
    _write(groups.parent / "own", own)
    _write(groups / "cpu/cpu.cfs_quota_us", "150000")
    _write(groups / "cpu/cpu.cfs_period_us", "100000")
    _write(groups / "memory/memory.limit_in_bytes", str(GIB))
    assert machine.usable_cores() == 2 and machine.usable_memory() == GIB
    _write(groups / "cpu/cpu.cfs_quota_us", "-1")
    _write(groups / "memory/memory.limit_in_bytes", "9223372036854771712")  # none
    assert machine.usable_cores() == 8
    assert machine.usable_memory() == psutil.virtual_memory().total


def test_a_group_of_containerd_has_colons_in_its_name(groups: Path) -> None:
    _write(groups.parent / "own", "0::/kubepods.slice/pod_1.slice:cri-containerd:0123")
    _write(groups / "kubepods.slice/pod_1.slice:cri-containerd:0123/memory.max", str(GIB))
    assert machine.usable_memory() == GIB


def test_a_share_below_one_core_is_one(groups: Path) -> None:
    _write(groups.parent / "own", "0::/")
    _write(groups / "cpu.max", "10000 100000")
    assert machine.usable_cores() == 1


@pytest.mark.parametrize("most", [0, 2])
def test_threads_that_cannot_all_be_started_are_a_line_and_none_is_left(
    most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.require_threads(3)
    before, started, start = threading.active_count(), [], threading.Thread.start

    def limited(thread: threading.Thread) -> None:
        if len(started) == most:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)
    with pytest.raises(machine.LimitError, match="ulimit -u, pids.max"):
        machine.require_threads(3)
    assert threading.active_count() == before and len(started) == most


def test_an_error_of_a_limit_is_told_by_its_limit_and_no_other_is() -> None:
    for error, named in (
        (BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"), "ulimit -u"),
        (RuntimeError("can't start new thread"), "ulimit -u"),
        (RuntimeError("Resource temporarily unavailable"), "ulimit -u"),  # gloo's
        (OSError(errno.EMFILE, "Too many open files", "a.png"), "ulimit -n"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "ulimit -v"),
        (MemoryError(), "ulimit -v"),
        (RuntimeError("[enforce fail] . DefaultCPUAllocator: can't allocate memory"), "ulimit -v"),
    ):
        assert named in (machine.limit_reached(error) or "")
    for error in (OSError(errno.ENOSPC, "No space"), RuntimeError("a bug"), ValueError("memory")):
        assert machine.limit_reached(error) is None


def test_a_full_terminal_that_does_not_wait_is_no_limit_on_processes() -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with pytest.raises(BlockingIOError) as caught, open(writing, "w") as terminal:
        terminal.write("x" * (1 << 20))
    os.close(reading)
    assert caught.value.errno == errno.EAGAIN and machine.limit_reached(caught.value) is None
    held = BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable", "a.png")  # a lease
    assert machine.limit_reached(held) is None
