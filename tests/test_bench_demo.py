"""The demo over seeds: its rows are kept, used again and paired by seed. Oracle: by hand."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import bench_demo


def _row(variant: str, seed: int, value: float) -> dict[str, Any]:
    measures = {"AUROC": value, "pairs seen": 100.0}
    return {
        "variant": variant, "seed": seed, "test_seed": 10 + seed, "commit": "abc",
        "measures": measures,
    }  # fmt: skip


def test_a_run_is_done_once_and_its_row_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, done = tmp_path / "demo.json", []
    rows.write_text(json.dumps([_row("mlip", 2, 0.9)]))

    def run(variant: str, seed: int, test_seed: int) -> dict[str, Any]:
        done.append((variant, seed, test_seed))
        return {**_row(variant, seed, 0.8), "test_seed": test_seed}

    monkeypatch.setattr(bench_demo, "run", run)
    for test_seed in ("10", "10", "20"):
        command = ["bench_demo.py", "--seeds", "1", "2", "--test-seed", test_seed]
        monkeypatch.setattr(sys, "argv", [*command, "--rows", str(rows)])
        bench_demo.main()
    # other test patients are another run
    assert done == [("mlip", 1, 11), ("mlip", 1, 21), ("mlip", 2, 22)]
    kept = [(row["seed"], row["test_seed"]) for row in json.loads(rows.read_text())]
    assert kept == [(1, 11), (1, 21), (2, 12), (2, 22)]
    assert "| AUROC | 0.850 (0.800 to 0.900) |" in capsys.readouterr().out


def test_differences_are_paired_by_seed() -> None:
    ours = [_row("mlip", seed, value) for seed, value in ((1, 0.9), (2, 0.8), (3, 0.7))]
    other = [_row("clip", seed, value) for seed, value in ((3, 0.5), (2, 0.7), (4, 0.0))]
    text = bench_demo.differences({"mlip": ours, "clip": other})
    # gaps 0.2 and 0.1: their mean and 12.706 times 0.05
    assert "| AUROC | +0.150 (-0.485 to +0.785) |" in text
    assert "mlip minus clip, 2 seeds" in text and "pairs seen" not in text
    assert bench_demo.differences({"mlip": ours, "clip": other[2:]}) == ""
