"""How a run starts and ends: the lock on its folder, its events, exit codes.

Exit codes, equal on all ranks where ranks agree: 0 done, 2 settings, 3 data, 4 checkpoint,
5 numbers, 6 a peer is gone or silent, 75 stopped on request with everything saved (75 is
EX_TEMPFAIL of sysexits.h: try again later), 130 interrupted at once, 1 anything else.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import secrets
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import psutil

from mlip.ranks import distributed
from mlip.settings.config import ConfigError
from mlip.settings.config_file import CHECKPOINTS
from mlip.system.folder_lock import is_seen, lock, open_lock, release
from mlip.system.machine import limit_reached
from mlip.system.output_file import new_file, open_to_append, refusal, require_renames
from mlip.system.unread_output import one_line, unread_output_is_lost
from mlip.training import presence

CONFIG, DATA, CHECKPOINT, NUMERIC, PEER, PREEMPTED = 2, 3, 4, 5, 6, 75
_REASONS = {
    CONFIG: "settings",
    DATA: "data",
    CHECKPOINT: "checkpoint",
    NUMERIC: "numbers",
    PEER: "peer",
}
# a run adds to them: what stands under their names is told of before the first line is lost
_OF_LINES = ("events.jsonl", "log.jsonl", "validation.jsonl")
_job = ""  # what its ranks have agreed on: the folder also holds words of earlier jobs


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, read, or used with these settings."""

    exit_code = CHECKPOINT


class NumericError(RuntimeError):
    """Losses or gradients stayed non-finite."""

    exit_code = NUMERIC


class Preempted(Exception):
    """The run was asked to stop and has saved its state."""

    exit_code = PREEMPTED


class FolderInUse(ConfigError):
    """Another job holds run.dir. This one leaves nothing there: the other's ranks read its events
    to tell why a peer is gone, and a word of a stranger would change their exit code."""


# What gloo, NCCL and torch.distributed say when a peer died or did not answer in time.
_PEER_WORDS = re.compile(
    r"gloo|NCCL|peer|[Tt]imed? ?out|Connection (closed|reset|refused)|Broken pipe|"
    r"ProcessGroup|store.*(wait|get)"
)
# gloo names its source file: ZeRO-3 waits for a gather outside any function of torch.distributed
_GLOO = re.compile(r"^\[[^\]]*/gloo/[^\]]*\]")


def exit_code(error: BaseException) -> int:
    """The stable code of an error; errors of ours carry theirs as `exit_code`."""
    code = getattr(error, "exit_code", None)
    if isinstance(code, int):
        return code
    module = type(error).__module__
    if module.startswith("torch.distributed") or type(error).__name__.startswith("Dist"):
        return PEER
    if isinstance(error, RuntimeError) and _PEER_WORDS.search(str(error)):
        return PEER if _GLOO.search(str(error)) or _is_from_collective(error) else 1
    return CONFIG if isinstance(error, ValueError) else 1


def _is_from_collective(error: BaseException) -> bool:
    frames = traceback.extract_tb(error.__traceback__)
    return any("distributed" in f.filename or "deepspeed/comm" in f.filename for f in frames)


def guarded(function: Callable[[], None], folder: Callable[[], Path | None]) -> int:
    """Run `function`; its errors become one line on stderr, an event, and an exit code.

    Lines that nobody takes are lost; they end nothing.

    The traceback goes to error-rank<r>.log in the run's folder; where there is none, that of an
    unexpected error to stderr.
    """
    with unread_output_is_lost():
        return _guarded(function, folder)


def _guarded(function: Callable[[], None], folder: Callable[[], Path | None]) -> int:
    global _job
    _job = ""
    try:
        function()
        return 0
    except Preempted as stop:
        if _rank() == 0:
            print(f"mlip: {stop}", file=sys.stderr)
        return PREEMPTED
    except KeyboardInterrupt:
        print("mlip: interrupted", file=sys.stderr)
        return 130  # 128 + SIGINT, as shells report it
    except Exception as error:
        code, caught = exit_code(error), round(time.time(), 3)
        if code == 1 and (told := limit_reached(error) or refusal(error, None)):
            code = CONFIG
        else:
            told = str(error)
        # at once: other survivors end soon, and would look missing too
        explained = presence.explain(error) if code == PEER else None
        place = None if isinstance(error, FolderInUse) else folder()
        cause = _first_failure(place) if code == PEER and place is not None else None
        if cause is not None:
            code = int(cause["code"])
            told = f"rank {cause['rank']} on {cause.get('host')} ended with it; its line says why"
        more = {"caught": caught, "waited": explained, "host": socket.gethostname(), "job": _job}
        _report(error, told, code, place, more, cause)
        return code


def leave(code: int) -> NoReturn:
    """End this process with `code` at once, its output written.

    The interpreter's own shutdown can abort inside the communication library's threads, after a
    success as after a stop or a lost peer: the launcher would then see SIGABRT and not the code.
    """
    logging.raiseExceptions = False  # MLflow's handler flushes a stderr that was closed: None
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        # closed from the start, or a terminal, a pipe or a disk that takes no more
        with contextlib.suppress(OSError, AttributeError):
            stream.flush()
    os._exit(code)


def _rank() -> int:
    given = os.environ.get("RANK", "")
    return int(given) if given.isdecimal() else 0  # the run says what is wrong with it


def _report(
    error: Exception,
    line: str,
    code: int,
    folder: Path | None,
    more: Mapping[str, Any],
    cause: Mapping[str, Any] | None,
) -> None:
    reason = _REASONS.get(code, "unexpected")
    if isinstance(error, FolderInUse) and _rank() != 0:
        return  # rank 0 says the same
    text = one_line(line) or type(error).__name__
    if more["waited"] is not None and cause is None:
        text = f"{more['waited']}: {text}"
    where = ""
    facts = {"code": code, "error": type(error).__name__, "text": _hash(text)}
    if folder is not None:
        with contextlib.suppress(OSError):  # there is none, or no room
            log = folder / f"error-rank{_rank()}.log"
            lines = "".join(traceback.format_exception(error))
            # as stderr does: a file's name of other bytes is no Unicode
            with os.fdopen(new_file(log), "wb") as file:
                file.write(lines.encode("utf-8", "backslashreplace"))
            if cause is not None:
                log = folder / f"error-rank{cause['rank']}.log"
            where = f" (traceback: {log})"
            told = {key: value for key, value in more.items() if value is not None}
            record_event(folder, "error", reason=reason, **facts, **told)
            if _rank() != 0 and _find_event(folder, 1.0, lambda e: _is_same(e, facts)):
                return  # rank 0 says the same
    if not where and code == 1:
        traceback.print_exception(error)
    print(f"mlip: {reason} error on rank {_rank()}: {text}{where}", file=sys.stderr)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()[:12]


def _is_same(event: Mapping[str, Any], facts: Mapping[str, Any]) -> bool:
    return event["rank"] == 0 and all(event.get(key) == facts[key] for key in facts)


def record_event(folder: Path, kind: str, **facts: Any) -> None:
    """Append one line to events.jsonl; a single write, so that ranks do not mix their lines."""
    entry = {"time": round(time.time(), 3), "rank": _rank(), "event": kind, **facts}
    line = json.dumps(entry, allow_nan=False) + "\n"
    descriptor = open_to_append(folder / "events.jsonl", 0o600)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)


def _first_failure(folder: Path) -> dict[str, Any] | None:
    """The error event of the rank whose own error took this one's peer away, if it left word.

    Launchers report whichever rank they look at first: so all ranks end with the cause's code.
    """
    # the other rank writes its event within milliseconds
    return _find_event(folder, 2.0, lambda e: e["rank"] != _rank() and e["code"] != PEER)


def _find_event(
    folder: Path, wait_s: float, wanted: Callable[[Mapping[str, Any]], bool]
) -> dict[str, Any] | None:
    """An error event of this job that is wanted, waiting for it.

    Before its ranks have agreed on a name, of the time since this process began: clocks of two
    hosts may be hours apart.
    """
    started = psutil.Process().create_time()

    def is_ours(event: Mapping[str, Any]) -> bool:
        return event.get("job") == _job if _job else bool(event["time"] >= started)

    deadline = time.monotonic() + wait_s
    while True:
        with contextlib.suppress(OSError):
            for line in (folder / "events.jsonl").read_bytes().splitlines():
                # network file systems let lines of two nodes, appended at once, cover each other
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    event: dict[str, Any] = json.loads(line)
                    if event["event"] == "error" and is_ours(event) and wanted(event):
                        return event
        if time.monotonic() >= deadline:
            return None
        time.sleep(0.1)


@contextlib.contextmanager
def locked_folder(folder: Path, timeout_s: float = 300.0) -> Iterator[None]:
    """The run's folder, held by this job alone; the kernel frees it when the job dies.

    timeout_s  run.timeout_s
    Raises:    FolderInUse on every rank where another job holds it; ConfigError where it cannot be
               written, or is not one folder for all nodes.
    """
    kind: type[ConfigError] = ConfigError
    problem, descriptor = None, -1
    mark = secrets.token_hex(8)
    if distributed.is_main():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = open_lock(folder / "lock", 0o600)
            lock(descriptor, folder)
            os.ftruncate(descriptor, 0)
            owner = f"pid {os.getpid()} on {socket.gethostname()}"
            os.write(descriptor, f"{owner}\n{mark}\n".encode())
            os.fsync(descriptor)  # other nodes read it while it is open here
            for lines in filter(os.path.lexists, (folder / name for name in _OF_LINES)):
                os.close(open_to_append(lines))
            _try_checkpoints(folder)
        except BlockingIOError:
            owner = os.read(descriptor, 200).decode(errors="replace").split("\n")[0]
            kind = FolderInUse
            problem = f"run.dir={folder} is in use by another job ({owner}); choose another run.dir"
        except OSError as error:
            problem = f"run.dir={folder} cannot be written: {error.strerror}{_foreign(folder)}"
        except ConfigError as error:
            problem = f"run.dir={error}"
    global _job
    kind, problem, mark = distributed.broadcast_object((kind, problem, mark))
    _job = mark
    try:
        if problem is not None:
            raise kind(problem)
        _require_one_folder(folder, mark, timeout_s)
        yield
    finally:
        if descriptor >= 0:
            release(descriptor)


def _try_checkpoints(run_dir: Path) -> None:
    """Raises:  OSError, ConfigError where their folder, or what is to hold it, takes none.

    A link to a disk that is not mounted looks like a run that has saved nothing: it would begin
    anew, and lose at its first save what it has trained.
    """
    folder = run_dir / CHECKPOINTS
    if not os.path.lexists(folder):
        require_renames(run_dir)
        return
    try:
        require_renames(folder)
    except OSError as error:
        reason = f"its {folder.name} takes no file: {error.strerror}"
        raise OSError(error.errno, reason, str(folder)) from None


def _require_one_folder(folder: Path, mark: str, timeout_s: float) -> None:
    """A run would train on folders of two disks, and fail at its first resume.

    Raises:  ConfigError on every rank where one does not see rank 0's mark.
    """

    def is_there() -> bool:
        with contextlib.suppress(OSError):
            os.listdir(folder.parent)  # a network file system looks again
            return mark in (folder / "lock").read_text(encoding="utf-8", errors="replace")
        return False

    sees = distributed.is_main() or is_seen(is_there, timeout_s)
    told = distributed.gather_objects((sees, socket.gethostname(), str(folder.absolute())))
    for rank, (is_same, host, place) in enumerate(told):
        if not is_same:
            raise ConfigError(
                f"run.dir: rank {rank} on {host} does not see in {place} what rank 0 on "
                f"{told[0][1]} has written to {told[0][2]}; set run.dir to a folder on a disk that "
                "all nodes share, by its whole path"
            )


def _foreign(folder: Path) -> str:
    """What to say of a folder that another user's run holds: its files are open to that one only"""
    with contextlib.suppress(OSError):
        owner = (folder / "lock").stat().st_uid
        if owner != os.geteuid():
            return f"; it holds the run of another user (uid {owner}): choose another run.dir"
    return ""
