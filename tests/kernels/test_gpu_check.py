"""`make gpu-check` needs torch, triton, numpy and pytest alone, and says where a GPU is missing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

ROOT = Path(__file__).resolve().parents[2]

# everything that those four import by themselves is there; nothing else is
BARE = """
import importlib, pathlib, runpy, sys
import numpy, pytest, torch, torch.distributed, torch.profiler, triton, triton.language

class Bare:
    ours = {"mlip", "tests", "benchmarks"}
    present = set(sys.modules) | set(sys.stdlib_module_names) | ours

    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top not in self.present:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Bare())
for path in sorted(pathlib.Path("tests/kernels").glob("*.py")):
    if path.stem != "launch_offline":  # a script that takes the driver away
        importlib.import_module(f"tests.kernels.{path.stem}")
import tests.conftest, benchmarks.bench_kernels
from benchmarks import gpu_check
sys.argv = ["gpu_check.py"]
sys.exit(gpu_check.main())
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="would run the whole GPU check")
def test_it_starts_with_nothing_else_installed_and_names_the_missing_gpu() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, "-P", "-c", BARE],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 2, run.stderr[-3000:]
    assert "gpu-check needs an NVIDIA GPU" in run.stderr and "make test" in run.stderr
