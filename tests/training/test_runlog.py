"""What a run leaves to be read: numbers under their names and units, by rank 0, whole, at once."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from rich.console import Console
from rich.logging import RichHandler

from mlip.ranks import distributed
from mlip.settings.config import from_dict, load
from mlip.training import runlog
from mlip.training.runlog import RunLog, setup_logging
from mlip.training.step import StepResult
from tests.training.toy_run import toy_config

FACTS = {
    **{"world_size": 1, "engine": "plain", "precision": "bf16", "threads": 1},
    "determinism": "strict",
}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets what the run's stopwatch shows, in seconds; 100 at first. The date stands still."""
    now = [100.0]
    monkeypatch.setattr(runlog.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(runlog.time, "time", lambda: 1700000000.12345)
    monkeypatch.setattr(runlog, "memory_gib", lambda: 1.23456)
    return lambda seconds: now.__setitem__(0, seconds)


@contextlib.contextmanager
def _stdout() -> Iterator[io.BytesIO]:
    """What has left the process: nothing that Python still holds back."""
    raw = io.BytesIO()
    with contextlib.redirect_stdout(io.TextIOWrapper(raw, encoding="utf-8")):
        yield raw


@pytest.fixture
def own_logger() -> Iterator[logging.Logger]:
    logger = logging.getLogger("mlip")
    kept = logger.handlers[:], logger.propagate, logger.level
    yield logger
    logger.handlers[:], logger.propagate, logger.level = kept


def _heard_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """By caplog alone, also where an earlier test's command has set the logger up."""
    monkeypatch.setattr(logging.getLogger("mlip"), "handlers", [])
    monkeypatch.setattr(logging.getLogger("mlip"), "propagate", True)


def _log(folder: Path, *more: str, steps: int = 7, start_step: int = 0) -> RunLog:
    config = toy_config(f"run.dir={folder}", *more)
    return RunLog(config, total_steps=steps, start_step=start_step)


def _step(log: RunLog, step: int, wait_seconds: float = 0.5, **changed: Any) -> None:
    result: dict[str, Any] = {
        "total": 2.25,
        "terms": {"global_contrastive": 1.5, "own": 0.75},
        "grad_norm": 12.3456,
        "is_skipped": False,
        "stop_requested": False,
        "scales": {"logit": 14.28, "logit_local": 5.0},
    }
    log.step(
        *(step, StepResult(**(result | changed))),
        lr=1e-3,
        epoch=0.123456,
        step_seconds=0.3,
        wait_seconds=wait_seconds,
    )


def _entries(folder: Path) -> list[dict[str, Any]]:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    lines = (folder / "log.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def test_an_entry_holds_the_numbers_of_its_step(tmp_path: Path, clock: Any) -> None:
    log = _log(tmp_path, "batch.global_pairs=8")
    _step(log, 3, wait_seconds=0.123456)
    # read before the end: a script follows a run that goes on
    assert _entries(tmp_path) == [
        {
            "step": 3,
            "epoch": 0.1235,
            "total": 2.25,
            "terms": {"global_contrastive": 1.5, "own": 0.75},
            "grad_norm": 12.3456,
            "lr": 0.001,
            "scales": {"logit": 14.28, "logit_local": 5.0},
            "pairs_per_s": 26.67,
            "data_wait_s": 0.1235,
            "memory_gib": 1.235,
            "time": 1700000000.123,
        }
    ]
    log.close()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_json_has_not_are_null(tmp_path: Path, bad: float) -> None:
    log = _log(tmp_path)
    _step(log, 1, total=bad, terms={"own": bad, "other": 1.0}, grad_norm=bad, is_skipped=True)
    log.close()
    (entry,) = _entries(tmp_path)
    assert entry["total"] is None and entry["grad_norm"] is None and entry["is_skipped"] is True
    assert entry["terms"] == {"own": None, "other": 1.0}


def test_a_resumed_run_keeps_the_log_and_ends_the_line_that_a_kill_cut(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n{"ste')
    log = _log(tmp_path)
    _step(log, 2)
    log.close()
    first, cut, second = (tmp_path / "log.jsonl").read_text().splitlines()
    assert (first, cut, json.loads(second)["step"]) == ('{"step": 1}', '{"ste', 2)


def test_a_line_tells_rate_and_share_of_waiting_since_the_line_before(
    tmp_path: Path, clock: Callable[[float], None]
) -> None:
    log = _log(tmp_path, "train.log_steps=2", "batch.global_pairs=8")
    with _stdout() as stdout:
        for step, seconds in ((1, 100.1), (2, 100.4), (3, 100.5), (4, 100.6), (5, 100.7)):
            clock(seconds)
            _step(log, step, wait_seconds=0.05)
        first, second = stdout.getvalue().decode().splitlines()
    for words in (
        *("step 2/7", "loss 2.2500", "global 1.500", "own 0.750", "scales 14.3/5.0", "grad 12.3"),
        *("lr 1.00e-03", " 40 pairs/s", "data 25 %", "1.23 GiB"),
    ):
        assert words in first
    for words in ("step 4/7", " 80 pairs/s", "data 50 %"):
        assert words in second


@pytest.mark.parametrize(("every", "told"), [(1, [5, 6, 7]), (3, [6, 7]), (100, [7])])
def test_the_last_step_has_a_line_whatever_the_interval(
    tmp_path: Path, every: int, told: list[int]
) -> None:
    log = _log(tmp_path, f"train.log_steps={every}", start_step=4)
    with _stdout() as stdout:
        for step in (5, 6, 7):
            _step(log, step)
        lines = stdout.getvalue().decode().splitlines()
    assert [int(line.split()[1].split("/")[0]) for line in lines] == told


def test_on_a_terminal_lines_and_messages_stand_above_the_bar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_logger: logging.Logger
) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=250)
    monkeypatch.setattr(runlog, "_console", lambda: console)
    setup_logging()
    (handler,) = own_logger.handlers
    assert isinstance(handler, RichHandler) and handler.console is console
    log = _log(tmp_path, "train.log_steps=1", start_step=4)
    assert log._bar is not None and log._bar.console is console
    (task,) = log._bar.tasks
    assert (task.completed, task.total) == (4, 7) and log._bar.live.is_started
    bar = log._bar
    _step(log, 5)
    assert task.completed == 5 and "2.2500" in task.description
    log.close()
    assert not bar.live.is_started
    assert "step 5/7  loss 2.2500" in screen.getvalue()


def test_a_start_leaves_its_command_its_settings_and_an_event(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", "a.yaml", "train.lr=1"])
    _heard_once(monkeypatch)
    log = _log(tmp_path, start_step=4)
    with caplog.at_level("INFO", "mlip"):
        log.start(FACTS)
        log.say("known")
        log.warn("bad")
    said = [(record.levelname, record.message) for record in caplog.records]
    assert said[0][1].startswith("step 4 of 7") and said[1:] == [
        ("INFO", "known"),
        ("WARNING", "bad"),
    ]
    log.close()
    meta = json.loads((tmp_path / "meta.json").read_text())
    assert meta["command"] == ["--config", "a.yaml", "train.lr=1"]
    assert {key: meta[key] for key in FACTS} == FACTS
    assert load([tmp_path / "config.yaml"], []) == log.config
    assert from_dict(meta["config"]) == log.config
    (event,) = map(json.loads, (tmp_path / "events.jsonl").read_text().splitlines())
    assert (event["event"], event["step"], event["total_steps"]) == ("started", 4, 7)


def test_another_rank_than_0_writes_only_events(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, caplog: Any
) -> None:
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    _heard_once(monkeypatch)
    log = _log(tmp_path, "train.log_steps=1")
    with caplog.at_level("INFO", "mlip"):
        log.start(FACTS)
        _step(log, 1)
        log.say("x")
        log.warn("x")
    assert not list(tmp_path.iterdir()) and not capsys.readouterr().out and not caplog.records
    log.event("skipped", step=1)
    log.close()
    assert [path.name for path in tmp_path.iterdir()] == ["events.jsonl"]


@pytest.mark.parametrize(
    ("rank", "shown"), [(0, "known\nbad\n"), (1, "rank 1: bad\n"), (3, "rank 3: bad\n")]
)
def test_messages_of_rank_0_and_warnings_of_the_others_with_their_rank(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, own_logger: logging.Logger, rank: int, shown: str
) -> None:
    monkeypatch.setattr(distributed, "rank", lambda: rank)
    monkeypatch.setattr(runlog, "_console", lambda: Console(force_terminal=False))
    own_logger.propagate = True
    for _ in range(2):  # said once all the same
        setup_logging()
    own_logger.info("known")
    own_logger.warning("bad")
    assert capsys.readouterr().err == shown and not own_logger.propagate


def test_a_full_disk_is_told_of_again_when_it_was_not_full_between(
    tmp_path: Path, caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _heard_once(monkeypatch)
    log = _log(tmp_path)
    there, elsewhere = log.folder, tmp_path / "no" / "folder"
    for folder in (elsewhere, elsewhere, there, elsewhere):
        log.folder = folder
        log.event("x")
    log.close()
    told = [record.message for record in caplog.records]
    assert len(told) == 2 and all(text.startswith("events.jsonl cannot be") for text in told)


def test_memory_is_the_gpus_peak_or_what_the_process_holds_in_gib(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    held = psutil.Process().memory_info().rss / 2**30
    assert runlog.memory_gib() == pytest.approx(held, rel=0.2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 2**30)
    assert runlog.memory_gib() == 3.0
