"""The scoreboard is made of outcomes on disk: passed, failed and not run are told apart."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.bench_reliability import (
    PAGE,
    PATHS,
    ROWS,
    Recorder,
    as_block,
    processor_seconds,
    read,
    scoreboard,
    show,
)


def _outcome(outcome: str = "passed", **figures: float) -> dict[str, object]:
    return {"outcome": outcome, "seconds": 1.0, "figures": figures, "commit": "abc"}


def test_a_row_without_an_outcome_says_not_run():
    assert all(reached.startswith("not run") for _, _, reached in scoreboard({}))
    assert "not run" in show({})


def test_one_failure_turns_its_row_red_and_no_other():
    name = "tests/faults/test_process.py::test_kill_of_each_rank_at_each_phase[0-load-1]"
    held = {
        name: _outcome("failed"),
        name.replace("0-load", "1-load"): _outcome(steps_lost=2.0, notice_s=0.1, fired=1),
        "tests/faults/test_storage.py::test_fifty_truncations": _outcome(caught=50),
    }
    lines = {figure: reached for figure, _, reached in scoreboard(held)}
    assert lines["F01 kill -9 of each rank at each phase x 3 seeds"] == "FAILED 1 of 2"
    assert lines["F05 truncations caught"] == "50 of 50"
    held[name] = _outcome(steps_lost=3.0, notice_s=0.2, fired=1)
    lines = {figure: reached for figure, _, reached in scoreboard(held)}
    reached = lines["F01 kill -9 of each rank at each phase x 3 seeds"]
    assert reached == "2 of 2; at most 3 steps lost"


def test_a_skipped_test_is_not_run():
    name = "tests/faults/test_goodput.py::test_goodput_under_kills"
    lines = {f: r for f, _, r in scoreboard({name: _outcome("skipped")})}
    assert lines["goodput, kill every 120 s for 10 min"] == "not run"


def test_every_row_belongs_to_tests_that_exist():
    # a renamed test would silently leave its row at "not run" for ever
    root = Path(__file__).resolve().parents[2]
    for row in ROWS:
        for start in row.tests:
            file, _, beginning = start.partition("::")
            files = sorted((root / file).glob("*.py")) if file.endswith("/") else [root / file]
            assert any(f"def {beginning}" in f.read_text() for f in files), start
            assert any(file == path or file.startswith(f"{path}/") for path in PATHS), start


def test_the_page_shows_the_outcomes_on_disk():
    # a run of bench_reliability.py puts them there
    assert as_block(read()) in PAGE.read_text(encoding="utf-8")


def test_outcomes_are_kept_from_run_to_run_and_survive_a_kill(tmp_path):
    path = tmp_path / "out.json"

    def record(name: str, outcome: str) -> None:
        report = pytest.TestReport(
            name, ("", 0, ""), {}, outcome, None, "call",  # type: ignore[arg-type]
            user_properties=[("cases", 3)], duration=0.5,
        )  # fmt: skip
        recorder = Recorder(path)
        recorder.pytest_runtest_logreport(report)
        assert name not in read(path) or read(path)[name]["outcome"] != outcome  # not yet
        recorder.pytest_runtest_logfinish()

    record("a", "passed")
    record("b", "failed")
    record("a", "failed")
    held = read(path)
    assert {n: o["outcome"] for n, o in held.items()} == {"a": "failed", "b": "failed"}
    assert held["a"]["figures"] == {"cases": 3}


def test_a_test_with_a_clock_or_processes_of_its_own_ends_no_run(tmp_path, monkeypatch):
    recorder = Recorder(tmp_path / "out.json")
    recorder.pytest_runtest_logstart()
    with monkeypatch.context() as test:
        test.setattr("psutil.Process", lambda *arguments: SimpleNamespace())
        test.setattr("time.monotonic", lambda: -1e9)
        report = pytest.TestReport(
            "a", ("", 0, ""), {}, "passed", None, "call",
        )  # fmt: skip
        recorder.pytest_runtest_logreport(report)  # before the test's own are taken back
    recorder.pytest_runtest_logfinish()
    assert 0.0 <= read(tmp_path / "out.json")["a"]["seconds"] < 60.0


def test_missing_leaves_out_what_has_passed_or_was_skipped_and_nothing_else(tmp_path):
    path = tmp_path / "out.json"
    held = {name: _outcome(name) for name in ("passed", "skipped", "failed")}
    path.write_text(json.dumps(held))
    left_out: list[SimpleNamespace] = []
    hook = SimpleNamespace(pytest_deselected=lambda items: left_out.extend(items))
    config = SimpleNamespace(hook=hook)

    def collected(*, missing: bool) -> list[str]:
        items = [SimpleNamespace(nodeid=n) for n in ("passed", "failed", "skipped", "new")]
        Recorder(path, missing=missing).pytest_collection_modifyitems(config, items)  # type: ignore[arg-type]
        return [item.nodeid for item in items]

    assert collected(missing=False) == ["passed", "failed", "skipped", "new"] and not left_out
    assert collected(missing=True) == ["failed", "new"]
    assert [item.nodeid for item in left_out] == ["passed", "skipped"]


def test_processor_time_counts_children_that_have_ended():
    before = processor_seconds()
    busy = "import time\nend = time.process_time() + 0.3\nwhile time.process_time() < end: pass"
    subprocess.run([sys.executable, "-c", busy], check=True)
    assert processor_seconds() - before >= 0.3
