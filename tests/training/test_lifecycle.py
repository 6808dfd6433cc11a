"""How a run ends: exit codes, one line on stderr, the folder's lock, requests to stop."""

from __future__ import annotations

import errno
import json
import logging
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from mlip import folder_lock
from mlip.config import ConfigError
from mlip.dataloading.output_folder import sole_writer
from mlip.training import faults, lifecycle
from mlip.training.lifecycle import (
    CheckpointError,
    NumericError,
    Preempted,
    StopRequest,
    exit_code,
    guarded,
    locked_folder,
    record_event,
)

ROOT = Path(__file__).resolve().parents[2]
FORK = multiprocessing.get_context("fork")  # a spawned one would import torch first
pytestmark = pytest.mark.usefixtures("own_signals")


class _DataError(RuntimeError):
    exit_code = 3


class ManifestError(ValueError):
    """As the data loading's: recognised by its name, without an import of it."""


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("x"), 2),
        (ValueError("x"), 2),
        (_DataError("x"), 3),
        (ManifestError("x"), 3),
        (CheckpointError("x"), 4),
        (NumericError("x"), 5),
        (RuntimeError("x"), 1),
        (RuntimeError("timed out while thinking"), 1),  # not said by a collective
        # ZeRO-3 waits for a gather in a file of DeepSpeed's that is none of its collectives
        (RuntimeError("[/x/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer"), 6),
        (Preempted("x"), 75),
    ],
)
def test_every_kind_of_error_has_its_exit_code(error, code):
    assert exit_code(error) == code


def test_an_error_is_one_line_an_event_and_a_traceback_in_a_file(tmp_path, capsys):
    def fail():
        raise CheckpointError("cannot go on\nfor a reason")

    assert guarded(fail, lambda: tmp_path) == 4
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert line.startswith("mlip: checkpoint error on rank 0: cannot go on for a reason (traceback")
    assert printed.out == ""
    assert "raise CheckpointError" in (tmp_path / "error-rank0.log").read_text()
    (event,) = map(json.loads, (tmp_path / "events.jsonl").read_text().splitlines())
    assert event["event"] == "error" and event["code"] == 4 and event["error"] == "CheckpointError"
    # an error may quote what a file holds: the event keeps only a hash of its text
    assert "cannot" not in json.dumps(event)


def test_without_a_folder_an_unexpected_error_still_shows_its_traceback(capsys):
    def fail():
        raise KeyError("who knows")

    assert guarded(fail, lambda: None) == 1
    assert "Traceback" in capsys.readouterr().err


def test_success_and_preemption_leave_no_error(tmp_path):
    def stop():
        raise Preempted("stopped")

    assert guarded(lambda: None, lambda: tmp_path) == 0
    assert guarded(stop, lambda: tmp_path) == 75
    assert not list(tmp_path.iterdir())


def test_a_rank_that_lost_its_peer_ends_with_the_peers_code(tmp_path, monkeypatch):
    # as two nodes leave it that append at once over NFS
    (tmp_path / "events.jsonl").write_bytes(b'{"time": 1, "ra\xff\n3\n{"event": "error"}\n')
    record_event(tmp_path, "error", code=3, error="DataError", text="0")
    monkeypatch.setenv("RANK", "1")

    class DistBackendError(RuntimeError):
        pass

    def fail():
        raise DistBackendError("Connection closed by peer [127.0.0.1]:1234")

    assert guarded(fail, lambda: tmp_path) == 3


def test_a_rank_whose_peer_left_no_word_ends_with_6(tmp_path, monkeypatch):
    record_event(tmp_path, "error", code=3, error="DataError", text="0")
    old = json.loads((tmp_path / "events.jsonl").read_text()) | {"time": 1.0, "rank": 1}
    (tmp_path / "events.jsonl").write_text(json.dumps(old) + "\n")  # of an earlier run

    class DistBackendError(RuntimeError):
        pass

    def fail():
        raise DistBackendError("Connection closed by peer [127.0.0.1]:1234")

    assert guarded(fail, lambda: tmp_path) == 6


def test_a_second_job_on_a_folder_is_refused_and_names_the_first(tmp_path):
    with locked_folder(tmp_path / "run"):
        with pytest.raises(ConfigError, match=f"in use by another job .pid {os.getpid()} on "):
            with locked_folder(tmp_path / "run"):
                pass
    with locked_folder(tmp_path / "run"):
        pass


def test_a_refused_job_leaves_no_word_in_the_first_ones_folder(tmp_path, monkeypatch, capsys):
    # its event would be read as the first job's own: a survivor of a kill there would end with 2
    def begin() -> None:
        with locked_folder(tmp_path):
            pass

    with locked_folder(tmp_path):
        assert guarded(begin, lambda: tmp_path) == 2
        assert [p.name for p in tmp_path.iterdir()] == ["lock"]
        assert "settings error on rank 0" in capsys.readouterr().err
        monkeypatch.setenv("RANK", "1")
        assert guarded(begin, lambda: tmp_path) == 2
        assert capsys.readouterr().err == ""  # once a job

        class DistBackendError(RuntimeError):
            pass

        def lose_a_peer() -> None:
            raise DistBackendError("Connection closed by peer [127.0.0.1]:1234")

        assert guarded(lose_a_peer, lambda: tmp_path) == 6


def _hold(folder: Path, held: Any) -> None:
    with locked_folder(folder):
        held.set()
        time.sleep(60)


def test_the_lock_of_a_killed_job_is_free(tmp_path):
    held = FORK.Event()
    job = FORK.Process(target=_hold, args=(tmp_path, held))
    job.start()
    try:
        assert held.wait(30)
        with pytest.raises(ConfigError, match=f"pid {job.pid}"), locked_folder(tmp_path):
            pass
    finally:
        job.kill()
        job.join()
    with locked_folder(tmp_path):
        pass


def _try_as_nobody(folder: Path, said: Any) -> None:
    if os.geteuid() == 0:  # root may write anywhere
        os.setuid(65534)
    try:
        with locked_folder(folder):
            said.put("locked")
    except ConfigError as error:
        said.put(str(error))


def test_a_folder_that_cannot_be_written_is_a_settings_error():
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to others
        Path(name).chmod(0o555)
        said = FORK.SimpleQueue()
        job = FORK.Process(target=_try_as_nobody, args=(Path(name) / "run", said))
        job.start()
        answer = said.get()
        job.join()
    assert answer == f"run.dir={name}/run cannot be written: Permission denied"


def test_another_users_run_is_named_as_that():
    if os.geteuid() != 0:
        pytest.skip("needs root to become a second user")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with locked_folder(folder):
            pass
        folder.chmod(0o777)  # as a group shares it
        said = FORK.SimpleQueue()
        job = FORK.Process(target=_try_as_nobody, args=(folder, said))
        job.start()
        answer = said.get()
        job.join()
    assert answer == (
        f"run.dir={name} cannot be written: Permission denied; it holds the run of another user "
        "(uid 0): choose another run.dir"
    )


def test_a_name_that_is_too_long_is_a_settings_error(tmp_path, capsys):
    def begin() -> None:
        with locked_folder(tmp_path / ("x" * 300)):
            pass

    assert guarded(begin, lambda: tmp_path / ("x" * 300)) == 2
    assert "cannot be written: File name too long" in capsys.readouterr().err


def test_a_file_in_the_folders_place_is_a_settings_error(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(ConfigError, match="run cannot be written: File exists"):
        with locked_folder(tmp_path / "run"):
            pass


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_told_of_and_used(tmp_path, monkeypatch, caplog, code):
    # Lustre mounted without -o flock: "Function not implemented"
    def flock(descriptor: int, kind: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(folder_lock.fcntl, "flock", flock)
    monkeypatch.setattr(logging.getLogger("mlip"), "propagate", True)
    with locked_folder(tmp_path):
        assert f"pid {os.getpid()} on" in (tmp_path / "lock").read_text()
    (tmp_path / "prepared").mkdir()
    with sole_writer(prepared := tmp_path / "prepared", (0, 2)) as is_ours:
        assert is_ours
    for folder in (tmp_path, prepared):
        assert f"{folder}: its file system has no locks ({os.strerror(code)})" in caplog.text


def test_shared_locks_stand_side_by_side_and_keep_an_exclusive_one_out(tmp_path):
    files = [(tmp_path / "lock").open("w") for _ in range(3)]
    for file in files[:2]:
        folder_lock.lock(file.fileno(), tmp_path, shared=True)
    with pytest.raises(BlockingIOError):
        folder_lock.lock(files[2].fileno(), tmp_path)
    for file in files:
        file.close()


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


def test_a_launcher_that_is_gone_counts_as_a_request_to_stop():
    stop = StopRequest()
    launcher = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    stop._launcher = lifecycle.psutil.Process(launcher.pid)
    assert not stop.is_set
    launcher.kill()
    launcher.wait()
    assert stop.is_set


def _record_many(folder: Path) -> None:
    for number in range(300):
        record_event(folder, "x", number=number, pad="y" * 500)


def test_events_of_two_writers_stay_whole_lines(tmp_path):
    jobs = [FORK.Process(target=_record_many, args=(tmp_path,)) for _ in range(2)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    events = [json.loads(x) for x in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert len(events) == 600


@pytest.mark.parametrize(
    "fault",
    [
        "kill",
        "kill@0:1",
        "explode@0:1:load",
        "kill@0:1:lunch",
        "nan@0:1:ckpt-write",
        "spike@0:1:backward",
    ],
)
def test_a_fault_that_cannot_fire_is_an_error(tmp_path, monkeypatch, fault):
    # an injector that silently does nothing would let every test of it pass
    monkeypatch.setenv("FAULT", fault)
    with pytest.raises(ConfigError, match="expected kind@rank:step:phase"):
        faults.fire("load", 0, tmp_path)


def test_a_fault_fires_once_at_its_place_and_is_counted(tmp_path, monkeypatch):
    monkeypatch.setenv("FAULT", "error@0:2:backward")
    monkeypatch.setattr(faults, "_fired", set())
    for step, phase in ((1, "backward"), (2, "forward")):
        assert faults.fire(phase, step, tmp_path) is None
    with pytest.raises(RuntimeError, match="fault injected at step 2"):
        faults.fire("backward", 2, tmp_path)
    assert faults.fire("backward", 2, tmp_path) is None
    assert len((tmp_path / "events.jsonl").read_text().splitlines()) == 1


def test_a_port_that_another_run_holds_is_named_with_the_way_out(tmp_path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        # a store listens on every address, so the port alone is what two runs share
        launched = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_PORT": port,
                    "MASTER_ADDR": "127.0.0.1"}  # fmt: skip
        command = [sys.executable, "train.py", f"run.dir={tmp_path / 'run'}", "data.manifest=none"]
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ | launched, capture_output=True, text=True
        )
    assert done.returncode == 2
    assert f"port {port} of this machine is in use" in done.stderr
    assert "deepspeed --master_port N train.py" in done.stderr and "Traceback" not in done.stderr
