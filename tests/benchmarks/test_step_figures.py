"""What a row of the whole step says, from times that are given and operations that are counted."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.step_batch import made_batch
from benchmarks.step_flops import step_flop
from benchmarks.step_timing import Clock, Runner, profile
from tests.benchmarks.step_bench import shared_bench


@pytest.mark.parametrize("is_packed", [True, False])
def test_figures_are_of_the_median_and_of_what_the_text_tower_is_given(
    is_packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: a step of 4 ms on a card of 100 measured and 312 nominal TFLOP/s."""
    bench = shared_bench()
    model = bench.engine.objective.model
    batch = made_batch(bench.config, 6, vocab_size=bench.vocab_size, concepts=bench.concepts)
    runner: Any = SimpleNamespace(batches=[batch], times_ms=lambda **_: [90.0, 4.0, 1.0, 1.5, 5.0])
    monkeypatch.setattr(bench, "peak_tflops", 100.0)
    monkeypatch.setattr(bench, "facts", {"gpu": "NVIDIA A100-SXM4-80GB"})
    monkeypatch.setattr(model.text, "is_packed", is_packed)
    row = bench.measure(runner)
    real, padded = (step_flop(model, batch, bench.config, real=real) for real in (True, False))
    assert real < padded
    assert row["step_ms"] == 4.0 and row["pairs_per_s"] == pytest.approx(1500.0)
    assert row["tflop"] == pytest.approx(real / 1e12)
    assert row["utilisation"] == pytest.approx(real / 4e-3 / 100e12)
    assert row["utilisation_of_nominal"] == pytest.approx(real / 4e-3 / 312e12)
    given = real if is_packed else padded
    assert row["utilisation_with_padding"] == pytest.approx(given / 4e-3 / 100e12)
    tokens = int(batch.token_mask.sum())
    assert row["padding_share"] == pytest.approx(1 - tokens / batch.token_mask.numel())


class _Card:
    """A GPU's clock, and events that answer once the host has waited for them, as CUDA's do."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_ms, self.settled_ms = 0.0, -1.0
        card = self

        class Event:
            def __init__(self, enable_timing: bool = False) -> None:
                self.is_timing = enable_timing

            def record(self) -> None:
                self.at = card.now_ms

            def elapsed_time(self, end: Event) -> float:
                if not (self.is_timing and end.is_timing and end.at <= card.settled_ms):
                    raise RuntimeError("CUDA error: device not ready")
                return end.at - self.at

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", self.settle)

    def settle(self) -> None:
        self.settled_ms = self.now_ms


def test_steps_of_a_gpu_are_timed_by_its_own_events_and_waited_for_once_at_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Oracle: steps of 40 and 30 ms to warm up, then of 7 ms; the numbers of a step are asked for
    when the next one is queued."""
    card, read = _Card(monkeypatch), []
    steps = iter([40.0, 30.0, 7.0, 7.0, 7.0])

    def start_step(batch: str, *, step: int, **_: float) -> Any:
        card.now_ms += next(steps)

        def result() -> Any:
            read.append((step, card.now_ms))
            return SimpleNamespace(is_skipped=False)

        return SimpleNamespace(result=result)

    engine = SimpleNamespace(device=torch.device("cuda", 0), start_step=start_step)
    runner = Runner(engine, ["a"])
    assert runner.times_ms(warmup=2, least=3, budget_s=0.0) == [7.0, 7.0, 7.0]
    assert read == [(0, 70.0), (1, 70.0), (2, 84.0), (3, 91.0), (4, 91.0)]


def test_kernels_of_a_gpu_are_profiled_by_their_own_time_and_operators_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Oracle: two kernels of 6 and 3 ms in two steps, launched by an operator that says 9 too."""
    _Card(monkeypatch)
    asked: list[Any] = []

    def event(key: str, place: str, us: float, count: int) -> Any:
        own = {"self_device_time_total": us, "self_cpu_time_total": 1e6}
        return SimpleNamespace(key=key, device_type=f"DeviceType.{place}", count=count, **own)

    events = [
        event("aten::mm", "CPU", 9000.0, 2),
        event("add", "CUDA", 3000.0, 4),
        event("gemm", "CUDA", 6000.0, 2),
    ]

    @contextlib.contextmanager
    def profiled(activities: list[Any]) -> Iterator[Any]:
        asked.extend(activities)
        yield SimpleNamespace(key_averages=lambda: events)

    monkeypatch.setattr(torch.profiler, "profile", profiled)
    engine = SimpleNamespace(device=torch.device("cuda", 0))
    runner = Runner(engine, ["a"])
    steps: list[int] = []
    monkeypatch.setattr(runner, "step", lambda: steps.append(1))
    made = profile(runner, steps=2)
    assert asked == [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    assert made["device_ms"] == pytest.approx(4.5) and len(steps) == 3  # one to warm up
    assert made["profile"] == [
        {"kernel": "gemm", "calls": 1.0, "ms": 3.0, "share": pytest.approx(2 / 3)},
        {"kernel": "add", "calls": 2.0, "ms": 1.5, "share": pytest.approx(1 / 3)},
    ]


class _Ticks:
    """A clock that is one millisecond on each time that it is looked at."""

    is_gpu = False

    def __init__(self) -> None:
        self.looks = 0

    def now(self) -> int:
        self.looks += 1
        return self.looks

    def ms(self, begin: int, end: int) -> float:
        return float(end - begin)

    def settle(self) -> None:
        pass


def test_parts_and_operations_are_those_of_one_step_however_many_are_run() -> None:
    runner = shared_bench().runner(4, 0)
    runner.clock = _Ticks()
    one, three = runner.parts_ms(1), runner.parts_ms(3)
    assert one == three and one["backward"] > 0
    made = [profile(runner, steps, most=10_000) for steps in (1, 2)]
    calls, again = ({line["kernel"]: line["calls"] for line in of["profile"]} for of in made)
    assert calls["aten::addmm"] == again["aten::addmm"] > 1
    times = [line["ms"] for line in made[1]["profile"]]
    assert times == sorted(times, reverse=True)
    for line in made[1]["profile"]:
        assert line["ms"] == pytest.approx(line["share"] * made[1]["device_ms"], abs=1e-6)


def test_steps_take_batches_in_turn_with_numbers_of_their_own_and_a_skipped_one_is_an_error() -> (
    None
):
    told: list[tuple[str, int]] = []
    result = SimpleNamespace(is_skipped=False, bad_terms=lambda: ["category"])

    def start_step(batch: str, *, step: int, **_: float) -> Any:
        told.append((batch, step))
        return SimpleNamespace(result=lambda: result)

    engine = SimpleNamespace(device=torch.device("cpu"), start_step=start_step)
    runner = Runner(engine, ["a", "b"])
    assert len(runner.times_ms(warmup=1, least=2, budget_s=0.0)) == 2
    assert told == [("a", 0), ("b", 1), ("a", 2)]
    assert Clock(engine.device).ms(1.0, 1.5) == 500.0  # a process's clock counts seconds
    result.is_skipped = True
    with pytest.raises(RuntimeError, match="a step was skipped: .*category"):
        runner.times_ms(warmup=1, least=1, budget_s=0.0)
