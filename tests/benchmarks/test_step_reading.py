"""The step fed by the real loader: every source gives steps, and a wait is seen."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import step_reading
from benchmarks.step_batch import made_batch
from benchmarks.step_reading import FEEDS, FedRunner
from benchmarks.step_timing import Runner
from mlip import assembly
from mlip.batch import Batch
from tests.benchmarks.step_bench import shared_bench


def test_the_step_is_fed_by_the_real_loader_from_shards_and_from_full_size_files(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("nvidia.dali", reason="nvidia.dali is not installed")
    bench = shared_bench()
    monkeypatch.setattr(bench, "rows", [])
    bench.reading()
    assert [row["variant"] for row in bench.rows] == list(FEEDS)
    assert [row["status"] for row in bench.rows] == ["ok"] * len(FEEDS)
    for row in bench.rows:
        assert row["step_ms"] > 0 and row["held_step_ms"] > 0 and row["wait_ms"] >= 0
        assert row["pairs_per_s"] == pytest.approx(1e3 * row["pairs"] / row["step_ms"])


@pytest.mark.parametrize(("seconds", "status"), [(60, "not run: out of time"), (95, "ok")])
def test_no_row_begins_with_less_time_than_its_studies_take_to_be_made(
    seconds: int, status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2,048 of them take a core nearly a minute: the first row was begun with half of one left."""
    bench = shared_bench()

    def fed(data: step_reading.Data, *_: Any) -> dict[str, Any]:
        (data.folder / "studies").mkdir(exist_ok=True)
        monkeypatch.setattr(bench, "deadline", time.monotonic() + 40)  # enough once they are there
        return {}

    for name, value in {"rows": [], "is_gpu": True, "_fed": fed, "_let_go": lambda: None}.items():
        monkeypatch.setattr(bench, name, value)
    monkeypatch.setattr(bench, "deadline", time.monotonic() + seconds)
    bench.reading()
    assert [row["status"] for row in bench.rows] == [status] * len(FEEDS)


def test_a_slow_loader_is_waited_for_and_each_of_its_batches_is_a_step_s() -> None:
    bench = shared_bench()
    batch = made_batch(bench.config, 4, vocab_size=bench.vocab_size, concepts=bench.concepts)

    class Slow:
        wait_seconds = 0.02

        def __init__(self) -> None:
            self.taken = 0

        def __next__(self) -> Batch:
            self.taken += 1
            return batch

    loader = Slow()
    runner = FedRunner(bench.engine, loader)
    times = runner.times_ms(warmup=1, least=2, budget_s=0.0)
    assert loader.taken == len(runner.waits_ms) == 1 + len(times)
    assert runner.waits_ms == pytest.approx([20.0] * 3)


def test_the_fed_step_is_told_from_the_held_one_and_waits_of_the_warm_up_do_not_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def times_ms(self: Runner, **_: Any) -> list[float]:
        if not isinstance(self, FedRunner):
            return [1.0, 3.0]
        self.waits_ms = [900.0, 800.0, 20.0, 30.0]
        return [10.0, 20.0]

    bench = shared_bench()
    loader = SimpleNamespace(close=lambda: None)
    monkeypatch.setattr(step_reading, "HELD", 0)
    monkeypatch.setattr(assembly, "open_corpus", lambda config: "corpus")
    monkeypatch.setattr(assembly, "open_loader", lambda config, corpus: loader)
    monkeypatch.setattr(Runner, "times_ms", times_ms)
    made = step_reading.fed_times(bench.engine, bench.config, least=2, budget_s=0.0)
    assert (made["held_step_ms"], made["step_ms"], made["wait_ms"]) == (2.0, 15.0, 25.0)
