"""What README's first two commands, and CI, promise to do; `make -n` prints and runs nothing."""

from __future__ import annotations

import dataclasses
import subprocess
from pathlib import Path

from mlip.settings.config import load

ROOT = Path(__file__).resolve().parents[1]


def _steps(target: str) -> str:
    done = subprocess.run(
        ["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return done.stdout


def test_make_demo_trains_every_loss_on_60_000_pairs_with_two_ranks() -> None:
    command = "deepspeed --num_gpus 2 train.py --config configs/demo.yaml\n"
    assert command in _steps("demo")
    demo = load([ROOT / "configs" / "demo.yaml"])
    weights = {x.name: getattr(demo.loss, x.name).weight for x in dataclasses.fields(demo.loss)}
    assert len(weights) == 5 and min(weights.values()) > 0, weights
    pairs = demo.train.max_steps * demo.batch.global_pairs
    assert pairs >= 60_000
    for name in ("README.md", "configs/demo.yaml", "docs/results.md"):
        assert f"{pairs:,} pairs" in (ROOT / name).read_text(encoding="utf-8"), name


def test_ci_is_make_test_which_is_set_up_lint_types_and_tests() -> None:
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    commands = [line for line in lines if line and not line.startswith(("#", "set ", "cd "))]
    assert commands == ["make test"]
    steps = _steps("test")
    for part in ("ruff check .", "ruff format --check .", "bin/mypy", "-m pytest -n auto"):
        assert part in steps
    setup = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "-c constraints/$(SET).txt" in setup and "test: setup lint\n" in setup
