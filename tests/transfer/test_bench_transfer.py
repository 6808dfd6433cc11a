"""The transfer benchmark: cells go on, tables say what happened; `mlip evaluate` is faked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import bench_transfer
from benchmarks.transfer_tables import CASE_REPORTS, WITHOUT_LABELS, as_markdown

VALUES = {"imagenet": 0.65, "mlip": 0.9, "mgca": 0.8, "clip": 0.7, "random": 0.6}


def estimate(value: float, seeds: tuple[int, ...]) -> dict[str, Any]:
    known = {"low": value - 0.01, "high": value + 0.01, "n": 9, "reason": None}
    return {"value": value, **known, "seeds": [value] * len(seeds), "seed_sd": 0.0}


def results_of(items: list[str]) -> dict[str, Any]:
    """What a cell's command would have written: the method's own value, whatever the task."""
    method = next((m for m in VALUES if f"/{m}_" in " ".join(items)), "imagenet")
    method = "random" if "transfer.start=random" in items else method
    value = estimate(VALUES[method], (1, 2))
    fits = [{"rows": 20}]
    scores = {"macro": {"auroc": value}, "headline": "auroc"}
    split = {"images": 9, "patients": 8}
    return {
        "run": {"seed": 1},
        "fingerprints": {},
        "versions": {},
        "data": {"splits": {"train": split, "test": split}},
        "fractions": [{"percent": p, "scores": scores, "fits": fits} for p in (1.0, 10.0)],
    }


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
    """Every command that was run; runs of two methods lie in tmp_path."""
    for method in ("mlip", "clip"):
        for seed in (1, 2):
            run = tmp_path / "runs" / f"{method}_{seed}"
            (run / "checkpoints").mkdir(parents=True)
            macro = {"global": estimate(0.75, (1,)), "local": estimate(0.85, (1,))}
            results = {"fingerprints": {"weights": f"{method}{seed}"}}
            results |= {"zero_shot": {"macro": macro}}
            (run / "results.json").write_text(json.dumps(results))
    told: list[list[str]] = []

    def call(command: list[str], log: Path, threads: int) -> tuple[float, float]:
        told.append(command)
        if "evaluate" in command:
            folder = Path(command[command.index("--out") + 1])
            (folder / "results.json").write_text(json.dumps(results_of(command)))
        else:
            data = Path(command[command.index("--out") + 1])
            data.mkdir()
            (data / "manifest.csv").write_text("")
        return 5.0, 6.0

    monkeypatch.setattr(bench_transfer, "call", call)
    return told


def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> str:
    table = more[0]
    arguments = ["bench_transfer.py", *more, "--out", str(tmp_path / "out"), "--seeds", "1", "2"]
    monkeypatch.setattr("sys.argv", [*arguments, "--runs", str(tmp_path / "runs")])
    assert bench_transfer.main() == 0
    return (tmp_path / "out" / f"{table}.md").read_text()


def test_a_killed_run_goes_on_with_the_cells_that_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, commands: list[list[str]]
) -> None:
    tasks = ("--tasks", "phantom_classification")
    text = run(tmp_path, monkeypatch, "phantoms", *tasks)
    assert len(commands) == 3  # data, and one cell for each of two methods
    assert "| full MLIP | macro AUROC | 0.900" in text and "9 test images of 8 patients" in text
    assert "mlip, 1 %: +0.300 against random weights, above, intervals apart" in text
    assert "higher in 2 of 2 seeds" in text and "mlip 5 s, random 5 s" in text
    (tmp_path / "out" / "phantom_classification-random" / "results.json").unlink()
    assert run(tmp_path, monkeypatch, "phantoms", *tasks) == text
    assert len(commands) == 4 and "transfer.start=random" in commands[-1]
    assert f"checkpoint={tmp_path}/runs/mlip_{{seed}}" in commands[1]


def test_a_cell_of_other_settings_or_another_checkpoint_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, commands: list[list[str]]
) -> None:
    tasks = ("--tasks", "phantom_classification")
    run(tmp_path, monkeypatch, "phantoms", *tasks)
    with pytest.raises(SystemExit, match="transfer.probe=adamw"):
        run(tmp_path, monkeypatch, "phantoms", *tasks, "--set", "transfer.probe=adamw")
    again = tmp_path / "runs" / "mlip_2" / "results.json"
    again.write_text(json.dumps({"fingerprints": {"weights": "trained anew"}}))
    with pytest.raises(SystemExit, match="other checkpoints"):
        run(tmp_path, monkeypatch, "phantoms", *tasks)


def test_methods_without_a_checkpoint_are_not_run_and_said_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, commands: list[list[str]]
) -> None:
    more = ("--tasks", "phantom_classification", "--imagenet", "weights/resnet")
    text = run(tmp_path, monkeypatch, "ablation", *more)
    assert "| ImageNet weights | macro AUROC | 0.650" in text
    assert any("model.vision.source=weights/resnet" in command for command in commands)
    line = next(x for x in text.splitlines() if x.startswith("| MGCA"))
    assert line.count("not run") == 2
    assert "clip, 10 %: +0.100" in text
    assert "zero-shot macro-AUROC, global head | 0.750 (0.750 to 0.750)" in text
    assert "zero-shot macro-AUROC, local score | 0.850 (0.850 to 0.850)" in text
    assert "recall@10 of 256, image to text | n/a" in text
    written = (tmp_path / "out" / "ablation.json").read_text()
    assert '"configs/transfer/' in written and str(bench_transfer.ROOT) not in written
    saved = json.loads(written)
    cell = saved["tasks"]["phantom_classification"]["clip"][0]
    assert cell["cell"]["checkpoints"] == ["clip1", "clip2"]
    assert as_markdown({}, {}, ("random",), (1,)).startswith("Seeds 1")


def test_intervals_that_touch_are_not_called_apart_and_a_draw_is_not_won() -> None:
    def of(*ranges: tuple[float, float, float], seeds: tuple[float, ...]) -> list[dict[str, Any]]:
        made = results_of([])
        for fraction, (low, value, high) in zip(made["fractions"], ranges, strict=True):
            known = {"value": value, "low": low, "high": high, "seeds": list(seeds)}
            auroc = estimate(value, seeds) | known
            fraction["scores"] = {"macro": {"auroc": auroc}, "headline": "auroc"}
        return [made | {"cell": {"processor_s": 5.0}}]

    random = of((0.60, 0.66, 0.70), (0.56, 0.60, 0.70), seeds=(0.6, 0.7))
    found = {
        "mlip": of((0.65, 0.70, 0.75), (0.40, 0.50, 0.55), seeds=(0.7, 0.7)),
        "clip": of((0.58, 0.62, 0.66), (0.71, 0.75, 0.80), seeds=(0.5, 0.9)),
        "random": random,
    }
    text = as_markdown({"phantom_classification": found}, {}, ("mlip", "clip", "random"), (1, 2))
    won = "higher in 1 of 2 seeds"
    assert f"mlip, 1 %: +0.040 against random weights, intervals overlap; {won}" in text
    assert f"mlip, 10 %: -0.100 against random weights, below, intervals apart; {won}" in text
    assert f"clip, 1 %: -0.040 against random weights, intervals overlap; {won}" in text
    assert f"clip, 10 %: +0.150 against random weights, above, intervals apart; {won}" in text


def test_figures_of_real_reports_and_of_runs_stand_in_their_own_columns() -> None:
    ways = {"image_to_text": 0.4, "text_to_image": 0.3}
    scores = {way: {"recall@10": estimate(value, (3,))} for way, value in ways.items()}
    whole = {"scores": scores, "chance": {"recall@10": 0.125}, "n": 80}
    found = {CASE_REPORTS: {"mlip": [{"run": {"seed": 3}, "retrieval": {"whole": whole}}]}}
    none: dict[str, Any] = {"value": None}
    known = {name: [estimate(0.7, (1,)), estimate(0.9, (1,)), none] for name in WITHOUT_LABELS}
    lines = as_markdown(found, {"mlip": known}, ("mlip",), (3,)).splitlines()
    (line,) = [line for line in lines if line.startswith("| full MLIP | 3 |")]
    cells = [cell.strip() for cell in line.split("|")]
    assert [cell[:5] for cell in cells[3:-1]] == ["0.400", "0.300", "0.125", "80"]
    assert "| pointing by name, hit rate | 0.800 (0.700 to 0.900) |" in lines
