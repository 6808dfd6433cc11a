"""Benchmark the kernels against every baseline of providers.py: time, memory, error.

    python benchmarks/bench_kernels.py                 a short grid that fits ten minutes
    python benchmarks/bench_kernels.py --full          the whole grid, a fresh process a row
    python benchmarks/bench_kernels.py --tune          time the tile maps of attention in bf16
    python benchmarks/bench_kernels.py --print FILE    the table of an earlier run

Without a GPU the same providers run on the CPU at the sizes of the CPU demo. Parity with float64
is measured before the clock starts and is part of the row. A failed cell is a row too: "out of
memory", "not installed", "out of time". Rows are written as they are made: a run that is stopped
leaves those it had.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

# an uninstalled checkout, as on a bare GPU machine
sys.path.append(str(Path(__file__).resolve().parent.parent))
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import harness, providers
from benchmarks.kernel_grids import Case, full_grid, short_grid, similarity
from benchmarks.kernel_measures import measures
from mlip.kernels.info_nce import info_nce_loss
from mlip.kernels.token_knowledge_patch import tiling

OURS = ("fused", "torch")
# providers that call torch.compile
COMPILED = ("compile_bf16", "compile_fp32", "chunked", "chunked_analytic")
# pairs whose loss and gradients are made in float64 too: on a GPU those of the timed row itself, so
# that a compiled provider is compiled once
PARITY_PAIRS = {"cuda": 256, "cpu": 8}
PARITY_INFO_NCE = {"cuda": 4096, "cpu": 256}
SCALE = 1 / 0.07
CELL_S = 300  # most that a row of a process of its own may take, imports and compiling included
# gradient errors against float64 above which a row is refused: the operator's own gate with the
# rounding of a bf16 gradient (max pooling: bf16 swaps nearly equal maxima), and for a baseline what
# tells another formula from a coarser arithmetic
OWN_GATE = {"attention": 6e-3, "context": 1.7e-2, "max": 0.3, "info_nce": 1e-2}
BASELINE_GATE = 0.5


def _similarity_inputs(case: Case, batch: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(1)
    device, dtype = case["device"], _dtype(case)
    patches = torch.randn(batch, case["patches"], case["dim"], generator=g)
    tokens = torch.randn(batch, case["tokens"], case["dim"], generator=g)
    # an aligned batch: token t of text n is a noisy copy of one patch of image n
    pick = torch.randint(case["patches"], (batch, case["tokens"]), generator=g)
    tokens += 0.7 * torch.gather(patches, 1, pick[..., None].expand_as(tokens))
    real = max(1, round(case["fill"] * case["tokens"]))
    weights = (torch.arange(case["tokens"]) < real).float().expand(batch, -1).contiguous()
    features = [x.to(device, dtype).requires_grad_() for x in (patches, tokens)]
    return [*features, weights.to(device), torch.tensor(SCALE, device=device)]


def _info_nce_inputs(case: Case, batch: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(1)
    image = F.normalize(torch.randn(batch, case["dim"], generator=g), dim=-1)
    text = F.normalize(image + torch.randn(batch, case["dim"], generator=g) * 0.05, dim=-1)
    features = [x.to(case["device"], _dtype(case)).requires_grad_() for x in (image, text)]
    return [*features, torch.tensor(SCALE, device=case["device"])]


def _dtype(case: Case) -> torch.dtype:
    is_wide = case["device"] == "cpu" or case["provider"] == "eager_fp32"
    return torch.float32 if is_wide else torch.bfloat16


def _provider(case: Case):
    if case["op"] == "info_nce":
        return providers.info_nce_provider(case["provider"])
    return providers.similarity_provider(case["provider"], case)


def _forward_backward(loss: Any, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    value = loss(*inputs)
    return value, *torch.autograd.grad(value, inputs[:2])


def _parity(case: Case, loss: Any) -> dict[str, float | None]:
    """Errors of loss and gradients against float64, on part of a large batch."""
    make = _info_nce_inputs if case["op"] == "info_nce" else _similarity_inputs
    most = PARITY_INFO_NCE if case["op"] == "info_nce" else PARITY_PAIRS
    inputs = make(case, min(case["batch"], most[case["device"]]))
    wide = [x.detach().double() for x in inputs]
    for x in wide[:2]:
        x.requires_grad_()
    if case["op"] == "info_nce":
        truth = _forward_backward(lambda a, b, k: info_nce_loss(a, b, k, impl="torch"), wide)
    else:
        oracle = providers.similarity_provider("torch", case)
        truth = _forward_backward(oracle, wide)
    made = _forward_backward(loss, inputs)
    errors = [((a.double() - b).norm() / b.norm()).item() for a, b in zip(made, truth, strict=True)]
    names = ("loss_error", "image_gradient_error", "text_gradient_error")
    if case["provider"] == "gloria_loop":  # another formula: there is nothing to agree with
        return dict.fromkeys(names)
    is_own = case["provider"] in OURS
    gate = OWN_GATE[case.get("pooling", "info_nce")] if is_own else BASELINE_GATE
    if not all(error <= gate for error in errors):  # max() passes over a NaN
        raise RuntimeError(f"no parity with float64: errors {errors}, allowed {gate}")
    return dict(zip(names, errors, strict=True))


def _flop(case: Case) -> tuple[float, float]:
    """Floating-point operations of the matrix products that the fused operator runs on real rows,
    forward and backward (kernels/README.md): what its backward pass makes again is counted, and
    gathers are no products."""
    if case["op"] == "info_nce":
        unit = 2.0 * case["batch"] ** 2 * case["dim"]
        # cosines, d image, d text; in float32 cosines twice
        return unit, (3 if _dtype(case) == torch.bfloat16 else 4) * unit
    rows = case["batch"] * max(1, round(case["fill"] * case["tokens"]))
    unit = 2.0 * rows * case["batch"] * case["patches"] * case["dim"]
    pooling, size = case["pooling"], _dtype(case).itemsize
    sizes = (case["batch"], case["batch"], case["tokens"], case["patches"], case["dim"], size)
    problem = tiling.Problem(*sizes, pooling, "mean")
    forward = 2 if pooling == "context" else 1
    backward = {"attention": 3 if tiling.takes_products(problem) else 4, "max": 1, "context": 9}
    again = 0 if tiling.is_kept(problem) else forward
    return forward * unit, (backward[pooling] + again) * unit


def _flat_product(case: Case, peak_tflops: float | None) -> Case:
    """The product of all rows with all patches alone, written in bf16 or float32."""
    rows, patches = case["batch"] * case["tokens"], case["batch"] * case["patches"]
    narrow = torch.bfloat16 if case["device"] == "cuda" else torch.float32
    q, v = (
        torch.randn(count, case["dim"], device=case["device"], dtype=narrow)
        for count in (rows, patches)
    )
    multiply = torch.mm if case["provider"] == "bf16" else providers.wide_product

    def product() -> Tensor:
        return multiply(q, v.T)

    spent = harness.measure(product, case["device"])
    row = case | {"status": "ok", "forward": spent, "forward_ms": spent["median_ms"]}
    if peak_tflops:
        row["forward_share"] = _product_share(case, row["forward_ms"], peak_tflops)
    return row


def _product_share(case: Case, ms: float, peak_tflops: float) -> float:
    """Share of the peak at which all rows by all patches would take ms."""
    flop = 2.0 * case["batch"] ** 2 * case["tokens"] * case["patches"] * case["dim"]
    return flop / ms / 1e9 / peak_tflops


def run_case(case: Case, peak_tflops: float | None) -> Case:
    """One row."""
    if case["op"] == "flat_product":
        return _flat_product(case, peak_tflops)
    if case["provider"] in COMPILED:
        # all share one code object, of which torch compiles eight variants; later ones run eagerly
        torch.compiler.reset()
    loss = _provider(case)
    row = case | {"status": "ok"} | _parity(case, loss)
    make = _info_nce_inputs if case["op"] == "info_nce" else _similarity_inputs
    inputs = make(case, case["batch"])

    def forward() -> Tensor:
        with torch.no_grad():
            return loss(*inputs)

    def both() -> tuple[Tensor, ...]:
        return _forward_backward(loss, inputs)

    warm = both()  # compiles before memory is measured
    del warm
    gradients = sum(x.nbytes for x in inputs[:2])
    row["peak_mib"] = (harness.peak_bytes(both, case["device"]) - gradients) / 2**20
    row["forward"] = harness.measure(forward, case["device"])
    row["both"] = harness.measure(both, case["device"])
    row["forward_ms"], row["both_ms"] = row["forward"]["median_ms"], row["both"]["median_ms"]
    if "host_ms" in row["both"]:
        row["host_ms"] = row["both"]["host_ms"]
    if peak_tflops:
        ahead, back = _flop(case)
        spent = max(row["both_ms"] - row["forward_ms"], 1e-6)
        row["forward_share"] = ahead / row["forward_ms"] / 1e9 / peak_tflops
        if case["provider"] == "fused":  # how many products the others run, they know
            row["backward_share"] = back / spent / 1e9 / peak_tflops
        row["matmul_peak_tflops"] = peak_tflops
    return row


def safely(case: Case, peak_tflops: float | None) -> Case:
    """run_case, or the reason why there is no number."""
    try:
        return run_case(case, peak_tflops)
    except providers.NotInstalled as error:
        return case | {"status": f"not installed: {error}"}
    except Exception as error:  # a baseline's failure is a result; it must not end the run
        if harness.is_out_of_memory(error):
            return case | {"status": "out of memory"}
        return case | {"status": f"failed: {type(error).__name__}: {str(error)[:200]}"}


def gpu_is_lost() -> bool:
    """Whether a kernel's error (an illegal address, say) ends every later call of this process."""
    if not torch.cuda.is_available():
        return False
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        return True
    return False


def _in_fresh_process(case: Case, peak_tflops: float | None) -> Case:
    command = [sys.executable, __file__, "--cell", json.dumps(case), "--peak", str(peak_tflops)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=CELL_S)
    except subprocess.TimeoutExpired:  # a kernel that never ends must not cost the rows after it
        return case | {"status": f"failed: no row within {CELL_S} s"}
    if done.returncode != 0:
        return case | {"status": f"failed: process ended with {done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])


def tune(device: str, path: Path) -> None:
    """Time of the fused loss under every tile map that fits, one kernel varied at a time."""
    from mlip.kernels._chip import chip_facts

    chip = chip_facts(torch.device(device))
    rows: list[Case] = []
    for dim in (128, 256):
        by_products = tiling.takes_products(
            tiling.Problem(256, 256, 112, 196, dim, 2, "attention", "")
        )
        backward = ("gradient",) if by_products else ("backward_rows", "backward_patches")
        for kind in ("forward", *backward):
            size = (kind, 196, dim, 2, chip)
            chosen = tiling.choose_tiling(*size)
            for candidate in tiling.fitting_tilings(*size):
                tiling.FORCED[kind] = candidate
                tiling.choose_tiling.cache_clear()
                case = similarity(256, 112, 196, dim, provider="fused", device=device, learned=True)
                label = {"kind": kind, "tiling": str(candidate), "chosen": candidate == chosen}
                rows.append(safely(case, None) | label)
                harness.write_rows("tune", rows, path)
                columns = ("dim", *label, "status", "forward_ms", "both_ms")
                print(json.dumps({k: rows[-1].get(k) for k in columns}), flush=True)
                if gpu_is_lost():
                    raise SystemExit(f"the GPU does not answer any more after {candidate}")
            del tiling.FORCED[kind]
            tiling.choose_tiling.cache_clear()


COLUMNS = (
    "op pooling batch tokens patches dim fill provider status forward_ms both_ms host_ms peak_mib "
    "forward_share backward_share loss_error image_gradient_error"
).split()


MEASURE_COLUMNS = ["measure", "wanted", "measured"]


def run_grid(
    cases: list[Case], deadline: float, fresh: bool, path: Path | None = None
) -> list[Case]:
    """Rows of a grid, written to `path` one by one; what the deadline leaves out says so."""
    device = cases[0]["device"]
    facts = harness.environment(device)
    peak_tflops = harness.matmul_peak_tflops(device)
    rows: list[Case] = []
    for case in cases:
        if time.monotonic() > deadline:
            row = case | {"status": "not run: out of time"}
        else:
            row = (_in_fresh_process if fresh else safely)(case, peak_tflops)
        rows.append(row | {"environment": facts})
        if path is not None:
            harness.write_rows("kernels", rows, path)
        # a lost GPU is lost to this process alone
        fresh = fresh or gpu_is_lost()
        print(json.dumps({k: row[k] for k in COLUMNS if k in row}), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--full", action="store_true", help="whole grid, a fresh process a row")
    parser.add_argument("--tune", action="store_true", help="time the tile maps of attention")
    parser.add_argument("--minutes", type=float, default=10.0, help="budget of the short grid")
    parser.add_argument("--first", type=int, default=0, help="go on at this row of the grid")
    parser.add_argument("--print", type=Path, help="print the table of an earlier run and stop")
    parser.add_argument("--out", type=Path, help="file of the rows (benchmarks/results)")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if arguments.print:
        rows = json.loads(arguments.print.read_text(encoding="utf-8"))
        print(harness.table(rows, COLUMNS))
        print(harness.table(measures(rows), MEASURE_COLUMNS))
        return
    if arguments.cell:
        peak = None if arguments.peak in (None, "None") else float(arguments.peak)
        print(json.dumps(safely(json.loads(arguments.cell), peak)))
        return
    if arguments.tune:
        if device != "cuda":
            raise SystemExit("--tune needs an NVIDIA GPU: tile maps mean nothing on a CPU")
        path = harness.write_rows("tune", [], arguments.out)
        tune(device, path)
    else:
        grid = full_grid(device) if arguments.full else short_grid(device)
        if not 0 <= arguments.first < len(grid):
            parser.error(f"--first: expected 0 to {len(grid) - 1}, got {arguments.first}")
        grid = grid[arguments.first :]
        minutes = float("inf") if arguments.full else arguments.minutes
        deadline = time.monotonic() + 60 * minutes
        path = harness.write_rows("kernels", [], arguments.out)
        rows = run_grid(grid, deadline, arguments.full, path)
        print(harness.table(rows, COLUMNS))
        if device == "cuda":
            print(harness.table(measures(rows), MEASURE_COLUMNS))
    print(f"rows: {path}")


if __name__ == "__main__":
    main()
