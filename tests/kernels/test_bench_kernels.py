"""The benchmark's rows say what happened, whatever happened; its providers compute one loss."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import bench_kernels, harness, kernel_grids, kernel_measures, providers
from mlip.kernels import _chip
from mlip.kernels.token_knowledge_patch import tiling

SMALL = kernel_grids.similarity(4, 6, 5, 8, device="cpu")


@pytest.mark.parametrize("pooling", ["attention", "context", "max"])
@pytest.mark.parametrize("provider", ["torch", "eager_fp32", "chunked"])
def test_every_provider_computes_the_same_loss(pooling: str, provider: str) -> None:
    case = SMALL | {"provider": provider, "pooling": pooling, "fill": 0.5}
    loss = bench_kernels._provider(case)
    errors = bench_kernels._parity(case, loss)
    assert all(error is not None and error < 1e-5 for error in errors.values())


@pytest.mark.parametrize("chunk_bytes", [1, 2**28])
def test_the_derivative_by_hand_is_the_derivative(
    chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(providers, "CHUNK_BYTES", chunk_bytes)
    case = SMALL | {"provider": "chunked_analytic", "fill": 0.5}
    errors = bench_kernels._parity(case, bench_kernels._provider(case))
    assert all(error is not None and error < 1e-5 for error in errors.values())
    with pytest.raises(ValueError, match="expected attention pooling, got max"):
        bench_kernels._provider(case | {"pooling": "max"})


@pytest.mark.parametrize("provider", ["torch", "eager_fp32"])
def test_every_info_nce_provider_computes_the_same_loss(provider: str) -> None:
    case = {"op": "info_nce", "batch": 40, "dim": 8, "provider": provider, "device": "cpu"}
    errors = bench_kernels._parity(case, bench_kernels._provider(case))
    assert all(error is not None and error < 1e-4 for error in errors.values())


def test_a_row_without_a_number_says_why() -> None:
    absent = SMALL | {"provider": "late_interaction_kernels", "pooling": "max"}
    assert bench_kernels.safely(absent, None)["status"].startswith("not installed")
    wrong = SMALL | {"provider": "nothing"}
    assert bench_kernels.safely(wrong, None)["status"].startswith("failed: ValueError")
    late = bench_kernels.run_grid([SMALL | {"provider": "torch"}], time.monotonic() - 1, False)
    assert late[0]["status"] == "not run: out of time"
    assert late[0]["environment"]["torch"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there the kernels can run")
@pytest.mark.parametrize("case", [SMALL, {"op": "info_nce", "batch": 4, "dim": 8, "device": "cpu"}])
def test_a_fused_row_is_of_the_kernels_or_has_no_number(case: Any) -> None:
    row = bench_kernels.safely(case | {"provider": "fused"}, None)
    assert row["status"].startswith('failed: ValueError: impl="triton" cannot run'), row


def test_a_run_that_is_stopped_leaves_the_rows_it_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rows.json"
    plain, done = bench_kernels.safely, []

    def safely(case: Any, peak: Any) -> Any:
        if done:
            raise KeyboardInterrupt
        done.append(case)
        return plain(case, peak)

    monkeypatch.setattr(bench_kernels, "safely", safely)
    cases = [SMALL | {"provider": name} for name in ("nothing", "torch")]
    with pytest.raises(KeyboardInterrupt):
        bench_kernels.run_grid(cases, time.monotonic() + 60, False, path)
    (row,) = json.loads(path.read_text(encoding="utf-8"))
    assert row["provider"] == "nothing" and row["status"].startswith("failed: ValueError")


def test_after_an_error_that_takes_the_gpu_rows_come_from_fresh_processes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An illegal address in one provider must not turn the rows after it into its own error."""

    def lost() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    assert not bench_kernels.gpu_is_lost()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    monkeypatch.setattr(
        bench_kernels, "_in_fresh_process", lambda case, _: case | {"status": "fresh"}
    )
    cases = [SMALL | {"provider": "nothing"}] * 3
    rows = bench_kernels.run_grid(cases, time.monotonic() + 60, False)
    assert [row["status"] for row in rows][1:] == ["fresh", "fresh"]


def test_a_row_that_never_ends_in_its_own_process_is_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Oracle: a process that would sleep for an hour."""
    monkeypatch.setattr(bench_kernels, "CELL_S", 0.5)
    plain = subprocess.run

    def run(command: list[str], **settings: Any) -> Any:
        assert command[2] == "--cell"
        return plain([sys.executable, "-c", "import time; time.sleep(3600)"], **settings)

    monkeypatch.setattr(bench_kernels.subprocess, "run", run)
    row = bench_kernels._in_fresh_process(SMALL | {"provider": "torch"}, None)
    assert row["status"] == "failed: no row within 0.5 s"


def test_rows_that_an_earlier_run_has_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = [SMALL | {"provider": name} for name in ("torch", "nothing", "absent")]
    monkeypatch.setattr(bench_kernels, "short_grid", lambda device: cases)
    out = tmp_path / "rows.json"
    monkeypatch.setattr(sys, "argv", ["bench_kernels.py", "--first", "1", "--out", str(out)])
    bench_kernels.main()
    assert [row["provider"] for row in json.loads(out.read_text())] == ["nothing", "absent"]
    monkeypatch.setattr(sys, "argv", ["bench_kernels.py", "--first", "3"])
    with pytest.raises(SystemExit):
        bench_kernels.main()
    assert list(tmp_path.iterdir()) == [out]  # nothing half-written beside it


def test_rows_on_disk_are_whole_whenever_the_time_limit_strikes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = harness.write_rows("kernels", [{"a": 1}], tmp_path / "rows.json")
    plain = Path.write_text

    def killed(self: Path, text: str, **more: Any) -> int:
        plain(self, text[: len(text) // 2], **more)
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", killed)
    with pytest.raises(KeyboardInterrupt):
        harness.write_rows("kernels", [{"a": 1}, {"a": 2}], path)
    assert json.loads(path.read_text(encoding="utf-8")) == [{"a": 1}]


def test_every_compiled_row_starts_without_the_graphs_of_the_rows_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """torch keeps eight variants of one function and runs the ninth without compiling it; the grid
    has ten, with and without gradient. Oracle: the calls of torch.compiler.reset."""
    calls: list[None] = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: calls.append(None))
    eager = providers.similarity_provider("eager_fp32", SMALL)
    monkeypatch.setattr(providers, "similarity_provider", lambda *_: eager)
    monkeypatch.setattr(harness, "measure", lambda *_: {"median_ms": 1.0})
    for name in ("compile_fp32", "eager_fp32", "chunked"):
        row = bench_kernels.safely(SMALL | {"provider": name}, None)
        assert row["status"] == "ok", row
    assert len(calls) == 2


class _PretendGpu:
    """A device that runs what it is given in order, each launch costing the host 5 us."""

    def __init__(self) -> None:
        self.host = self.device = 0.0
        self.synchronized = 0

    def launch(self, device_s: float, host_s: float = 5e-6) -> None:
        self.host += host_s
        self.device = max(self.device, self.host) + device_s

    def synchronize(self) -> None:
        self.synchronized += 1
        self.host = max(self.host, self.device)

    def event(self, enable_timing: bool) -> Any:
        gpu, event = self, SimpleNamespace()
        event.record = lambda: setattr(event, "at", max(gpu.device, gpu.host))
        event.synchronize = gpu.synchronize
        event.elapsed_time = lambda end: 1e3 * (end.at - event.at)
        return event


@pytest.mark.parametrize(("launches", "device_ms"), [(12, 0.2), (1, 30.0)])
def test_a_gpu_is_timed_with_the_host_ahead_of_it(
    launches: int, device_ms: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twelve short kernels behind 1.2 ms of Python take 0.2 ms of a training step. Oracle: the sum
    of the pretended kernels' times; events around an idle device would show 1.2 ms."""
    gpu = _PretendGpu()
    cuda = SimpleNamespace(Event=gpu.event, synchronize=gpu.synchronize)
    flush = SimpleNamespace(zero_=lambda: gpu.launch(8e-5))
    pretended = SimpleNamespace(empty=lambda *_, **__: flush, uint8=torch.uint8, cuda=cuda)
    monkeypatch.setattr(harness, "torch", pretended)
    monkeypatch.setattr(harness, "time", SimpleNamespace(perf_counter=lambda: gpu.host))

    def run() -> None:
        for _ in range(launches):
            gpu.launch(1e-3 * device_ms / launches, host_s=1e-4)

    row = harness.measure(run, "cuda", budget_s=0.01)
    assert row["median_ms"] == pytest.approx(device_ms)
    assert row["host_ms"] == pytest.approx(0.1 * launches)
    assert row["repeats"] >= 5


def test_a_row_s_figures_are_made_of_its_times_its_memory_and_its_products(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Oracle: 2 ms ahead and 5 ms in all, 10 MiB beside the gradients, a peak of 100 TFLOP/s."""
    times = [{"median_ms": 2.0, "p20_ms": 1.0}, {"median_ms": 5.0, "p20_ms": 4.0, "host_ms": 0.5}]
    case = SMALL | {"provider": "fused"}
    gradients = 4 * (4 * 6 * 8 + 4 * 5 * 8)
    eager = providers.similarity_provider("eager_fp32", SMALL)
    monkeypatch.setattr(providers, "similarity_provider", lambda *_: eager)
    monkeypatch.setattr(harness, "measure", lambda *_: times.pop(0))
    monkeypatch.setattr(harness, "peak_bytes", lambda *_: 10 * 2**20 + gradients)
    row = bench_kernels.run_case(case, 100.0)
    ahead, back = bench_kernels._flop(case)
    assert (row["forward_ms"], row["both_ms"], row["host_ms"]) == (2.0, 5.0, 0.5)
    assert row["peak_mib"] == 10.0
    assert row["forward_share"] == pytest.approx(ahead / 2e-3 / 100e12)
    assert row["backward_share"] == pytest.approx(back / 3e-3 / 100e12)


def test_the_denominator_of_every_share_and_the_memory_of_a_card(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gib = iter([3, 8])  # what is there before, and the most
    cuda = SimpleNamespace(
        memory_allocated=lambda: next(gib),
        max_memory_allocated=lambda: next(gib),
        **dict.fromkeys(("synchronize", "empty_cache", "reset_peak_memory_stats"), lambda: None),
    )
    pretended = SimpleNamespace(randn=lambda *_, **__: None, bfloat16=None, cuda=cuda)
    monkeypatch.setattr(harness, "torch", pretended)
    monkeypatch.setattr(harness, "measure", lambda *_, **__: {"median_ms": 2.0})
    assert harness.matmul_peak_tflops("cuda") == pytest.approx(2 * 8192**3 / 2e-3 / 1e12)
    assert harness.peak_bytes(lambda: None, "cuda") == 5


def test_a_cpu_is_timed_in_milliseconds_and_changed_files_are_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def busy() -> None:
        end = time.process_time() + 0.01
        while time.process_time() < end:
            pass

    assert 9 < harness.measure(busy, "cpu", budget_s=0.0)["median_ms"] < 100
    monkeypatch.delenv("MLIP_COMMIT", raising=False)
    monkeypatch.setattr(harness, "_run", lambda *_: " M train.py")
    assert harness.environment("cpu")["modified"]


def test_spread_and_table_are_plain() -> None:
    made: dict[str, Any] = harness._spread([5.0, 1.0, 3.0, 2.0, 4.0, 100.0])
    assert made == {"median_ms": 3.5, "p20_ms": 2.0, "p80_ms": 5.0, "repeats": 6}
    text = harness.table([{"a": 1.23456, "b": None}], ["a", "b"])
    assert text.splitlines() == ["a      b", "1.235  -"]
    lost = "failed: RuntimeError: CUDA error: launch failure\nSearch for | there"
    page = harness.markdown([{"step, ms": lost, "commit": "a5832ec"}]).splitlines()
    assert len(page) == 3 and page[2].replace(r"\|", "").count("|") == 3
    assert page[2].startswith("| failed: RuntimeError: CUDA error: launch failure Search for")


def test_the_readme_table_is_computed_from_rows_or_says_why_not() -> None:
    at = kernel_measures.AT_256
    rows = [
        at | {"provider": "fused", "status": "ok", "both_ms": 9.0, "learned": True},
        at
        | {"provider": "fused", "status": "ok", "both_ms": 2.0, "forward_ms": 0.7}
        | {"peak_mib": 100.0},
        at | {"provider": "eager_fp32", "status": "ok", "both_ms": 18.0, "peak_mib": 12000.0},
        at | {"provider": "compile_bf16", "status": "ok", "both_ms": 3.0, "peak_mib": 2800.0},
        at | {"provider": "chunked", "status": "out of memory"},
        at | {"provider": "fused", "status": "ok", "both_ms": 1.25, "fill": 0.5},
    ]
    short = kernel_measures.SHORT_256
    sizes = {k: short[k] for k in ("batch", "tokens", "patches", "dim")}
    rows += [
        short | {"provider": "fused", "status": "ok", "forward_ms": 0.5},
        sizes | {"op": "flat_product", "provider": "bf16", "status": "ok", "forward_ms": 0.3},
    ]
    got = {row["measure"]: row["measured"] for row in kernel_measures.measures(rows)}
    product = "forward pass / the flat product alone, B = 256, T = 64, D = 128"
    assert got[product] == "0.50 ms / 0.30 ms"
    assert got["against eager float32, B = 256"] == "9.00x"
    compiled = "torch.compile with float32 / bf16 similarity"
    memory = f"extra memory against eager / {compiled}, B = 256"
    assert got[memory] == "120.00x / not run / 28.00x"
    assert got["against chunked and checkpointed torch"] == "out of memory"
    assert got["half-empty reports against full ones"] == "1.60x"
    name = "largest batch on one card, T = 112, D = 128"
    assert got[name] == "256"
    rows.append(at | {"provider": "fused", "batch": 4096, "status": "not run: out of time"})
    got = {row["measure"]: row["measured"] for row in kernel_measures.measures(rows)}
    assert got[name] == "256 (4096: not run: out of time)"
    assert got["`info_nce_loss` against inf-cl 1.2.1, 65536 x 512"] == "not run"


def test_the_flat_product_is_a_row_of_its_own() -> None:
    sizes = kernel_grids.flat_product(4, 6, 5, 8)
    row = bench_kernels.safely(sizes | {"provider": "fp32", "device": "cpu"}, 100.0)
    assert row["status"] == "ok" and row["forward_ms"] > 0
    flop = 2 * (4 * 6) * (4 * 5) * 8
    assert row["forward_share"] * row["forward_ms"] * 1e-3 * 100e12 == pytest.approx(flop)


@pytest.mark.parametrize(
    ("pooling", "batch", "dim", "products"),
    [
        ("attention", 256, 128, (1, 4)),
        ("attention", 256, 256, (1, 3)),
        ("attention", 1024, 128, (1, 5)),  # statistics are made again
        ("max", 256, 128, (1, 1)),
        ("context", 256, 128, (2, 11)),
    ],
)
def test_shares_of_the_peak_count_the_products_that_run(
    pooling: str, batch: int, dim: int, products: tuple[int, int]
) -> None:
    case = kernel_grids.similarity(batch, 112, 196, dim, pooling=pooling, device="cuda")
    unit = 2 * batch * 56 * batch * 196 * dim
    made = bench_kernels._flop(case | {"provider": "fused", "fill": 0.5})
    assert made == tuple(unit * count for count in products)
    nce = {"op": "info_nce", "batch": batch, "dim": dim, "provider": "fused", "device": "cuda"}
    assert bench_kernels._flop(nce) == (2 * batch**2 * dim, 6 * batch**2 * dim)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_row_of_a_grid_has_a_provider(device: str) -> None:
    for case in kernel_grids.short_grid(device) + kernel_grids.full_grid(device):
        if case["op"] == "flat_product":
            assert case["provider"] in ("bf16", "fp32")
            continue
        with contextlib.suppress(providers.NotInstalled):
            assert callable(bench_kernels._provider(case | {"device": "cpu"}))


def test_no_time_is_measured_without_parity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bench_kernels.OWN_GATE, "attention", 0.0)
    row = bench_kernels.safely(SMALL | {"provider": "torch"}, None)
    assert row["status"].startswith("failed: RuntimeError: no parity") and "both_ms" not in row


def test_a_gradient_that_is_not_finite_is_no_parity(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss is right, its derivative is not: max() of an error and a NaN is the error."""
    plain, oracle = bench_kernels._forward_backward, []

    def spoiled(loss: Any, inputs: Any) -> Any:
        value, *gradients = plain(loss, inputs)
        oracle.append(None)
        return value, *(g * (float("nan") if len(oracle) == 2 else 1.0) for g in gradients)

    monkeypatch.setattr(bench_kernels, "_forward_backward", spoiled)
    row = bench_kernels.safely(SMALL | {"provider": "torch"}, None)
    assert row["status"].startswith("failed: RuntimeError: no parity"), row


def test_a_tile_map_under_test_takes_the_place_of_the_table(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    size = ("forward", 196, 128, 2, _chip.chip_of((9, 0), 132))
    fitting = tiling.fitting_tilings(*size)
    assert fitting[0] == tiling.choose_tiling(*size) and len(set(fitting)) > 3
    monkeypatch.setitem(tiling.FORCED, "forward", fitting[-1])
    tiling.choose_tiling.cache_clear()
    assert tiling.choose_tiling(*size) == fitting[-1]
    monkeypatch.undo()
    tiling.choose_tiling.cache_clear()


KINDS = {
    "attention": ("forward", "backward_rows", "backward_patches"),
    "products": ("forward", "gradient"),
    "context": ("forward", "turn", "backward_rows", "backward_patches"),
    "max": ("forward", "backward_rows", "backward_patches"),
}


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (9, 0), (10, 0), (12, 0)])
def test_every_problem_has_a_tile_map_on_every_chip(capability: tuple[int, int]) -> None:
    chip = _chip.chip_of(capability, 132)
    for pooling in ("attention", "context", "max"):
        for dim in (16, 64, 128, 256):
            for size in (2, 4):
                problem = tiling.Problem(4, 4, 8, 49, dim, size, pooling, "mean")
                for kind in KINDS["products" if tiling.takes_products(problem) else pooling]:
                    for patches in (1, 49, 197, 577, 1024):
                        made = tiling.choose_tiling(kind, patches, dim, size, chip, pooling)
                        assert made.tiles * sum(made.segments) >= patches
