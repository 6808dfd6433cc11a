"""What a row of the whole step says, from times that are given and operations that are counted."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.step_batch import made_batch
from benchmarks.step_flops import step_flop
from benchmarks.step_timing import Clock, Runner, profile
from tests.step_bench import shared_bench


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
    runner.clock = _Ticks()  # type: ignore[assignment]
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
    runner = Runner(engine, ["a", "b"])  # type: ignore[list-item]
    assert len(runner.times_ms(warmup=1, least=2, budget_s=0.0)) == 2
    assert told == [("a", 0), ("b", 1), ("a", 2)]
    assert Clock(engine.device).ms(1.0, 1.5) == 500.0  # a process's clock counts seconds
    result.is_skipped = True
    with pytest.raises(RuntimeError, match="a step was skipped: .*category"):
        runner.times_ms(warmup=1, least=1, budget_s=0.0)
