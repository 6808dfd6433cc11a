"""Timing, memory and environment of a benchmark row; no knowledge of what is measured.

A row is one JSON object: what ran, where, which versions and commit, milliseconds (median, 20th and
80th percentile), peak memory above what was there before, and how wrong the result is.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import platform
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
FLUSH_BYTES = 256 * 2**20  # larger than any L2 cache in use
WARMUP = 3  # calls on a GPU before the first that counts; one on a CPU
LOST_GPU = 75  # exit code: an error or a hang took the GPU from this process, another may go on
HANG_S = 180  # beyond what a row needs: one that takes longer counts as one that hangs
MOST_FLUSHES = 200  # about 15 ms of work: a call that waits for the GPU itself is never ahead


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _run(*command: str) -> str | None:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def environment(device: str) -> dict[str, Any]:
    """GPU or CPU, driver, versions and commit."""
    # a copy without its history, or with that of another day, is told where it is from
    told = os.environ.get("MLIP_COMMIT")
    changes = None if told else _run("git", "--no-optional-locks", "status", "--porcelain", "-uno")
    facts: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": told or _run("git", "rev-parse", "--short=12", "HEAD"),
        "modified": bool(changes),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        query = ("nvidia-smi", "--query-gpu=driver_version,clocks.max.sm", "--format=csv,noheader")
        facts |= {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "driver": _run(*query),
            "cuda": torch.version.cuda,
        }
    else:
        facts |= {"gpu": None, "cpu": _cpu_name(), "threads": torch.get_num_threads()}
    return facts


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _spread(times_ms: list[float]) -> dict[str, float]:
    ordered = sorted(times_ms)
    last = len(ordered) - 1
    return {
        "median_ms": statistics.median(ordered),
        "p20_ms": ordered[round(0.2 * last)],
        "p80_ms": ordered[round(0.8 * last)],
        "repeats": len(ordered),
    }


def measure(run: Callable[[], Any], device: str, budget_s: float = 1.0) -> dict[str, float]:
    """Milliseconds of `run` on a device that is never idle while it runs, caches cold.

    GPU:  between two events, behind enough flushes of the L2 cache that the host has issued all of
          `run` before the first event is reached, as in a training step; host_ms is what issuing
          it takes. What a lone call takes is the greater of the two.
    CPU:  processor time, all threads together: other work on the machine changes it little.
    Repeats until budget_s is spent: at least 5, at most 100.
    """
    times: list[float] = []
    if device != "cuda":
        run()
        start = time.process_time()
        while len(times) < 5 or (time.process_time() - start < budget_s and len(times) < 100):
            before = time.process_time()
            run()
            times.append(1e3 * (time.process_time() - before))
        return _spread(times)
    for _ in range(WARMUP):
        run()
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    begin = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)

    def once(flushes: int) -> float:
        torch.cuda.synchronize()
        for _ in range(flushes):
            flush.zero_()
        begin.record()
        issued = time.perf_counter()
        run()
        issued = time.perf_counter() - issued
        end.record()
        return issued

    flushes = _flushes_ahead(once(1), flush, begin, end)
    hosts: list[float] = []
    start = time.perf_counter()
    while len(times) < 5 or (time.perf_counter() - start < budget_s and len(times) < 100):
        hosts.append(1e3 * once(flushes))
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return _spread(times) | {"host_ms": statistics.median(hosts)}


def _flushes_ahead(issue_s: float, flush: torch.Tensor, begin: Any, end: Any) -> int:
    """How many flushes keep the GPU busy for twice as long as a call takes to issue."""
    torch.cuda.synchronize()
    begin.record()
    for _ in range(MOST_FLUSHES):
        flush.zero_()
    end.record()
    end.synchronize()
    one_s = begin.elapsed_time(end) / 1e3 / MOST_FLUSHES
    return min(MOST_FLUSHES, 1 + round(2 * issue_s / one_s))


def peak_bytes(run: Callable[[], Any], device: str) -> int:
    """Most memory that one call of `run` adds: of the GPU's allocator, or of torch's on the CPU."""
    if device != "cuda":
        return _peak_bytes_on_cpu(run)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _peak_bytes_on_cpu(run: Callable[[], Any]) -> int:
    # counted event by event by torch's own profiler: exact, whatever else the process holds
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        made = run()
    del made
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


class LostGpu(Exception):
    """An error took the GPU from this process: no row can follow."""


@contextlib.contextmanager
def within(seconds: float, give_up: Callable[[], Any]) -> Iterator[None]:
    """What runs inside ends in time, or this process does with LOST_GPU, after `give_up()`.

    For a kernel that never ends: nothing stops it but the end of its process. A hang that holds
    Python's lock is not seen; torch and Triton let go of it where they wait or launch.
    """
    if seconds == float("inf"):
        yield
        return

    def end() -> None:
        try:
            give_up()
        finally:
            os._exit(LOST_GPU)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()  # where it has begun to give up, nothing goes on beside it


def is_out_of_memory(error: Exception) -> bool:
    """Whether the card was full: not only torch's allocator says so, a library's workspace or a
    kernel's code may be what found no room."""
    words = ("out of memory", "ALLOC_FAILED")
    return isinstance(error, torch.cuda.OutOfMemoryError) or any(w in str(error) for w in words)


def matmul_peak_tflops(device: str) -> float | None:
    """bf16 matrix-product rate of this very card and run, the denominator of every share."""
    if device != "cuda":
        return None
    size = 8192
    a = torch.randn(size, size, device="cuda", dtype=torch.bfloat16)
    b = torch.randn(size, size, device="cuda", dtype=torch.bfloat16)
    spent = measure(lambda: a @ b, device, budget_s=1.0)
    return 2 * size**3 / (spent["median_ms"] * 1e-3) / 1e12


def read_json(path: Path, kind: type = dict) -> Any:
    """What a run left in a JSON file, of that kind.

    Raises:  SystemExit with one line that names the file where it holds no such thing
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SystemExit(f"{path}: cannot be read ({error}): delete it to make it again") from None
    if not isinstance(content, kind):
        raise SystemExit(
            f"{path}: expected a JSON {kind.__name__}, got {content!r:.40}: delete it to make it "
            "again"
        )
    return content


def rows_path(name: str) -> Path:
    """Where the rows of a run that begins now go."""
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%d-%H%M%S")
    return RESULTS / f"{name}-{stamp}.json"


def write_rows(name: str, rows: list[dict[str, Any]], path: Path | None = None) -> Path:
    """One JSON file a run: a list of rows; `path` is written again where it is given."""
    if path is None:
        RESULTS.mkdir(parents=True, exist_ok=True)
        path = rows_path(name)
    # whole or not at all: a time limit may strike while the file is written
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
    return path


def read_rows(name: str, folder: Path = RESULTS) -> list[dict[str, Any]]:
    """Rows of every run of this name, oldest first."""
    paths = sorted(folder.glob(f"{name}-*.json"))
    return [row for path in paths for row in json.loads(path.read_text(encoding="utf-8"))]


def replace_between(page: str, mark: str, text: str) -> str:
    """`page` with `text` between its two comments `<!-- MARK: begin -->` and `... end -->`.

    Raises:  ValueError where the page does not hold each of them once
    """
    begin, end = f"<!-- {mark}: begin -->", f"<!-- {mark}: end -->"
    if page.count(begin) != 1 or page.count(end) != 1:
        raise ValueError(f"expected one line {begin} and one line {end} in the page")
    before, rest = page.split(begin, 1)
    return f"{before}{begin}\n{text}\n{end}{rest.split(end, 1)[1]}"


def write_pages(
    text: dict[str, str], pages: dict[str, tuple[str, ...]], root: Path, *, check: bool
) -> list[Path]:
    """Put text by mark into the pages that have these marks; the pages that changed.

    With `check` nothing is written.
    Raises:  ValueError where a page lacks a mark
    """
    changed = []
    for name, marks in pages.items():
        page = before = (root / name).read_text(encoding="utf-8")
        for mark in marks:
            page = replace_between(page, mark, text[mark])
        if page != before:
            changed.append(root / name)
            if not check:
                (root / name).write_text(page, encoding="utf-8")
    return changed


def markdown(rows: list[dict[str, Any]]) -> str:
    """Rows as a table of a page; a cell that a row lacks is "-"."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for row in rows:
        # an error's text may have several lines
        cells = [" ".join(str(row.get(c, "-")).split()).replace("|", r"\|") for c in columns]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def table(rows: list[dict[str, Any]], columns: list[str]) -> str:
    """Rows as aligned text."""

    def cell(value: Any) -> str:
        if value is None:
            return "-"
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    body = [[cell(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(line[i]) for line in [columns, *body]) for i in range(len(columns))]
    lines = ["  ".join(x.ljust(w) for x, w in zip(line, widths, strict=True)) for line in body]
    header = "  ".join(x.ljust(w) for x, w in zip(columns, widths, strict=True))
    return "\n".join([header, *lines])
