"""Which rows the sections of bench_step.py make on a GPU, of what, and in which order.

Oracles: a card that holds so many pairs and no more; the published run's settings; memory and
clocks that are given.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import bench_step, gpu_check, harness, step_sizes, step_variants
from benchmarks.bench_step import ON_REQUEST, SECTIONS, Bench
from benchmarks.step_variants import COMPILES, OURS, VARIANTS
from mlip.settings.config import load
from tests.benchmarks.step_bench import shared_bench

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    """The shared engine as on a GPU, with rows of its own."""
    made = shared_bench()
    for name, value in {"rows": [], "fits": 0, "fails": float("inf"), "is_gpu": True}.items():
        monkeypatch.setattr(made, name, value)
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    return made


def _card_of(pairs: int, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of more than so many pairs at once do not fit."""

    def runner(asked: int, micro: int) -> Any:
        return SimpleNamespace(pairs=asked, most=micro or asked)

    def measure(runner: Any) -> dict[str, Any]:
        if runner.most > pairs:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return {"step_ms": float(runner.pairs)}

    monkeypatch.setattr(bench, "runner", runner)
    monkeypatch.setattr(bench, "measure", measure)


def _seen(bench: Bench) -> list[tuple[Any, ...]]:
    return [(row["variant"], row["pairs"], row["micro"], row["status"]) for row in bench.rows]


def test_a_card_measures_the_step_of_the_published_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """configs/mimic_vit_b16.yaml with random weights, in the sizes that the pages name."""
    told: list[Any] = []
    monkeypatch.setattr(Bench, "_built", lambda self, config: told.append(self.vocab_size))
    monkeypatch.setattr(harness, "matmul_peak_tflops", lambda device: 700.0)
    monkeypatch.setattr(harness, "environment", lambda device: {"gpu": device})
    made = Bench("cuda", deadline=time.monotonic()).config
    published = load([str(ROOT / "configs/mimic_vit_b16.yaml")], ["data.manifest=m.csv"])
    assert made.train.precision == published.train.precision == "bf16"
    assert made.train.residual == published.train.residual == "bf16"
    assert made.model.text.packed and published.model.text.packed
    assert made.model.vision.kind == published.model.vision.kind == "vit"
    sizes = (made.data.crop_px, made.data.max_tokens, made.model.embed_dim)
    assert sizes == (224, 112, 128) and made.loss == published.loss
    assert not made.model.vision.options and not made.model.text.options  # ViT-B/16, BERT-base
    assert (made.train.engine, made.train.zero_stage) == ("plain", 0)
    assert told == [30_522]  # rows of BERT's own vocabulary
    assert step_sizes.BATCHES["cuda"] == (256, 1024) and step_sizes.VARIANT_PAIRS["cuda"] == 256


def test_memory_is_the_most_that_the_measured_steps_take_in_gibibytes(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way before took 9 GiB; 3 GiB are this one's."""
    memory = {"peak": 9 * 2**30}
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: memory.update(peak=0))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: memory["peak"])
    monkeypatch.setattr(bench, "peak_tflops", None)
    monkeypatch.setattr(bench_step, "in_pinned_memory", lambda batch: batch)
    runner = bench.runner(4, 0)

    def times_ms(**_: Any) -> list[float]:
        memory["peak"] += 3 * 2**30
        return [1.0]

    monkeypatch.setattr(runner, "times_ms", times_ms)
    assert bench.measure(runner)["peak_gib"] == 3.0


def test_batches_lie_in_page_locked_memory_and_are_two_different_ones(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of pageable memory every copy waits for what is queued before it."""
    pinned: list[Any] = []

    def pin(batch: Any) -> Any:
        pinned.append(batch)
        return batch

    monkeypatch.setattr(bench_step, "in_pinned_memory", pin)
    first, second = bench.runner(4, 2).batches
    assert pinned == [first, second] and not torch.equal(first.token_ids, second.token_ids)
    config = bench.engine.config
    assert bench.engine.objective.config is config and config.batch.global_pairs == 4
    assert (config.batch.micro_images, config.batch.micro_texts) == (2, 2)


def test_between_the_last_that_fits_and_the_first_that_does_not_one_more_is_tried(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(step_sizes.BATCHES, "cpu", (4, 32))
    monkeypatch.setitem(step_sizes.LAST_PAIRS, "cpu", 64)
    _card_of(12, bench, monkeypatch)
    bench.batches()
    full = "out of memory"
    assert _seen(bench) == [
        (OURS, 4, 0, "ok"), (OURS, 32, 0, full), (OURS, 8, 0, "ok"), (OURS, 16, 0, full),
        (OURS, 12, 0, "ok"), (OURS, 32, 6, "ok"),
    ]  # fmt: skip
    assert (bench.fits, bench.fails) == (12, 16)


def test_where_all_sizes_fit_none_is_between(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(step_sizes.LAST_PAIRS, "cpu", 16)
    _card_of(1000, bench, monkeypatch)
    bench.batches()
    assert [row["pairs"] for row in bench.rows] == [4, 8, 16]


def test_parts_of_a_size_that_does_not_fit_are_those_of_a_cached_step(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int, int]] = []

    def runner(pairs: int, micro: int) -> Any:
        def parts_ms(steps: int) -> dict[str, float]:
            asked.append((pairs, micro, steps))
            return {}

        return SimpleNamespace(times_ms=lambda **_: [1.0], parts_ms=parts_ms)

    monkeypatch.setattr(bench, "runner", runner)
    monkeypatch.setitem(step_sizes.BATCHES, "cpu", (4, 8, 64))
    monkeypatch.setattr(bench, "fits", 8)
    bench.parts()
    assert asked == [(4, 0, 3), (8, 0, 3), (64, 4, 3)]
    assert [(row["pairs"], row["micro"]) for row in bench.rows] == [(4, 0), (8, 0), (64, 4)]


def test_a_way_that_does_not_fit_is_tried_at_half_the_pairs_beside_ours(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(step_sizes.VARIANT_PAIRS, "cpu", 16)
    inside = SimpleNamespace(way=None)
    for name in ("big", OURS):

        class Way:
            def __init__(self, engine: Any, name: str = name) -> None:
                self.name = name

            def __enter__(self) -> None:
                inside.way = self.name

            def __exit__(self, *_: object) -> None:
                inside.way = None

        monkeypatch.setitem(VARIANTS, name, Way)

    def measure(pairs: int) -> dict[str, Any]:
        if inside.way == "big" and pairs > 8:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return {"measured": inside.way}

    monkeypatch.setattr(bench, "runner", lambda pairs, micro: pairs)
    monkeypatch.setattr(bench, "measure", measure)
    bench.variants(["big", OURS])
    assert _seen(bench) == [
        ("big", 16, 0, "out of memory"), (OURS, 8, 0, "ok"), ("big", 8, 0, "ok"),
        (OURS, 16, 0, "ok"),
    ]  # fmt: skip
    # each row is of the step that was changed, and of no other
    assert all(row["measured"] == row["variant"] for row in bench.rows[1:])
    assert {row["kind"] for row in bench.rows} == {"variant"}


def test_no_compiled_way_begins_with_less_time_than_compiling_takes(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is cut off costs the minutes of the rows behind it; their graph breaks are told."""
    for name in VARIANTS:
        monkeypatch.setitem(VARIANTS, name, step_variants.as_it_is)
    monkeypatch.setattr(bench, "runner", lambda pairs, micro: None)
    monkeypatch.setattr(bench, "measure", lambda runner: {})
    monkeypatch.setattr(bench_step, "graph_breaks", lambda: 5)
    names = [OURS, "layers compiled", "towers compiled"]
    for seconds, made in (20, names[:1]), (100, names[:2]), (200, names):
        monkeypatch.setattr(bench, "rows", [])
        monkeypatch.setattr(bench, "deadline", time.monotonic() + seconds)
        bench.variants(names)
        ran = [row for row in bench.rows if row["status"] == "ok"]
        assert [row["variant"] for row in ran] == made
        assert {row["status"] for row in bench.rows if row not in ran} <= {"not run: out of time"}
        assert [row.get("graph_breaks") for row in ran] == [None, 5, 5][: len(made)]


def test_sections_run_in_the_order_in_which_a_short_half_hour_wants_them(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled towers before eight sizes of scaling; engines that replace this one at the end."""
    ran: list[Any] = []
    for name in ("batches", "parts", "profile", "scaling", "reading", "deepspeed"):
        monkeypatch.setattr(bench, name, lambda name=name: ran.append(name))
    monkeypatch.setattr(bench, "variants", lambda names: ran.append(tuple(names)))
    bench.run([*SECTIONS, *ON_REQUEST])
    plain = tuple(name for name in VARIANTS if name not in COMPILES)
    assert ran == [
        "batches", "parts", "profile", plain, COMPILES, "scaling", "reading", "deepspeed",
    ]  # fmt: skip
    assert len(COMPILES) == 4 and OURS in plain and set(SECTIONS).isdisjoint(ON_REQUEST)
    ran.clear()
    bench.run(["scaling"])
    assert ran == ["scaling"]


def test_each_row_lies_in_the_file_before_the_next_is_measured(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A lent card is taken back at its minute, whatever runs. Nothing of a failed step is held."""
    monkeypatch.setattr(bench, "path", tmp_path / "step-0.json")
    parameter = next(bench.engine.objective.parameters())

    def work() -> dict[str, Any]:
        parameter.grad = torch.ones_like(parameter)
        if len(bench.rows) == 1:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return {"step_ms": 1.0}

    freed: list[bool] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: freed.append(parameter.grad is None))
    for made in (1, 2):
        bench.attempt({"kind": "batch", "pairs": made}, work)
        rows = json.loads(bench.path.read_text(encoding="utf-8")) if bench.path else []
        assert [row["pairs"] for row in rows] == list(range(1, made + 1))
        assert freed == [True] * made
    assert [row["status"] for row in bench.rows] == ["ok", "out of memory"]
    assert all(row["environment"] == bench.facts for row in bench.rows)


def test_an_engine_of_deepspeed_is_taken_apart_before_the_next_is_built(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its hooks hold the parameters: two sets of them would not leave the card."""
    told: list[Any] = []

    def built(self: Bench, config: Any) -> Any:
        told.append((config.train.engine, config.train.zero_stage, self.engine))
        inner = SimpleNamespace(destroy=lambda: told.append("destroyed"))
        return SimpleNamespace(name=config.train.engine, engine=inner)

    monkeypatch.setattr(Bench, "_built", lambda self, config: None)
    bench = Bench("cpu", deadline=time.monotonic() + 100)
    monkeypatch.setattr(Bench, "_built", built)
    monkeypatch.setattr(bench_step.importlib.util, "find_spec", lambda name: object())
    for name in ("DeepSpeed, ZeRO-1", "DeepSpeed, ZeRO-1", "DeepSpeed, ZeRO-2"):
        bench._become(name)
    stages = [("deepspeed", 1, None), "destroyed", ("deepspeed", 2, None)]
    assert told == stages and bench.config.train.zero_stage == 2
    assert bench.config.train.residual == "bf16" and bench.config.model.text.packed


HANGING = """
import time
from benchmarks import bench_step, harness
from benchmarks.bench_step import Bench

def profile(bench):
    for pairs, seconds in ((4, 0), (8, 600)):
        label = {"kind": "profile", "pairs": pairs}
        bench.attempt(label, lambda: time.sleep(seconds) or {}, needs_s=0.0)
        time.sleep(1.5)  # between rows: no row's time

Bench.profile, harness.HANG_S = profile, 1
bench_step.main()
"""


def test_a_row_that_hangs_costs_its_section_alone(tmp_path: Path) -> None:
    """It ends the process, as a lost GPU does, behind which gpu_check.py goes on."""
    out = tmp_path / "step-0.json"
    command = [sys.executable, "-c", HANGING, "--only", "profile", "--out", str(out)]
    environment = gpu_check.importing_root(os.environ)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == harness.LOST_GPU, done.stderr[-3000:]
    rows = json.loads(out.read_text(encoding="utf-8"))
    assert [(row["section"], row["pairs"], row["status"]) for row in rows] == [
        ("profile", 4, "ok"),
        ("profile", 8, "failed: no row within 1 s"),
    ]


def test_a_run_goes_on_behind_rows_that_name_their_section(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows: list[dict[str, Any]] = [{"kind": "batch", "pairs": 4, "micro": 0, "status": "ok"}]
    assert bench.go_on(rows, SECTIONS) == list(SECTIONS)  # an earlier version's
    assert bench.go_on([rows[0] | {"section": "batches"}, *rows], SECTIONS) == list(SECTIONS[1:])
    monkeypatch.setattr(sys, "argv", ["bench_step.py", "--go-on"])
    with pytest.raises(SystemExit):
        bench_step.main()
    assert "--go-on needs --out" in capsys.readouterr().err
