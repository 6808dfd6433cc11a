"""`make gpu-check` needs torch, triton, numpy and pytest alone, and says where a GPU is missing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_check, harness

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


@pytest.mark.parametrize("name", gpu_check.PARTS)
def test_every_part_has_gpu_tests_and_ends_within_nine_minutes(name: str) -> None:
    part = gpu_check.PARTS[name]
    for tests in (ROOT / path for path in part.tests):
        files = sorted(tests.glob("test_*.py")) if tests.is_dir() else [tests]
        assert any("mark.gpu" in file.read_text(encoding="utf-8") for file in files), tests
    assert part.benchmark is None or (ROOT / "benchmarks" / part.benchmark).is_file()
    assert part.tests_s <= gpu_check.TOTAL_S - gpu_check.RESERVE_S
    # as `make gpu-check` has always asked for
    assert part.needs[:4] == ("torch", "triton", "numpy", "pytest")
    assert (part.needs == gpu_check.BASE) == (name == "kernels")


def test_every_file_with_gpu_tests_belongs_to_a_part() -> None:
    """A GPU test that no part runs would wait for somebody to remember it."""
    mark = "mark." + "gpu"
    own = Path(__file__)
    marked = {p for p in (ROOT / "tests").rglob("test_*.py") if mark in p.read_text() and p != own}
    paths = [ROOT / path for part in gpu_check.PARTS.values() for path in part.tests]
    assert marked and all(any(p.is_relative_to(path) for path in paths) for p in marked)


def test_after_red_tests_it_says_how_to_get_the_benchmark_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An hour of a card is short: one wrong bound must not cost the figures too."""
    ran: list[list[str]] = []
    paths: list[str] = []

    def run(command: list[str], env: dict[str, str], **_: object) -> Any:
        ran.append(command)
        paths.append(env["PYTHONPATH"])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_check, "run_tests", lambda *_: 1)
    monkeypatch.setattr(gpu_check.subprocess, "run", run)
    monkeypatch.setenv("PYTHONPATH", "/carried")
    monkeypatch.setenv("MLIP_COMMIT", "0123456789ab")
    monkeypatch.setattr(sys, "argv", ["gpu_check.py"])
    assert gpu_check.main() == 1 and not ran
    assert "bench_kernels.py was not run; --skip-tests runs it alone" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--skip-tests"])
    assert gpu_check.main() == 0 and ran[0][1].endswith("bench_kernels.py")
    # packages that were carried to a machine without a network stay importable
    assert paths[0] == os.pathsep.join([str(ROOT), "/carried"])
    assert "--out" not in ran[0]
    # where a limit may strike, rows are written to what comes back
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--skip-tests", "--out", "kept/rows.json"])
    assert gpu_check.main() == 0 and ran[1][-2:] == ["--out", "kept/rows.json"]


def test_figures_of_no_commit_are_refused_before_any_minute_is_spent(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_check, "run_tests", lambda *_: pytest.fail("tests were run"))
    monkeypatch.setattr(harness, "_run", lambda *_: None)  # no git
    monkeypatch.delenv("MLIP_COMMIT", raising=False)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py"])
    assert gpu_check.main() == 2
    assert "set MLIP_COMMIT" in capsys.readouterr().err
    monkeypatch.setenv("MLIP_COMMIT", "0123456789ab")
    monkeypatch.setattr(gpu_check, "run_tests", lambda *_: 1)
    assert gpu_check.main() == 1


def test_a_package_inside_a_missing_one_is_missing() -> None:
    assert gpu_check.is_there("json.decoder") and not gpu_check.is_there("no_such.inner")
