"""Who is missing and in which collective: what a survivor can say of the others."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed

from mlip.ranks import distributed
from mlip.training import presence

HOUR = 3600.0


@pytest.fixture
def three_ranks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """This process as rank 0 of three; the others are files. On another host than this one rank 1's
    clock is an hour slow, and rank 2's an hour fast."""
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    monkeypatch.setattr(distributed, "barrier", lambda: None)
    monkeypatch.setattr(distributed, "gather_objects", lambda now: [now, now - HOUR, now + HOUR])
    monkeypatch.setattr(distributed, "is_distributed", lambda: True)
    monkeypatch.setattr(presence, "_DYING_S", 0.05)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    presence.start(tmp_path)
    presence.at(6, "forward")

    def seen(rank: int, **facts: Any) -> None:
        entry = {"step": 6, "phase": "forward", "time": time.time(), "pid": os.getpid()}
        entry |= {"host": socket.gethostname(), **facts}
        (tmp_path / "ranks" / f"rank{rank}.json").write_text(json.dumps(entry))

    yield seen
    presence.stop()


def _failed_collective() -> BaseException:
    """What torch's own all_reduce raises where there is no process group, out of train_step."""

    def train_step() -> None:
        torch.distributed.all_reduce(torch.zeros(1))

    with pytest.raises((RuntimeError, ValueError)) as caught:
        train_step()
    return caught.value


def test_a_silent_rank_is_named_with_the_collective_and_its_last_place(three_ranks):
    # of another host nothing is known but its signs: 2**30 is nobody's number here
    three_ranks(1, time=time.time() - HOUR - 60, phase="load", host="elsewhere", pid=2**30)
    three_ranks(2)
    text = presence.explain(_failed_collective())
    assert text is not None
    assert text.startswith(
        "in all_reduce of train_step (step 6, phase forward), waiting for rank 1"
    )
    assert "rank 1: on elsewhere, last sign 6" in text and "step 6, phase load" in text


def test_a_rank_killed_on_another_node_is_named_when_its_signs_stay_away(three_ranks, monkeypatch):
    """Its last sign was a moment old: "every other rank still gives signs of life"."""
    monkeypatch.setattr(presence, "_SILENT_BEATS", 0.5)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    three_ranks(1, time=time.time() + 60.0)  # it goes on giving signs
    three_ranks(2, time=time.time() + HOUR, host="elsewhere")
    text = presence.explain(_failed_collective())
    assert text is not None and "waiting for rank 2: on elsewhere, last sign 0." in text
    assert "rank 1" not in text


def test_a_host_whose_clock_is_an_hour_slow_is_not_called_silent(three_ranks):
    """It was, "last sign 3600.2 s ago", and one that is fast never was."""
    three_ranks(1, time=time.time() - HOUR, host="elsewhere")
    three_ranks(2, time=time.time() + HOUR - 60, host="beyond")
    text = presence.explain(_failed_collective())
    assert text is not None and "waiting for rank 2: on beyond, last sign 6" in text
    assert "rank 1" not in text


def test_a_dead_process_is_gone_and_a_missing_file_never_came(three_ranks):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    three_ranks(1, pid=dead.pid)
    text = presence.explain(_failed_collective())
    assert text is not None and "rank 1: gone" in text and "rank 2: never gave a sign" in text
    stopped = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    stopped.send_signal(signal.SIGSTOP)
    os.waitpid(stopped.pid, os.WUNTRACED)  # a busy machine stops it later
    three_ranks(1, pid=stopped.pid)
    cut_off = presence._present.folder / "rank2.json"
    cut_off.write_text('{"step": 6, "pha')
    text = presence.explain(_failed_collective())
    stopped.kill()
    stopped.wait()
    assert text is not None and "rank 1: stopped" in text and "rank 2: never gave a sign" in text


def test_a_process_that_is_seen_to_be_dead_a_moment_after_the_error_is_named(
    three_ranks, monkeypatch
):
    # what a busy machine shows: the connection is closed, the process not yet a zombie
    monkeypatch.setattr(presence, "_DYING_S", 60.0)
    dying = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(0.3)"])
    three_ranks(1, pid=dying.pid)
    three_ranks(2)
    text = presence.explain(_failed_collective())
    dying.wait()
    assert text is not None and "waiting for rank 1: gone" in text and "rank 2" not in text


def test_a_rank_that_lives_but_is_behind_is_named_only_where_none_is_silent(three_ranks):
    three_ranks(1, phase="load")
    three_ranks(2)
    text = presence.explain(_failed_collective())
    assert text is not None and "rank 1: alive" in text and "phase load" in text
    three_ranks(1, step=5)
    text = presence.explain(_failed_collective())
    assert text is not None and "rank 1: alive" in text and "in step 5, phase forward" in text
    three_ranks(2, time=time.time() - 30.0)
    text = presence.explain(_failed_collective())
    assert text is not None and "rank 2" in text and "rank 1" not in text


def test_where_all_are_at_one_place_nobody_is_accused(three_ranks, monkeypatch):
    three_ranks(1)
    three_ranks(2)
    text = presence.explain(_failed_collective())
    assert text is not None and "every other rank still gives signs of life" in text
    assert "network" not in text
    monkeypatch.setattr(presence, "_SILENT_BEATS", 0.5)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    three_ranks(2, time=time.time() + HOUR + 60, host="elsewhere")
    three_ranks(1, time=time.time() + 60)
    text = presence.explain(_failed_collective())
    assert text is not None and text.endswith("place: look at the network between the nodes")


def test_one_rank_writes_nothing_and_explains_nothing(tmp_path):
    presence.start(tmp_path)
    presence.at(1, "load")
    assert not (tmp_path / "ranks").exists()
    assert presence.explain(RuntimeError()) is None


def test_the_sign_of_life_goes_on_while_the_main_thread_waits(three_ranks, tmp_path):
    path = tmp_path / "ranks" / "rank0.json"
    first = json.loads(path.read_text())
    deadline = time.monotonic() + 20
    while json.loads(path.read_text())["time"] == first["time"]:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert json.loads(path.read_text())["phase"] == "forward"


def test_each_place_is_written_at_once_for_its_owner_alone_and_covers_the_one_before(
    three_ranks, tmp_path, monkeypatch
):
    path = tmp_path / "ranks" / "rank0.json"
    for step, phase in ((10_000, "a phase with a long name"), (7, "load")):
        presence.at(step, phase)
        seen = json.loads(path.read_text())
        assert (seen["step"], seen["phase"], seen["pid"]) == (step, phase, os.getpid())
    assert path.stat().st_mode & 0o077 == 0

    def full(*_: object) -> int:
        raise OSError("No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr(os, "pwrite", full)
        presence.at(8, "backward")
    presence.start(tmp_path)  # again, as after a resume: the one before ends
    assert [t.name for t in threading.enumerate()].count("presence") == 1
    held = presence._present._file
    presence.stop()
    assert "presence" not in [t.name for t in threading.enumerate()]
    with pytest.raises(OSError):
        os.fstat(held)


def test_a_sign_of_life_is_written_through_no_link(three_ranks, tmp_path):
    """The first 256 bytes of the file that such a link led to were lost."""
    precious, path = tmp_path / "precious", tmp_path / "ranks" / "rank0.json"
    precious.write_text("kept")
    path.unlink()
    path.symlink_to(precious)
    presence.start(tmp_path)
    presence.at(7, "load")
    assert precious.read_text() == "kept" and json.loads(path.read_text())["step"] == 7


def _raised_through(*frames: tuple[str, str]) -> BaseException:
    """An error whose traceback goes through functions of these files, outermost first."""
    inner: Any = None
    for file, name in reversed(frames):
        body = "inner()" if inner else "raise RuntimeError"
        own: dict[str, Any] = {"inner": inner}
        exec(compile(f"def {name}():\n    {body}", file, "exec"), own)
        inner = own[name]
    with pytest.raises(RuntimeError) as caught:
        inner()
    return caught.value


def test_a_collective_is_named_by_torch_s_function_and_our_own_caller():
    own, torch_nn = ("/m/loss.py", "train_step"), ("/l/torch/nn/modules/module.py", "_call_impl")
    reduce = ("/l/torch/distributed/distributed_c10d.py", "all_reduce")
    named = presence.collective_of(_raised_through(own, torch_nn, reduce))
    assert named == "all_reduce of train_step"
    # ZeRO-3 waits for a gather that it began before
    waits = ("/l/deepspeed/runtime/zero/partition_parameters.py", "wait")
    assert presence.collective_of(_raised_through(own, waits)) == "all_gather of train_step"
