"""The transfer benchmark: cells go on, tables say what happened; `mlip evaluate` is faked."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import bench_transfer
from benchmarks.transfer_tables import CASE_REPORTS, WITHOUT_LABELS, as_markdown
from mlip.pretrained import from_pretrained
from mlip.transfer.measures.compare import compare
from mlip.transfer.measures.predictions import (
    FILE,
    Predictions,
    load_predictions,
    of_findings,
    save_predictions,
)
from tests.small_run import small_export

VALUES = {"imagenet": 0.65, "mlip": 0.9, "mgca": 0.8, "clip": 0.7, "random": 0.6}


def estimate(value: float, seeds: tuple[float, ...]) -> dict[str, Any]:
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
    assert "mlip, 1 %, against random weights: macro AUROC +0.300, above, intervals apart" in text
    assert "higher in 2 of 2 seeds" in text and "mlip 5 s, random 5 s" in text
    (tmp_path / "out" / "phantom_classification-random" / "results.json").unlink()
    assert run(tmp_path, monkeypatch, "phantoms", *tasks) == text
    assert len(commands) == 4 and "transfer.start=random" in commands[-1]
    for command in (commands[1], commands[-1]):  # a random tower has MLIP's shape
        assert f"checkpoint={tmp_path}/runs/mlip_{{seed}}" in command


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


@pytest.mark.parametrize("content", ["", "[]", '{"settings"', "{}", '{"settings": 5}'])
@pytest.mark.parametrize("name", ["cell.json", "results.json", "runs"])
def test_a_damaged_file_of_a_cell_is_one_line_with_its_name(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    commands: list[list[str]],
    name: str,
    content: str,
) -> None:
    tasks = ("--tasks", "phantom_classification")
    run(tmp_path, monkeypatch, "phantoms", *tasks)
    cell = tmp_path / "out" / "phantom_classification-mlip"
    path = tmp_path / "runs" / "mlip_2" / "results.json" if name == "runs" else cell / name
    path.write_text(content)
    with pytest.raises(SystemExit, match=f"{path.parent.name}.*: "):
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
    assert "clip, 10 %, against random weights: macro AUROC +0.100" in text
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
    assert (
        f"mlip, 1 %, against random weights: macro AUROC +0.040, intervals overlap; {won}" in text
    )
    assert (
        f"mlip, 10 %, against random weights: macro AUROC -0.100, below, intervals apart; {won}"
        in text
    )
    assert (
        f"clip, 1 %, against random weights: macro AUROC -0.040, intervals overlap; {won}" in text
    )
    assert (
        f"clip, 10 %, against random weights: macro AUROC +0.150, above, intervals apart; {won}"
        in text
    )


def test_cells_that_kept_their_images_scores_are_compared_patient_by_patient(
    tmp_path: Path,
) -> None:
    generator = np.random.default_rng(0)
    rows, truth = np.arange(60), generator.random((60, 1)) < 0.4
    found = {}
    for method, signal in (("mlip", 3.0), ("clip", 0.5), ("random", 0.0)):
        series = [
            one
            for percent in ("1 %", "10 %")
            for seed in (1, 2)
            for one in of_findings(
                percent, seed, ["a"], rows, truth, generator.normal(size=(60, 1)) + signal * truth
            )
        ]
        facts = {"name": method, "split": "test", "manifest": "m"}
        (tmp_path / method).mkdir()
        made = Predictions(series, dict(zip(range(60), range(60), strict=True)), facts)
        save_predictions(made, tmp_path / method / FILE)
        cell = {"cell": {"processor_s": 5.0}, "folder": tmp_path / method}
        found[method] = [results_of([]) | cell]
    text = as_markdown({"phantom_classification": found}, {}, tuple(found), (1, 2))
    told = compare(
        [load_predictions(tmp_path / "mlip")],
        [load_predictions(tmp_path / "clip")],
        ("10 %", "10 %"),
        resamples=2000,
        seed=0,
    )["methods"][0]["mean"][0]["difference"]
    assert told["low"] > 0
    ends = f"{told['value']:+.3f} [{told['low']:+.3f}, {told['high']:+.3f}]"
    assert f"- mlip, 10 %, against plain contrast: AUROC {ends}, higher in 2 of 2 seeds" in text
    assert text.count("against random weights: AUROC") == 4 and "overlap" not in text
    assert "random, 1 %" not in text and "clip, 1 %, against plain" not in text


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


def _options(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> argparse.Namespace:
    monkeypatch.setattr("sys.argv", ["bench_transfer.py", *arguments])
    return bench_transfer.parse()


def test_a_missing_pre_training_is_made_once_from_its_seed_and_overlay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[list[str]] = []

    def call(command: list[str], log: Path, threads: int) -> None:
        told.append(command)
        (tmp_path / "mgca_2").mkdir()
        (tmp_path / "mgca_2" / "results.json").write_text("{}")

    monkeypatch.setattr(bench_transfer, "call", call)
    options = _options(monkeypatch, "ablation", "--pretrain", "50")
    for _ in range(2):
        bench_transfer.pretrain("mgca", 2, tmp_path, options)
    (command,) = told
    names = ("demo.yaml", "transfer/baseline_mgca.yaml")
    configs = [str(bench_transfer.CONFIGS / name) for name in names]
    at = command.index("--config")
    assert command[at + 1 : at + 3] == configs
    wanted = "run.seed=2 data.phantom.seed=2 data.phantom.test_seed=2000002 train.max_steps=50"
    assert {*wanted.split(), f"run.dir={tmp_path / 'mgca_2'}"} < set(command)


def test_settings_of_a_cell_are_those_of_its_task_and_method(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = _options(monkeypatch, "phantoms", "--imagenet", "w", "--fractions", "[5]")

    def told(method: str, task: str) -> list[str]:
        return bench_transfer.settings(method, task, "runs/x_{seed}", (1, 2), options)

    cheap = set(bench_transfer.CHEAP)
    assert {"transfer.max_steps=300", "transfer.patience=4", "transfer.epochs=100"} < cheap
    found = told("mlip", "phantom_classification")
    # patients of no pre-training: those are drawn from seeds 1, 2, ... and 2000001, ...
    assert {"data.phantom.seed=3000001", "data.phantom.test_seed=4000001"} < set(found)
    assert "transfer.fractions=[5]" in found and not cheap & set(found)
    assert cheap < set(told("mlip", "phantom_detection"))
    found = told("imagenet", "lung_segmentation")
    assert {"transfer.start=imagenet", "model.vision.source=w", "data.channels=3"} < set(found)
    assert cheap < set(found) and not any(item.startswith("checkpoint=") for item in found)


def test_case_reports_are_read_by_each_seed_s_own_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, commands: list[list[str]]
) -> None:
    told, made, runs = [], [], tmp_path / "runs"

    def untrained(checkpoint: Path, seed: int, folder: Path) -> Path:
        made.append((checkpoint.name, seed))
        return folder

    monkeypatch.setattr(bench_transfer, "untrained", untrained)
    monkeypatch.setattr(bench_transfer, "run_cell", lambda cell, items, *_: told.append(items))
    options = _options(monkeypatch, "real", "--imagenet", "w")
    cells = bench_transfer.cells
    for method, names in (("clip", "clip_{}"), ("random", "untrained-{}")):
        told.clear()
        cells(method, CASE_REPORTS, (1, 2), runs, runs, options)
        for seed, items in zip((1, 2), told, strict=True):
            wanted = {f"checkpoint={runs / names.format(seed)}", f"run.seed={seed}"}
            assert wanted | {"evaluate.split=test"} < set(items)
    assert made == [("mlip_1", 1), ("mlip_2", 2)]
    assert cells("imagenet", CASE_REPORTS, (1,), runs, runs, options) == []  # has no text tower
    # one seed without a checkpoint: no mean over the others
    (runs / "clip_2" / "checkpoints").rmdir()
    (runs / "clip_2" / "results.json").unlink()
    assert cells("clip", "phantom_classification", (1, 2), runs, runs, options) == []
    assert bench_transfer.without_labels("clip", (1, 2), runs) == {}


def test_an_untrained_model_has_new_weights_by_seed_and_the_concepts_of_the_trained(
    tmp_path: Path,
) -> None:
    export = small_export()
    assert bench_transfer.has_checkpoint(export) and not bench_transfer.has_checkpoint(tmp_path)
    own = json.loads((export / "config.json").read_text())["fingerprints"]["weights"]
    assert bench_transfer.weights_of(export) == own
    models = [from_pretrained(export).model]
    for seed in (1, 2):
        folder = bench_transfer.untrained(export, seed, tmp_path / str(seed))
        models.append(from_pretrained(folder).model)
    weights = [model.image_head.first.weight for model in models]
    assert not any(torch.equal(weights[i], weights[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    for model in models[1:]:
        assert torch.equal(model.concept_vectors, models[0].concept_vectors)


def test_a_command_that_fails_ends_the_table_and_its_time_is_the_child_s(tmp_path: Path) -> None:
    busy = "import time\nwhile time.process_time() < 0.3: pass"
    spent, wall = bench_transfer.call([sys.executable, "-c", busy], tmp_path / "a.log", 1)
    assert spent >= 0.3 and wall > 0.0
    with pytest.raises(SystemExit, match="b ended with 3: see"):
        bench_transfer.call([sys.executable, "-c", "raise SystemExit(3)"], tmp_path / "b.log", 1)
