"""The whole-step benchmark: its batches are a loader's, its operations are torch's own count, and
its rows say what happened. Its pages are test_step_report.py's."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import bench_step, harness, providers, step_flops, step_reading
from benchmarks.bench_step import Bench
from benchmarks.step_batch import FILL, made_batch, padding_share, report_lengths
from benchmarks.step_reading import FEEDS, FedRunner
from benchmarks.step_timing import PARTS, Runner
from benchmarks.step_variants import VARIANTS, NotAvailable, flat_scores, towers
from mlip.batch import Batch
from mlip.config import load
from mlip.dataloading.loader import build_loader
from mlip.kernels.info_nce import info_nce_loss
from mlip.kernels.token_knowledge_patch import token_knowledge_patch_scores
from tests.small_run import small_run
from tests.virtual_gpu import virtual_gpu

ROOT = Path(__file__).resolve().parents[1]
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


def _bench_on(device: str = "cpu") -> Bench:
    return Bench(device, deadline=time.monotonic() + 3600)


@cache
def _shared() -> Bench:
    """One engine for the tests that measure; nobody may read its rows."""
    return _bench_on()


@cache
def _real_batch() -> tuple[Batch, Any]:
    """A batch of the project's loader in three channels, and its settings."""
    run = small_run()
    config = load([], [*run.settings, "data.channels=3", "batch.global_pairs=16"])
    loader = build_loader(
        config,
        run.manifest,
        split="train",
        train=True,
        rank=0,
        world_size=1,
        tokenizer=run.tokenizer,
        linker=run.linker,
        table=run.table,
    )
    try:
        return next(iter(loader)), config
    finally:
        loader.close()


def _claims(batch: Batch) -> dict[str, Any]:
    """What is true of a batch beside its sizes."""
    lengths = batch.token_mask.sum(dim=1)
    place = torch.arange(batch.token_mask.shape[1])
    return {
        "types": {f.name: getattr(batch, f.name).dtype for f in dataclasses.fields(batch)},
        "dimensions": {f.name: getattr(batch, f.name).ndim for f in dataclasses.fields(batch)},
        "one grey channel": batch.image.stride(1) == 0,
        "image": tuple(batch.image.shape[1:]),
        "padding behind": torch.equal(batch.token_mask, place < lengths[:, None]),
        "no first and last": torch.equal(
            batch.content_mask, (place > 0) & (place < lengths[:, None] - 1)
        ),
        "as wide as the longest": int(lengths.max()) == batch.token_ids.shape[1],
        "as many entities as the most": int(batch.entity_mask.sum(dim=1).max())
        == batch.entity_ids.shape[1],
        "entities in front": torch.equal(
            batch.entity_mask,
            torch.arange(batch.entity_mask.shape[1]) < batch.entity_mask.sum(dim=1)[:, None],
        ),
        "nothing masked": int(batch.entity_ids[~batch.entity_mask].abs().sum()) == 0,
        "padding": set(batch.token_ids[~batch.token_mask].tolist()),
    }


def test_a_made_batch_is_what_the_loader_makes() -> None:
    real, config = _real_batch()
    run = small_run()
    made = made_batch(
        config, len(real), vocab_size=run.tokenizer.vocab_size, concepts=len(run.table)
    )
    assert _claims(made) == _claims(real)
    assert int(made.token_ids.max()) < run.tokenizer.vocab_size
    assert int(made.entity_ids.max()) < len(run.table)


def test_reports_fill_half_of_the_tokens() -> None:
    lengths = report_lengths(4096, 112, torch.Generator().manual_seed(3))
    assert float(lengths.double().mean()) == pytest.approx(FILL * 112, rel=0.03)
    assert int(lengths.min()) >= 8 and int(lengths.max()) == 112
    config = load([], ["data.crop_px=16"])
    batch = made_batch(config, 4096, vocab_size=100, concepts=10)
    assert padding_share(batch) == pytest.approx(0.5, abs=0.02)


def _objective_of(attention: str = "eager") -> tuple[Any, Batch]:
    """The tiny model in float32, with products that the counter sees, and a batch."""
    bench = _bench_on()
    objective = bench.engine.objective.float()
    fp32 = dataclasses.replace(
        bench.config, train=dataclasses.replace(bench.config.train, precision="fp32")
    )
    objective.config = objective.model.config = fp32
    for tower in (objective.model.text, objective.model.vision.tower):
        tower.backbone.config._attn_implementation = f"mlip_{attention}"
    batch = made_batch(fp32, 6, vocab_size=bench.vocab_size, concepts=bench.concepts)
    return objective, batch


def test_operations_of_towers_and_heads_are_those_that_torch_counts() -> None:
    objective, batch = _objective_of()
    model, config = objective.model, objective.config
    parts = step_flops.forward_parts(model, batch, config, real=False)
    with FlopCounterMode(display=False) as forward:
        image = model.encode_image(batch.image)
        text = model.encode_text(batch.token_ids, batch.token_mask, batch.content_mask)
    expected = parts["vision"] + parts["text"] + parts["heads"]
    assert forward.get_total_flops() == expected
    total = image.embedding.sum() + image.patches.sum() + text.embedding.sum() + text.tokens.sum()
    with FlopCounterMode(display=False) as backward:
        total.backward()
    # images need no gradient: one product of the patch projection is not made
    first = step_flops.patch_projection(len(batch), model.vision.tower.backbone.config)
    assert backward.get_total_flops() == 2 * expected - first


def test_operations_of_the_contrastive_levels_are_those_that_torch_counts() -> None:
    bench = _shared()
    batch = made_batch(bench.config, 6, vocab_size=bench.vocab_size, concepts=bench.concepts)
    whole = dataclasses.replace(
        batch,
        content_mask=torch.ones_like(batch.content_mask),
        entity_mask=torch.zeros_like(batch.entity_mask),
    )
    parts = step_flops.forward_parts(bench.engine.objective.model, whole, bench.config, real=True)
    dim = bench.config.model.embed_dim
    with FlopCounterMode(display=False) as local, torch.no_grad():
        token_knowledge_patch_scores(torch.randn(6, 4, dim), torch.randn(6, 10, dim))
    assert local.get_total_flops() == parts["local"]
    with FlopCounterMode(display=False) as pairing, torch.no_grad():
        info_nce_loss(torch.randn(6, dim), torch.randn(6, dim), 10.0)
    assert step_flops.VIEW_PAIRINGS * pairing.get_total_flops() == parts["global"]


def test_padding_is_counted_apart_and_what_is_left_out_is_small() -> None:
    assert step_flops.transformer_forward([3, 5], 4, 8, 2) == 2 * (
        2.0 * 8 * (4 * 16 + 2 * 4 * 8) + 4 * 4 * (9 + 25)
    )
    bench = _shared()
    model = bench.engine.objective.model
    batch = made_batch(bench.config, 8, vocab_size=bench.vocab_size, concepts=bench.concepts)
    real, padded = (
        step_flops.forward_parts(model, batch, bench.config, real=real) for real in (True, False)
    )
    assert real["text"] < padded["text"] and real["vision"] == padded["vision"]
    # of matching at ViT-B/16: three judged pairs, two layers, four heads' rows against 196 patches
    matching = 3 * 2 * (4 * 4.0 * 196 * 128)
    tower = step_flops.transformer_forward([197], 768, 3072, 12)
    assert matching < 1e-3 * tower


def test_the_step_is_fed_by_the_real_loader_from_shards_and_from_full_size_files(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("nvidia.dali", reason="nvidia.dali is not installed")
    bench = _shared()
    monkeypatch.setattr(bench, "rows", [])
    bench.reading()
    assert [row["variant"] for row in bench.rows] == list(FEEDS)
    assert [row["status"] for row in bench.rows] == ["ok"] * len(FEEDS)
    for row in bench.rows:
        assert row["step_ms"] > 0 and row["held_step_ms"] > 0 and row["wait_ms"] >= 0
        assert row["pairs_per_s"] == pytest.approx(1e3 * row["pairs"] / row["step_ms"])


def test_a_slow_loader_is_waited_for_and_each_of_its_batches_is_a_step_s() -> None:
    bench = _shared()
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


@pytest.mark.parametrize("micro", [0, 2])
def test_parts_add_up_to_the_step_and_only_a_cached_one_runs_towers_again(micro: int) -> None:
    bench = _shared()
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
    objective, batch = _objective_of("sdpa")
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
    bench = _shared()
    model = bench.engine.objective.model
    configs = [model.text.backbone.config, model.vision.tower.backbone.config]

    def state() -> tuple[Any, ...]:
        attention = [config._attn_implementation for config in configs]
        ours = os.environ.get("MLIP_DISABLE_TRITON"), "local_scores" in vars(model)
        return attention, model.text.is_packed, *ours

    before = state()
    try:
        with VARIANTS[name](bench.engine):
            is_changed = state() != before
    except NotAvailable as error:
        assert str(error).startswith(("not available: ", "not installed: "))
    else:
        assert is_changed == (name != "ours")
    assert state() == before


def test_towers_and_heads_compile_without_a_graph_break() -> None:
    bench = _bench_on()
    runner = bench.runner(4, 0)
    modules = towers(bench.engine.objective.model)
    for module in modules:
        module.compile(backend="aot_eager", fullgraph=True, dynamic=False)  # a break is an error
    try:
        runner.step()
    finally:
        torch._dynamo.reset()
    assert len(modules) == 6


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
    monkeypatch.setitem(bench_step.BATCHES, "cpu", (4, 32))
    monkeypatch.setitem(bench_step.LAST_PAIRS, "cpu", 64)


def test_what_does_not_fit_is_a_row_and_goes_on_with_the_gradient_cache(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bench = _shared()
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


def test_late_and_failing_rows_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = _shared()
    monkeypatch.setattr(bench, "rows", [])
    bench.attempt({"kind": "batch"}, lambda: {}, needs_s=1e9)

    def fail() -> dict[str, Any]:
        raise ZeroDivisionError("no")

    bench.attempt({"kind": "batch"}, fail)
    assert [row["status"] for row in bench.rows] == [
        "not run: out of time",
        "failed: ZeroDivisionError: no",
    ]


class _Event:
    """torch.cuda.Event on the processor's clock."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.at = time.process_time()

    def elapsed_time(self, end: _Event) -> float:
        return 1e3 * (end.at - self.at)

    def synchronize(self) -> None: ...


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real one")
def test_what_runs_on_a_gpu_alone_runs_on_the_virtual_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_step, "SETTINGS", bench_step.SETTINGS + bench_step.TINY)
    monkeypatch.setattr(bench_step, "BERT_VOCABULARY", bench_step.TINY_VOCABULARY)
    monkeypatch.setitem(bench_step.BATCHES, "cuda", (4,))
    monkeypatch.setitem(bench_step.FIRST_PAIRS, "cuda", 4)
    monkeypatch.setitem(bench_step.LAST_PAIRS, "cuda", 4)
    monkeypatch.setitem(bench_step.VARIANT_PAIRS, "cuda", 4)
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
    with virtual_gpu(), monkeypatch.context() as card:
        card.setattr(torch.cuda, "Event", _Event)
        for name in ("reset_peak_memory_stats", "empty_cache"):
            card.setattr(torch.cuda, name, lambda: None)
        bench = _bench_on("cuda")
        bench.run(["batches", "parts", "reading", "variants"])
        bench.cached("scaling", 4)
    states = {(row["kind"], row["variant"], row["micro"]): row["status"] for row in bench.rows}
    kinds = ("not installed: ", "not available: ")
    assert [s for s in states.values() if s != "ok" and not s.startswith(kinds)] == []
    assert states["scaling", "ours", 2] == states["parts", "ours", 0] == "ok"
    assert [states["reading", name, 0] for name in torch_alone] == ["ok", "ok"]
    row = bench.rows[0]
    assert row["utilisation_with_padding"] > row["utilisation"] > 0 and "peak_gib" in row


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
    assert reading["shards, DALI"] == "not installed: ahocorasick, nvidia.dali"
    assert all(row["environment"]["torch"] and row["pairs_per_s"] > 0 for row in measured)
    assert any(row["micro"] > 0 for row in measured)
    profile = next(row for row in rows if row["kind"] == "profile")["profile"]
    assert profile and profile[0]["ms"] >= profile[-1]["ms"] > 0.0
