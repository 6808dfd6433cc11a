"""The whole-step benchmark: parts add up, ways undo themselves, rows say what happened."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import bench_step, harness, providers, step_measures, step_reading, step_sizes
from benchmarks.bench_step import Bench
from benchmarks.step_reading import FEEDS
from benchmarks.step_timing import PARTS, Runner
from benchmarks.step_variants import (
    ENGINES,
    VARIANTS,
    NotAvailable,
    as_it_is,
    flat_scores,
    float32_residual,
    layers,
    padded_reports,
)
from mlip.encoders import attention as attention_module
from mlip.encoders.rounded_weights import RoundedTogether
from tests.benchmarks.step_bench import bench_on, objective_of, shared_bench
from tests.virtual_gpu import virtual_gpu

ROOT = Path(__file__).resolve().parents[2]
ABSENT = "deepspeed pydicom nvidia xformers imagecodecs ahocorasick pycocotools".split()
# what such a machine lacks cannot be imported; then the script as it is
BLOCKED = f'''
import runpy, sys

class Hiding:
    """A finder that does not know of them: find_spec gives None and an import fails."""

    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {ABSENT!r}:
            return None
        return self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = [Hiding(finder) for finder in sys.meta_path]
import tests.training.test_host_syncs  # what gpu_check runs before it
sys.argv = ["bench_step.py", *sys.argv[1:]]
runpy.run_path("benchmarks/bench_step.py", run_name="__main__")
'''


@pytest.mark.parametrize("micro", [0, 2])
def test_parts_add_up_to_the_step_and_only_a_cached_one_runs_towers_again(micro: int) -> None:
    bench = shared_bench()
    runner = bench.runner(4, micro)
    runner.step()
    parts = runner.parts_ms(1)
    assert tuple(parts) == PARTS and all(value >= 0.0 for value in parts.values())
    assert (parts["towers again"] > 0.0) == (micro > 0)
    assert parts["vision forward"] > 0.0 and parts["optimiser"] > 0.0
    # the marks are off again
    assert not bench.engine.objective.model.vision._forward_hooks
    assert "_update" not in vars(bench.engine)


def test_the_flat_product_gives_the_operator_s_scores_and_gradients() -> None:
    objective, batch = objective_of("sdpa")
    features = objective.encode(batch)
    model, image, text = objective.model, features.image, features.text
    made = []
    for scores in (model.local_scores, lambda *a: flat_scores(model, *a)):
        value = scores(
            image.patches, text.tokens, batch.content_mask, text.attention, features.knowledge
        )
        gradients = torch.autograd.grad(
            value.square().sum(), [image.patches, text.tokens], retain_graph=True
        )
        made.append((value, *gradients))
    for ours, flat in zip(*made, strict=True):
        torch.testing.assert_close(flat, ours, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in VARIANTS if "compiled" not in name])
def test_a_way_changes_the_engine_only_inside(name: str) -> None:
    bench = shared_bench()
    model = bench.engine.objective.model
    backbones = [model.text.backbone, model.vision.tower.backbone]
    configs = [backbone.config for backbone in backbones]

    def state() -> tuple[Any, ...]:
        attention = [config._attn_implementation for config in configs]
        ours = os.environ.get("MLIP_DISABLE_TRITON"), "local_scores" in vars(model)
        norms = [type(m) for m in model.modules() if isinstance(m, torch.nn.LayerNorm)]
        hooks = [len(tower.embeddings._forward_hooks) for tower in backbones]
        return attention, model.text.is_packed, norms, hooks, *ours

    before = state()
    try:
        with VARIANTS[name](bench.engine):
            is_changed = state() != before
    except NotAvailable as error:
        assert str(error).startswith(("not available: ", "not installed: "))
    else:
        assert is_changed == (name != "ours")
    assert state() == before


def test_the_way_of_float32_is_a_run_that_does_not_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit after a step; the third run, which rounds, is another one."""
    rounding = step_sizes.OVERRIDES["cpu"]
    plain = tuple(setting for setting in rounding if setting != "train.residual=bf16")
    made = []
    for settings, way in (plain, as_it_is), (rounding, float32_residual), (rounding, as_it_is):
        monkeypatch.setitem(step_sizes.OVERRIDES, "cpu", settings)
        bench = bench_on()
        with way(bench.engine):
            bench.runner(4, 0).step()
        made.append(torch.cat([p.flatten() for p in bench.engine.objective.parameters()]))
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])


@pytest.mark.parametrize("reports", [as_it_is, padded_reports, float32_residual])
@pytest.mark.parametrize("by_layer", [False, True], ids=["towers", "layers"])
def test_towers_compile_without_a_graph_break(reports: Any, by_layer: bool) -> None:
    bench = bench_on()
    runner = bench.runner(4, 0)
    with reports(bench.engine):
        model = bench.engine.objective.model
        modules = layers(model) if by_layer else model.towers()
        model.round_weights_together(False)  # as with train.compile
        for module in modules:
            # a break is an error
            module.compile(backend="aot_eager", fullgraph=True)
        try:
            torch._dynamo.utils.counters.clear()
            runner.step()
            made = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        finally:
            torch._dynamo.reset()
    assert made == 2 == len({type(module) for module in modules})  # one a tower


def _without_room(bench: Bench, monkeypatch: pytest.MonkeyPatch, *, plain: int, micro: int) -> None:
    """As if more than so many pairs, or so many in a micro-batch, did not fit."""

    class Full:
        def __init__(self, pairs: int, size: int) -> None:
            self.pairs, self.size = pairs, size

    def measure(runner: Any) -> dict[str, Any]:
        if runner.size > micro or (not runner.size and runner.pairs > plain):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return {"step_ms": 5.0 + 2.0 * runner.pairs + 0.5 * runner.pairs**2}

    monkeypatch.setattr(bench, "runner", Full)
    monkeypatch.setattr(bench, "measure", measure)
    monkeypatch.setitem(step_sizes.BATCHES, "cpu", (4, 32))
    monkeypatch.setitem(step_sizes.LAST_PAIRS, "cpu", 64)


def test_what_does_not_fit_is_a_row_and_goes_on_with_the_gradient_cache(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bench = shared_bench()
    monkeypatch.setattr(bench, "rows", [])
    monkeypatch.setattr(bench, "fits", 0)
    monkeypatch.setattr(bench, "fails", float("inf"))
    _without_room(bench, monkeypatch, plain=16, micro=1)
    bench.batches()
    bench.scaling()
    seen = [(r["kind"], r["pairs"], r["micro"], r["status"]) for r in bench.rows if "status" in r]
    full = "out of memory"
    # 32 is known not to fit: it is not tried again, but in ever smaller micro-batches
    assert seen[:8] == [
        ("batch", 4, 0, "ok"),
        ("batch", 32, 0, full),
        ("batch", 8, 0, "ok"),
        ("batch", 16, 0, "ok"),
        ("batch", 32, 8, full),
        ("batch", 32, 2, full),
        ("batch", 32, 1, "ok"),
        ("scaling", 4, 0, "ok"),
    ]
    assert ("scaling", 64, 1, "ok") in seen and ("scaling", 64, 0, full) not in seen
    law = next(row for row in bench.rows if row["kind"] == "law" and row["is_cached"])
    assert law["coefficients"] == pytest.approx([5.0, 2.0, 0.5], rel=1e-6)


@pytest.mark.parametrize(("micro", "is_together"), [(0, True), (2, False)])
def test_weights_are_rounded_together_where_a_run_does_so(
    micro: int, is_together: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside a gradient cache it would cost a set of gradients that no run has."""
    bench, seen = shared_bench(), []
    monkeypatch.setattr(bench, "rows", [])
    model = bench.engine.objective.model

    def measure(_: Runner) -> dict[str, Any]:
        seen.append(isinstance(model._image_weights, RoundedTogether))
        return {}

    monkeypatch.setattr(bench, "measure", measure)
    bench.attempt({"kind": "batch"}, lambda: bench.measure(bench.runner(4, micro)))
    assert seen == [is_together] and isinstance(model._image_weights, RoundedTogether)


def test_late_and_failing_rows_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = shared_bench()
    monkeypatch.setattr(bench, "rows", [])
    bench.attempt({"kind": "batch"}, lambda: {}, needs_s=1e9)

    def fail() -> dict[str, Any]:
        raise ZeroDivisionError("no")

    bench.attempt({"kind": "batch"}, fail)
    assert [row["status"] for row in bench.rows] == [
        "not run: out of time",
        "failed: ZeroDivisionError: no",
    ]


def test_what_a_library_calls_a_full_card_is_one_and_other_errors_are_not() -> None:
    """The last two are of cuBLAS and of the driver that found no room for a kernel's code."""
    full = (
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
    )
    assert all(harness.is_out_of_memory(error) for error in full)
    assert not harness.is_out_of_memory(RuntimeError("CUDA error: an illegal memory access"))


def test_a_lost_gpu_costs_its_section_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """After an illegal address every call of the process fails: rows would repeat its error. The
    next process goes on with the sections behind it, and knows what fits."""
    bench, out = shared_bench(), tmp_path / "step-0.json"
    for name, value in {"rows": [], "section": None, "is_gpu": True, "fits": 0}.items():
        monkeypatch.setattr(bench, name, value)

    def lost(*_: object) -> dict[str, Any]:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    monkeypatch.setattr(torch.cuda, "empty_cache", lost)
    label = {"kind": "profile", "variant": "ours", "pairs": 4, "micro": 0}
    ran: list[str] = []

    def batches() -> None:
        ran.append("batches")
        for pairs, status in ((4, "ok"), (8, "out of memory")):
            bench._learn(bench.keep(label | {"kind": "batch", "pairs": pairs, "status": status}))

    monkeypatch.setattr(bench, "batches", batches)
    monkeypatch.setattr(bench, "profile", lambda: bench.attempt(label, lost))
    for name in ("parts", "variants", "scaling"):
        monkeypatch.setattr(bench, name, lambda *_, name=name: ran.append(name))

    def made(*_: object, path: Path, **__: object) -> Bench:
        bench.path = path
        return bench

    monkeypatch.setattr(bench_step, "Bench", made)
    monkeypatch.setattr(bench, "fails", float("inf"))
    command = ["bench_step.py", "--out", str(out), "--only"]
    command += ["scaling", "profile", "compiled", "batches"]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setattr(bench_step.os, "_exit", sys.exit)
    with pytest.raises(SystemExit) as ended:
        bench_step.main()
    assert ended.value.code == harness.LOST_GPU
    said = capsys.readouterr().err
    assert "illegal memory access" in said and f"--go-on --out {out}" in said
    assert ran == ["batches"] and bench.rows[-1]["section"] == "profile"
    status = "failed: RuntimeError: CUDA error: an illegal memory access"
    assert bench.rows[-1]["status"].startswith(status)
    kept = json.loads(out.read_text(encoding="utf-8"))
    bench.rows, bench.fits, bench.fails = [], 0, float("inf")
    monkeypatch.setattr(sys, "argv", [*command, "--go-on"])
    bench_step.main()
    assert ran == ["batches", "variants", "scaling"]
    assert json.loads(out.read_text(encoding="utf-8")) == bench.rows == kept and len(kept) == 3
    assert (bench.fits, bench.fails) == (4, 8)


class _Event:
    """torch.cuda.Event on the processor's clock."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.at = 0.0

    def record(self, stream: Any = None) -> None:
        self.at = time.process_time()

    def elapsed_time(self, end: _Event) -> float:
        return 1e3 * (end.at - self.at)

    def synchronize(self) -> None: ...


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real one")
def test_what_runs_on_a_gpu_alone_runs_on_the_virtual_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for table in (step_sizes.OVERRIDES, step_sizes.VOCABULARY):
        monkeypatch.setitem(table, "cuda", table["cpu"])
    monkeypatch.setitem(step_sizes.BATCHES, "cuda", (4,))
    monkeypatch.setitem(step_sizes.FIRST_PAIRS, "cuda", 4)
    monkeypatch.setitem(step_sizes.LAST_PAIRS, "cuda", 4)
    monkeypatch.setitem(step_sizes.VARIANT_PAIRS, "cuda", 4)
    monkeypatch.setitem(step_reading.SIZES, "cuda", step_reading.SIZES["cpu"])
    # DALI's own copies to a GPU are not of torch
    torch_alone = {name: feed for name, feed in FEEDS.items() if feed.pipeline == "torch"}
    monkeypatch.setattr(step_reading, "FEEDS", torch_alone)
    monkeypatch.setattr(harness, "matmul_peak_tflops", lambda device: 700.0)
    once = Runner.times_ms
    monkeypatch.setattr(
        Runner, "times_ms", lambda self, **_: once(self, warmup=0, least=1, budget_s=0.0)
    )
    # a product of bf16 rows with a float32 result is a GPU's alone
    monkeypatch.setattr(providers._WideProduct, "apply", lambda a, b: a.float() @ b.float().T)
    # and nested tensors are not what the pretended memory follows
    monkeypatch.setattr(attention_module, "variable_length_attention", _padded_attention)
    with virtual_gpu(), monkeypatch.context() as card:
        card.setattr(torch.cuda, "Event", _Event)
        for name in ("reset_peak_memory_stats", "empty_cache"):
            card.setattr(torch.cuda, name, lambda: None)
        bench = bench_on("cuda")
        bench.run(["batches", "parts", "reading", "variants"])
        bench.cached("scaling", 4)
    states = {(row["kind"], row["variant"], row["micro"]): row["status"] for row in bench.rows}
    kinds = ("not installed: ", "not available: ")
    assert [s for s in states.values() if s != "ok" and not s.startswith(kinds)] == []
    assert states["scaling", "ours", 2] == states["parts", "ours", 0] == "ok"
    assert [states["reading", name, 0] for name in torch_alone] == ["ok", "ok"]
    row = bench.rows[0]
    assert row["utilisation_with_padding"] == row["utilisation"] > 0 and "peak_gib" in row
    padded = next(row for row in bench.rows if row["variant"] == "reports padded")
    assert padded["utilisation_with_padding"] > padded["utilisation"] > 0


def _padded_attention(
    query: Tensor, key: Tensor, value: Tensor, packing: Any, *, scale: float, dropout: float
) -> Tensor:
    query, key, value = (packing.unpack_heads(x) for x in (query, key, value))
    mask = packing.attention_mask()
    out = attention_module.attention(
        query, key, value, mask, impl="sdpa", scale=scale, dropout=dropout
    )
    return packing.pack(out.transpose(1, 2))


@pytest.mark.skipif(torch.cuda.is_available(), reason="would run the whole benchmark")
def test_it_runs_end_to_end_with_nothing_but_what_a_bare_machine_has(tmp_path: Path) -> None:
    out = tmp_path / "step-0.json"
    command = [sys.executable, "-P", "-c", BLOCKED, "--out", str(out)]
    command += ["--only", "batches", "parts", "profile", "reading", "variants", "scaling"]
    run = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    rows = json.loads(out.read_text(encoding="utf-8"))
    failed = [row["status"] for row in rows if row.get("status", "ok").startswith("failed")]
    assert failed == []
    measured = [row for row in rows if "step_ms" in row]
    assert {row["kind"] for row in measured} == {"batch", "variant", "scaling"}
    reading = {row["variant"]: row["status"] for row in rows if row["kind"] == "reading"}
    assert tuple(reading) == tuple(FEEDS)
    lacks = "ahocorasick, pydicom, imagecodecs, nvidia.dali"
    assert reading["shards, DALI"] == f"not installed: {lacks}"
    assert all(row["environment"]["torch"] and row["pairs_per_s"] > 0 for row in measured)
    assert any(row["micro"] > 0 for row in measured)
    row = next(row for row in rows if row["kind"] == "profile")
    profile = row["profile"]
    assert profile and profile[0]["ms"] >= profile[-1]["ms"] > 0.0
    assert row["device_ms"] >= sum(line["ms"] for line in profile)


@pytest.mark.skipif(torch.cuda.is_available(), reason="would run the whole benchmark")
def test_the_step_under_deepspeed_is_measured_by_engines_of_its_own(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    out = tmp_path / "step-0.json"
    command = [sys.executable, str(ROOT / "benchmarks/bench_step.py"), "--out", str(out)]
    run = subprocess.run(
        [*command, "--only", "deepspeed"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    rows = json.loads(out.read_text(encoding="utf-8"))
    sizes = step_sizes.BATCHES["cpu"]
    assert [(row["variant"], row["pairs"]) for row in rows] == [
        (name, pairs) for name in ENGINES for pairs in sizes
    ]
    assert {row["status"] for row in rows} == {"ok"} and all(row["step_ms"] > 0 for row in rows)
    table = step_measures.variant_table(rows, rows)
    assert [line["pairs"] for line in table if line["way"] in ENGINES] == ["4", "8"] * len(ENGINES)


def test_without_deepspeed_its_rows_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = bench_on()
    engine = bench.engine
    monkeypatch.setattr(bench_step.importlib.util, "find_spec", lambda name: None)
    bench.deepspeed()
    assert {row["status"] for row in bench.rows} == {"not installed: deepspeed"}
    assert bench.engine is engine and len(bench.rows) == 2 * len(ENGINES)
