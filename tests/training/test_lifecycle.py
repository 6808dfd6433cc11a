"""How a run ends: exit codes, one line on stderr, the folder's lock."""

from __future__ import annotations

import errno
import json
import logging
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from mlip.dataloading.prepare.output_folder import sole_writer
from mlip.saved.weights import PretrainedError
from mlip.settings.config import ConfigError
from mlip.system import folder_lock
from mlip.training import faults, lifecycle
from mlip.training.lifecycle import (
    CheckpointError,
    NumericError,
    Preempted,
    exit_code,
    guarded,
    locked_folder,
    record_event,
)

ROOT = Path(__file__).resolve().parents[2]
FORK = multiprocessing.get_context("fork")  # a spawned one would import torch first


@pytest.fixture(autouse=True)
def _no_job_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifecycle, "_job", "")


class _DataError(RuntimeError):
    exit_code = 3


class _OddError(ValueError):
    exit_code = "a library's own, no number"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("x"), 2),
        (ValueError("x"), 2),
        (_DataError("x"), 3),
        (CheckpointError("x"), 4),
        (PretrainedError("x"), 4),
        (NumericError("x"), 5),
        (RuntimeError("x"), 1),
        (RuntimeError("timed out while thinking"), 1),  # not said by a collective
        # ZeRO-3 waits for a gather in a file of DeepSpeed's that is none of its collectives
        (RuntimeError("[/x/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer"), 6),
        (Preempted("x"), 75),
        (KeyError("x"), 1),
        (_OddError("x"), 2),
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


@pytest.mark.parametrize(
    ("kind", "text", "file", "code"),
    [
        *(
            (RuntimeError, text, f"torch/distributed/{name}.py", 6)
            for text in ("Connection closed by peer", "NCCL error", "Timed out")
            for name in ("c10d", "store")
        ),
        (RuntimeError, "Broken pipe", "deepspeed/comm/comm.py", 6),
        (RuntimeError, "Broken pipe", "deepspeed/runtime/engine.py", 1),
        (RuntimeError, "x", "torch/distributed/c10d.py", 1),
        (ValueError, "timeout must be positive", "torch/distributed/c10d.py", 2),
    ],
)
def test_a_lost_peer_is_what_a_collective_says_of_it(kind, text, file, code):
    names = {"kind": kind}
    exec(compile(f"def call(): raise kind({text!r})", f"/x/{file}", "exec"), names)
    with pytest.raises(kind) as caught:
        names["call"]()
    assert exit_code(caught.value) == code


@pytest.mark.parametrize("kind", [dist.DistNetworkError, dist.DistBackendError])
def test_the_errors_of_torch_distributed_are_6(kind):
    assert exit_code(kind("x")) == 6


def test_ctrl_c_is_130_and_leaves_no_error(tmp_path, capsys):
    def interrupt():
        raise KeyboardInterrupt

    assert guarded(interrupt, lambda: tmp_path) == 130
    assert capsys.readouterr().err.startswith("mlip: ") and not list(tmp_path.iterdir())


def test_a_stop_is_said_by_rank_0_alone(tmp_path, capsys, monkeypatch):
    def stop():
        raise Preempted("stopped at step 7")

    for rank, said in (("1", ""), ("0", "mlip: stopped at step 7\n"), ("", "mlip: stopped at")):
        monkeypatch.setenv("RANK", rank)
        assert guarded(stop, lambda: tmp_path) == 75
        assert capsys.readouterr().err.startswith(said) and (said or not capsys.readouterr().err)


def test_what_all_ranks_say_is_printed_by_rank_0_and_what_one_says_by_itself(
    tmp_path, capsys, monkeypatch
):
    def fail():
        raise CheckpointError(text)

    monkeypatch.setenv("RANK", "1")
    for text, is_rank_0s in (("of all", True), ("of rank 1", False)):
        word = lifecycle._hash("of all")
        record_event(tmp_path, "error", code=4, error="CheckpointError", text=word)
        entry = json.loads((tmp_path / "events.jsonl").read_text()) | {"rank": 0}
        (tmp_path / "events.jsonl").write_text(json.dumps(entry) + "\n")
        assert guarded(fail, lambda: tmp_path) == 4
        said = capsys.readouterr().err
        assert bool(said) != is_rank_0s and ("error on rank 1: of rank 1" in said) != is_rank_0s
        mine = json.loads((tmp_path / "events.jsonl").read_text().splitlines()[1])
        assert (mine["rank"], mine["code"], mine["reason"]) == (1, 4, "checkpoint")
        assert mine["text"] == lifecycle._hash(text)
        assert abs(mine["caught"] - time.time()) < 30 and "waited" not in mine
        (tmp_path / "events.jsonl").unlink()
    assert "of rank 1" in (tmp_path / "error-rank1.log").read_text()


def test_an_error_without_words_is_called_by_its_kind(tmp_path, capsys):
    def fail():
        raise CheckpointError

    assert guarded(fail, lambda: tmp_path) == 4
    assert "error on rank 0: CheckpointError (" in capsys.readouterr().err


def test_a_lost_peer_is_named_with_the_collective(tmp_path, capsys, monkeypatch):
    def fail():
        raise RuntimeError("[/x/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer")

    monkeypatch.setattr(lifecycle.presence, "explain", lambda error: "in all_gather: rank 3")
    assert guarded(fail, lambda: tmp_path) == 6
    assert "peer error on rank 0: in all_gather: rank 3: [/x/gloo" in capsys.readouterr().err
    (event,) = map(json.loads, (tmp_path / "events.jsonl").read_text().splitlines())
    assert (event["reason"], event["waited"]) == ("peer", "in all_gather: rank 3")
    assert guarded(fail, lambda: None) == 6


def test_files_of_a_run_that_others_act_on_are_their_owners_alone(tmp_path):
    folder = tmp_path / "runs" / "of-today"  # made, as far as it is not there
    before = os.umask(0)
    try:
        with locked_folder(folder):
            record_event(folder, "x")
    finally:
        os.umask(before)
    for name in ("lock", "events.jsonl"):
        assert (folder / name).stat().st_mode & 0o777 == 0o600, name


def test_another_rank_than_0_closes_no_file_of_its_process(tmp_path, monkeypatch):
    (tmp_path / "lock").write_text("pid 1 on a\nmark\n")
    monkeypatch.setattr(lifecycle.distributed, "is_main", lambda: False)
    told = (ConfigError, None, "mark")
    monkeypatch.setattr(lifecycle.distributed, "broadcast_object", lambda mine: told)
    with locked_folder(tmp_path):
        pass
    for descriptor in range(3):
        os.fstat(descriptor)


def test_an_event_is_a_line_with_time_rank_and_facts(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    files = len(os.listdir("/proc/self/fd"))
    for step in (1, 2):
        record_event(tmp_path, "saved", step=step)
    assert len(os.listdir("/proc/self/fd")) == files  # a run of a million steps has 1,024
    first, second = map(json.loads, (tmp_path / "events.jsonl").read_text().splitlines())
    assert abs(first.pop("time") - time.time()) < 30
    assert first == {"rank": 3, "event": "saved", "step": 1} and second["step"] == 2
    with pytest.raises(ValueError, match="JSON"):  # no reader of JSON knows NaN
        record_event(tmp_path, "saved", loss=float("nan"))


@pytest.mark.parametrize(
    ("error", "has_folder", "code", "is_traced"),
    [
        (KeyError("who knows"), False, 1, True),
        (KeyError("who knows"), True, 1, False),
        (CheckpointError("no room"), False, 4, False),
        (CheckpointError("no room"), True, 4, False),
    ],
)
def test_only_an_unexpected_error_without_a_folder_shows_its_traceback(
    tmp_path, capsys, error, has_folder, code, is_traced
):
    def fail():
        raise error

    for place in (tmp_path, tmp_path / "gone") if has_folder else (None,):
        assert guarded(fail, lambda: place) == code  # noqa: B023
        said = capsys.readouterr().err
        assert f"error on rank 0: {error}" in said
        assert ("Traceback" in said) == (is_traced or (code == 1 and place != tmp_path))


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (RuntimeError("can't start new thread"), "ulimit -u"),
        (MemoryError("Unable to allocate 4.00 TiB"), "Unable to allocate 4.00 TiB"),
        (OSError(errno.ENOSPC, "No space left on device", "/run/report.html"), "/run/report.html"),
    ],
)
def test_a_limit_and_a_full_disk_are_a_line_and_no_unexpected_error(tmp_path, capsys, error, told):
    def fail():
        raise error

    for place in (tmp_path, None):
        assert guarded(fail, lambda: place) == 2  # noqa: B023
        said = capsys.readouterr().err
        assert "settings error on rank 0: " in said and told in said and said.count("\n") == 1


def test_an_error_is_told_where_its_file_has_no_room_and_its_text_is_no_unicode(
    tmp_path, capsys, monkeypatch
):
    """The latter ended in a UnicodeEncodeError and another exit code."""

    def fail():
        raise CheckpointError("cannot read x\udcff")  # as Python reads names of other bytes

    assert guarded(fail, lambda: tmp_path) == 4
    assert (tmp_path / "events.jsonl").is_file()
    monkeypatch.setattr(lifecycle, "new_file", lambda path: os.open("/dev/full", os.O_WRONLY))
    capsys.readouterr()
    assert guarded(fail, lambda: tmp_path) == 4
    assert "checkpoint error on rank 0: cannot read x" in capsys.readouterr().err


def test_a_traceback_is_written_through_no_link(tmp_path):
    """The file that one of that name led to was lost."""

    def fail():
        raise CheckpointError("cannot go on")

    precious, log = tmp_path / "precious", tmp_path / "error-rank0.log"
    precious.write_text("kept")
    log.symlink_to(precious)
    assert guarded(fail, lambda: tmp_path) == 4
    assert precious.read_text() == "kept" and "cannot go on" in log.read_text()


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


def test_the_rank_whose_error_ended_all_is_named_and_not_what_gloo_says_of_it(
    tmp_path, monkeypatch, capsys
):
    """Rank 0 said "data error: Connection closed by peer", and nothing of the node it came from."""
    monkeypatch.setenv("RANK", "1")

    def fail():
        raise ConfigError("no images here")

    assert guarded(fail, lambda: tmp_path) == 2
    monkeypatch.setenv("RANK", "0")
    capsys.readouterr()

    def lose():
        raise RuntimeError("[/x/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer")

    assert guarded(lose, lambda: tmp_path) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"mlip: settings error on rank 0: rank 1 on {socket.gethostname()} ")
    assert "error-rank1.log" in line and "gloo" not in line
    assert "gloo" in (tmp_path / "error-rank0.log").read_text()


def test_what_a_job_wrote_is_told_by_its_name_and_not_by_another_hosts_clock(tmp_path, monkeypatch):
    """An hour slow, the cause was not found; an hour fast, that of an earlier job was taken."""

    def lose():
        raise RuntimeError("[/x/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer")

    def word(hours: float, code: int) -> None:
        monkeypatch.setenv("RANK", "1")
        with monkeypatch.context() as host:
            host.setattr(lifecycle.time, "time", lambda: 3600.0 * hours + real())
            record_event(tmp_path, "error", code=code, job=lifecycle._job)
        monkeypatch.setenv("RANK", "0")

    def run(*words: tuple[float, int]) -> None:
        with locked_folder(tmp_path):
            for hours, code in words:
                word(hours, code)
            lose()

    real = time.time
    monkeypatch.setattr(lifecycle, "_job", "the one before")
    word(1.0, 3)
    assert guarded(lambda: run(), lambda: tmp_path) == 6
    assert guarded(lambda: run((-1.0, 4)), lambda: tmp_path) == 4


def test_a_rank_whose_peer_left_no_word_ends_with_6(tmp_path, monkeypatch):
    record_event(tmp_path, "error", code=3, error="DataError", text="0")
    old = json.loads((tmp_path / "events.jsonl").read_text()) | {"time": 1.0, "rank": 1}
    (tmp_path / "events.jsonl").write_text(json.dumps(old) + "\n")  # of an earlier run

    class DistBackendError(RuntimeError):
        pass

    def fail():
        raise DistBackendError("Connection closed by peer [127.0.0.1]:1234")

    assert guarded(fail, lambda: tmp_path) == 6


@pytest.fixture
def naps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The naps that were taken, in seconds, by a clock that nothing else moves."""
    taken: list[float] = []
    monkeypatch.setattr(lifecycle.time, "sleep", taken.append)
    monkeypatch.setattr(lifecycle.time, "monotonic", lambda: 100.0 + sum(taken))
    return taken


@pytest.mark.parametrize(("rank", "code", "found"), [(0, 3, 3), (0, 6, 6), (1, 3, 6)])
def test_only_another_ranks_own_error_is_the_cause(tmp_path, monkeypatch, naps, rank, code, found):
    """Survivors leave 6 themselves, and a rank's first error is no other's."""
    monkeypatch.setenv("RANK", str(rank))
    record_event(tmp_path, "saved", code=4)  # no error
    record_event(tmp_path, "error", code=code, error="DataError", text="0")
    monkeypatch.setenv("RANK", "1")
    assert (lifecycle._first_failure(tmp_path) or {"code": 6})["code"] == found
    assert sum(naps) == pytest.approx(0 if found == 3 else 2)


def test_a_cause_that_is_written_a_little_later_is_found(tmp_path, monkeypatch, naps):
    def sleep(seconds: float) -> None:
        naps.append(seconds)
        if len(naps) == 3:
            record_event(tmp_path, "error", code=5, error="NumericError", text="0")

    monkeypatch.setattr(lifecycle.time, "sleep", sleep)
    found = lifecycle._find_event(tmp_path, 60.0, lambda event: event["code"] == 5)
    assert found is not None and len(naps) == 3


def test_the_lock_names_its_present_owner_and_nothing_of_an_earlier_one(tmp_path):
    (tmp_path / "lock").write_text("pid 4194304 on a-host-of-a-long-name\n" + "0" * 99)
    with locked_folder(tmp_path):
        owner, mark = (tmp_path / "lock").read_text().splitlines()
        assert owner == f"pid {os.getpid()} on {socket.gethostname()}" and len(mark) == 16
        with pytest.raises(ConfigError) as caught, locked_folder(tmp_path):
            pass
    assert str(caught.value) == (
        f"run.dir={tmp_path} is in use by another job ({owner}); choose another run.dir"
    )


@pytest.mark.parametrize("mark", ["the mark", "another"])
def test_a_rank_sees_rank_0s_mark_or_the_run_ends(tmp_path, monkeypatch, mark):
    (tmp_path / "lock").write_text(f"pid 1 on a\n{mark}\n")
    monkeypatch.setattr(lifecycle.distributed, "is_main", lambda: False)
    told: list[Any] = []

    def gather(mine: Any) -> list[Any]:
        told.append(mine)
        return [(True, "a", "/there"), mine]

    monkeypatch.setattr(lifecycle.distributed, "gather_objects", gather)
    if mark == "the mark":
        lifecycle._require_one_folder(tmp_path, "the mark", 0.0)
    else:
        place = f"rank 1 on {socket.gethostname()} does not see in {tmp_path} what rank 0 on a has"
        with pytest.raises(ConfigError, match=place):
            lifecycle._require_one_folder(tmp_path, "the mark", 0.0)
    assert told == [(mark == "the mark", socket.gethostname(), str(tmp_path))]


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


@pytest.mark.parametrize(
    ("stands", "told"),
    [
        (lambda path: path.write_text(""), "Not a directory"),
        # a disk that is not mounted: the run looked as if nothing were saved, and began anew
        (lambda path: path.symlink_to("/not/mounted"), "No such file or directory"),
    ],
    ids=["file", "link to nowhere"],
)
def test_what_takes_no_checkpoint_is_found_before_the_training(tmp_path, stands, told):
    """It was found at the last save, after all steps, and they were lost."""
    stands(tmp_path / "checkpoints")
    with pytest.raises(ConfigError, match=f"cannot be written: its checkpoints takes.*: {told}"):
        with locked_folder(tmp_path):
            pass


def test_checkpoints_may_lie_on_another_disk(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "disk")
    with locked_folder(tmp_path / "run"):
        assert not list((tmp_path / "disk").iterdir())


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
        told = f"{folder}: its file system has no locks ({os.strerror(code)})"
        # records, as a logger that an earlier run closed off hands each line on twice
        records = {id(record) for record in caplog.records if told in record.getMessage()}
        assert len(records) == 1  # the second holds two


def test_shared_locks_stand_side_by_side_and_keep_an_exclusive_one_out(tmp_path):
    files = [(tmp_path / "lock").open("w") for _ in range(3)]
    for file in files[:2]:
        folder_lock.lock(file.fileno(), tmp_path, shared=True)
    with pytest.raises(BlockingIOError):
        folder_lock.lock(files[2].fileno(), tmp_path)
    for file in files:
        file.close()


class _ToStderr(logging.Handler):
    """As MLflow's: it takes sys.stderr to be there."""

    def flush(self):
        sys.stderr.flush()


def test_leaving_writes_what_was_said_and_gives_the_code():
    readable, writable = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            sys.stdout, sys.stderr = open(writable, "w"), None  # one held back, one closed
            sys.stdout.write("last words")
            logging.getLogger("mlip").addHandler(_ToStderr())
            lifecycle.leave(75)
        finally:
            os._exit(1)  # or a second pytest would go on from here
    os.close(writable)
    with open(readable) as said:
        assert said.read() == "last words"
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 75


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
