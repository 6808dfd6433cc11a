"""One command for a machine with one NVIDIA GPU: every GPU test of a part, then its benchmark.

    python3 benchmarks/gpu_check.py                    kernels
    python3 benchmarks/gpu_check.py --part step        the whole training step
    python3 benchmarks/gpu_check.py --part data        DALI on the GPU, and the step fed by it
    python3 benchmarks/gpu_check.py --part deepspeed   one NCCL rank and ZeRO, then its steps

Each takes at most nine minutes, in the python3 that is there. Kernels need torch, triton, numpy and
pytest; late-interaction-kernels and inf-cl are measured where they are installed. What the other
parts need besides is in PARTS. Tests run first, in processes of their own: no number is worth
anything on red. Several processes share the kernels' out, because most of their time is
compilation on the CPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # an uninstalled checkout, as on a bare GPU machine
    sys.path.append(str(ROOT))

TOTAL_S = 9 * 60
TESTS_S = 4 * 60
RESERVE_S = 20  # of writing results and printing
# processes of tests: each holds a CUDA context of half a GiB. Nearly one a core: 1,200 kernels of
# 0.7 s are compiled, one after the other in each
MOST_SHARES = 14
BASE = ("torch", "triton", "numpy", "pytest")
STEP = ("transformers", "sklearn", "yaml", "safetensors", "psutil")
READING = ("pyarrow", "tokenizers", "cv2", "numba", "ahocorasick", "pydicom", "imagecodecs")


@dataclass(frozen=True)
class Part:
    """What is tested, what is measured after it, and which packages both import."""

    tests: tuple[str, ...]
    needs: tuple[str, ...]
    benchmark: str | None = None
    options: tuple[str, ...] = ()  # of the benchmark
    tests_s: float = TESTS_S
    is_shared: bool = False  # its tests know MLIP_TEST_SHARE


PARTS = {
    "kernels": Part(("tests/kernels",), BASE, "bench_kernels.py", is_shared=True),
    "step": Part(
        (
            "tests/training/test_gpu_objective.py",
            "tests/training/test_host_syncs.py",
            "tests/training/test_skipped_step.py",
            "tests/training/test_no_circles.py",
            "tests/encoders/test_residual.py",
            "tests/encoders/test_rounded_weights.py",
            "tests/encoders/test_variable_length.py",
            "tests/training/test_gpu_nccl.py",
        ),
        (*BASE, *STEP),
        "bench_step.py",
        tests_s=180,  # a limit: in one process, which compiles some eighty kernels
    ),
    "data": Part(
        ("tests/dataloading/test_dali_gpu.py",),
        (*BASE, *STEP, *READING, "nvidia.dali"),
        "bench_step.py",
        options=("--only", "reading"),
    ),
    "deepspeed": Part(
        ("tests/training/test_gpu_deepspeed.py",),
        (*BASE, *STEP, *READING, "deepspeed"),
        "bench_step.py",
        options=("--only", "deepspeed"),
        tests_s=TOTAL_S - RESERVE_S - 90,
    ),
}


def is_there(name: str) -> bool:
    """Whether a package can be imported, without importing it; "a.b" as well."""
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # of the part before the dot
        return False


def importing_root(environment: Mapping[str, str]) -> dict[str, str]:
    """`environment` whose processes import this checkout, and what PYTHONPATH named before: on a
    machine without a network packages are carried to a folder of their own."""
    paths = [str(ROOT), environment.get("PYTHONPATH", "")]
    return dict(environment) | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


def run_tests(part: Part, environment: dict[str, str], seconds: float) -> int:
    """0 if every share of the part's GPU tests passed; prints what failed."""
    count = max(1, min(MOST_SHARES, (os.cpu_count() or 1) - 2)) if part.is_shared else 1
    command = [sys.executable, "-m", "pytest", "-m", "gpu", *part.tests, "--durations=3"]
    command += ["-p", "no:cacheprovider"]
    end = time.monotonic() + seconds
    outcome = 0
    with tempfile.TemporaryDirectory() as folder:
        jobs = []
        for index in range(count):
            log = Path(folder) / f"share{index}.txt"
            with log.open("w", encoding="utf-8") as out:
                job = subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env=environment | {"MLIP_TEST_SHARE": f"{index}/{count}"},
                    stdout=out,
                    stderr=subprocess.STDOUT,
                )
            jobs.append((job, log))
        for job, log in jobs:
            try:
                code = job.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                job.kill()
                job.wait()
                code = 1
                print(f"the GPU tests did not end within {seconds:.0f} s", file=sys.stderr)
            outcome = outcome or code
            lines = log.read_text(encoding="utf-8").splitlines()
            print("\n".join(lines if code else lines[-5:]), flush=True)
    return outcome


def run_benchmark(command: list[str], environment: dict[str, str], end: float) -> int:
    """0 if the benchmark ended well; where it lost the GPU a fresh process does the rest of it."""
    from benchmarks.harness import LOST_GPU

    outcome = 0
    while True:
        minutes = (end - time.monotonic()) / 60
        # a row that has begun may end late: a minute of slack
        timed = [*command, "--minutes", f"{max(0.5, minutes - 1):.2f}"]
        try:
            code = subprocess.run(timed, cwd=ROOT, env=environment, timeout=60 * minutes).returncode
        except subprocess.TimeoutExpired:
            print("the benchmarks did not end in time", file=sys.stderr)
            return 1
        outcome = outcome or code
        if code != LOST_GPU:
            return outcome
        command = [*(word for word in command if word != "--go-on"), "--go-on"]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--part", choices=PARTS, default="kernels")
    parser.add_argument("--skip-tests", action="store_true")
    parser.add_argument("--skip-benchmarks", action="store_true")
    parser.add_argument("--out", type=Path, help="the benchmark's file of rows, written row by row")
    arguments = parser.parse_args()
    start = time.monotonic()
    part = PARTS[arguments.part]
    missing = [name for name in part.needs if not is_there(name)]
    if missing:
        print(f"gpu-check needs {', '.join(missing)} in {sys.executable}", file=sys.stderr)
        return 2
    import torch

    from benchmarks import harness
    from mlip.kernels._dispatch import missing_tools

    if not torch.cuda.is_available():
        print(
            "gpu-check needs an NVIDIA GPU and a CUDA build of torch; torch "
            f"{torch.__version__} sees none. On a CPU run: make test, make bench",
            file=sys.stderr,
        )
        return 2
    tools = missing_tools()
    if tools is not None:
        print(f"gpu-check cannot launch a kernel: {tools}", file=sys.stderr)
        return 2
    is_measuring = part.benchmark is not None and not arguments.skip_benchmarks
    if is_measuring and harness.environment("cpu")["commit"] is None:
        print(
            "gpu-check cannot tell of which commit its figures are: this copy has no .git, or git "
            "is not installed; set MLIP_COMMIT to the first twelve digits of its commit",
            file=sys.stderr,
        )
        return 2
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment = importing_root(environment) | {"PYTHONUNBUFFERED": "1"}
    environment.pop("MLIP_DISABLE_TRITON", None)  # the switch would test torch against itself
    environment.pop("DS_ACCELERATOR", None)  # "cpu", as make sets it, would keep DeepSpeed there
    outcome, end = 0, start + TOTAL_S - RESERVE_S
    if not arguments.skip_tests:
        outcome = run_tests(part, environment, part.tests_s)
        if outcome != 0 and part.benchmark is not None:
            print(f"{part.benchmark} was not run; --skip-tests runs it alone", file=sys.stderr)
    if outcome == 0 and is_measuring:
        name = part.benchmark.removeprefix("bench_").removesuffix(".py")
        out = arguments.out or harness.rows_path(name)
        command = [sys.executable, str(ROOT / "benchmarks" / part.benchmark), *part.options]
        outcome = run_benchmark([*command, "--out", str(out)], environment, end)
    print(
        f"gpu-check: {'passed' if outcome == 0 else 'FAILED'} in {time.monotonic() - start:.0f} s"
    )
    return outcome


if __name__ == "__main__":
    sys.exit(main())
