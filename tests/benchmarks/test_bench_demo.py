"""The demo's tables: each figure under its own name, differences paired by seed, rows kept.

Oracle: figures chosen by hand; Student's t of two degrees of freedom is 4.303 at 97.5 %.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import bench_demo


def _result(seed: int, value: float, *, none: bool = False) -> dict[str, Any]:
    """Local scores and image to text are `value`, all others half of it."""

    def heads(at: dict[str, Any]) -> dict[str, Any]:
        return at | {"global": at["combined"]}

    def of(number: float) -> dict[str, Any]:
        return {"value": number}

    macro = heads({"local": of(value), "combined": of(value / 2)})
    ways = {"image_to_text": {"recall@10": of(value)}, "text_to_image": {"recall@10": of(0.5)}}
    keyword = {"hit": of(None if none else value), "over_swapped": of(1.0)}
    keyword |= {"area": 0.25, "prior_with_side": 0.5}
    part = {"all": keyword, "findings_at_twice_area": 3}
    return {
        "run": {"seed": seed, "pairs_seen": 12_000, "commit": "0123456"},
        "config": {"data": {"phantom": {"test_seed": 3_000_000 + seed}}},
        "zero_shot": {"macro": macro, "worst": macro},
        "retrieval": {"scores": heads({"local": ways, "combined": ways})},
        "grounding": {"keyword": part, "sentence": part},
    }


def _row(seed: int, value: float, *, none: bool = False) -> dict[str, Any]:
    shown = bench_demo.measures(_result(seed, value, none=none))
    return {"variant": "mlip", "seed": seed, "test_seed": 10 + seed, "measures": shown}


def test_every_figure_stands_under_its_name() -> None:
    shown = bench_demo.measures(_result(1, 0.8))
    assert shown["zero-shot macro-AUROC, local score"] == 0.8
    assert shown["zero-shot macro-AUROC, global head"] == 0.4
    assert shown["recall@10 of 256, image to text, local"] == 0.8
    assert shown["recall@10 of 256, text to image, local"] == 0.5
    assert shown["pointing, keyword: hit rate"] == 0.8
    assert shown["pointing, keyword: area chance"] == 0.25
    text = bench_demo.table({"mlip": [_row(1, 0.8), _row(2, 0.9)], "clip": []})
    assert "mlip, mean of seeds 1, 2 (least to most)" in text and "clip" not in text
    assert "| zero-shot macro-AUROC, local score | 0.850 (0.800 to 0.900) |" in text
    assert "| pairs seen | 12000 (12000 to 12000) |" in text


def test_no_figure_takes_the_place_of_another() -> None:
    """Oracle: a number of its own at every place, and the name that it must stand under."""

    def of(number: float) -> dict[str, float]:
        return {"value": number}

    heads, ways = ("global", "local", "combined"), ("image_to_text", "text_to_image")
    recall = {
        head: {way: {"recall@10": of(20.0 + 2 * i + j)} for j, way in enumerate(ways)}
        for i, head in enumerate(heads)
    }
    grounding = {
        phrase: {
            "all": {"hit": of(n), "over_swapped": of(n + 1), "area": n + 2}
            | {"prior_with_side": n + 3},
            "findings_at_twice_area": n + 4,
        }
        for phrase, n in (("keyword", 30.0), ("sentence", 40.0))
    }
    zero_shot = {
        "macro": {head: of(10.0 + i) for i, head in enumerate(heads)},
        "worst": {head: of(15.0 + i) for i, head in enumerate(heads)},
    }
    result = {"zero_shot": zero_shot, "grounding": grounding, "retrieval": {"scores": recall}}
    expected = {
        "zero-shot macro-AUROC, global head": 10.0,
        "zero-shot macro-AUROC, local score": 11.0,
        "zero-shot macro-AUROC, combined": 12.0,
        "worst finding, global head": 15.0,
        "worst finding, local score": 16.0,
    }
    for i, head in enumerate(heads):
        for j, way in enumerate(("image to text", "text to image")):
            expected[f"recall@10 of 256, {way}, {head}"] = 20.0 + 2 * i + j
    names = ("hit rate", "over swapped image", "area chance", "fixed pixel with side")
    for phrase, n in (("keyword", 30.0), ("sentence", 40.0)):
        for k, name in enumerate((*names, "findings at twice their area")):
            expected[f"pointing, {phrase}: {name}"] = n + k
    made = bench_demo.measures(result | {"run": {"pairs_seen": 99}})
    assert made == expected | {"pairs seen": 99}


def test_a_figure_that_a_run_lacks_is_left_out_of_the_mean() -> None:
    text = bench_demo.table({"mlip": [_row(1, 0.8), _row(2, 0.9, none=True)]})
    assert "| pointing, keyword: hit rate | 0.800 |" in text
    text = bench_demo.table({"mlip": [_row(2, 0.9, none=True)]})
    assert "| pointing, keyword: hit rate | n/a |" in text


def test_a_run_is_told_its_seed_and_its_test_patients_and_is_not_made_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = []

    def launch(command: list[str], **named: Any) -> None:
        assert named["check"] and named["env"]["DS_ACCELERATOR"] == "cpu"
        commands.append(command)
        result = _result(4, 0.8)
        (folder / "results.json").write_text(json.dumps(result))

    monkeypatch.setattr(bench_demo, "ROOT", tmp_path)
    monkeypatch.setattr(bench_demo.subprocess, "run", launch)
    folder = tmp_path / "runs" / "bench" / "mgca_4"
    for _ in range(2):
        row = bench_demo.run("mgca", 4, 3_000_004)
        assert (row["variant"], row["seed"], row["commit"]) == ("mgca", 4, "0123456")
    (command,) = commands
    at = command.index("--config")
    assert command[at + 1 : at + 3] == ["configs/demo.yaml", "configs/transfer/baseline_mgca.yaml"]
    assert {f"run.dir={folder}", "run.seed=4", "data.phantom.seed=4"} < set(command)
    assert "data.phantom.test_seed=3000004" in command


CONTENTS = ("", "[]", "null", '{"run": {}}', '{"run"', "[" * 100_000)


@pytest.mark.parametrize("content", [*CONTENTS, json.dumps(_result(5, 0.8))])
def test_results_that_are_none_of_this_run_are_one_line_with_their_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    """Those of other test patients stood in the table under the asked ones' number."""
    monkeypatch.setattr(bench_demo, "ROOT", tmp_path)
    folder = tmp_path / "runs" / "bench" / "mgca_4"
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(content)
    with pytest.raises(SystemExit, match="mgca_4/results.json: .*: delete "):
        bench_demo.run("mgca", 4, 3_000_004)


@pytest.mark.parametrize("content", ["", "{}", "[1]", '[{"variant": "mlip"}]', "[{"])
def test_a_damaged_file_of_rows_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    (tmp_path / "demo.json").write_text(content)
    monkeypatch.setattr(sys, "argv", ["bench_demo.py", "--rows", str(tmp_path / "demo.json")])
    with pytest.raises(SystemExit, match="demo.json: "):
        bench_demo.main()


def test_differences_are_paired_by_seed_with_student_s_interval() -> None:
    ours = [_row(seed, value) for seed, value in ((1, 0.7), (2, 0.8), (3, 0.9))]
    theirs = [_row(seed, value, none=seed == 3) for seed, value in ((3, 0.6), (1, 0.6), (2, 0.6))]
    text = bench_demo.differences({"mlip": ours, "clip": theirs})
    assert "mlip minus clip, 3 seeds" in text
    assert "| zero-shot macro-AUROC, local score | +0.200 (-0.048 to +0.448) |" in text
    assert "hit rate" not in text and "pairs seen" not in text
    assert bench_demo.differences({"mlip": ours, "clip": theirs[:1]}) == ""
    other = [*theirs[1:], _row(9, 0.1)]  # of a seed that we have not run
    assert "mlip minus clip, 2 seeds" in bench_demo.differences({"mlip": ours, "clip": other})


def test_a_run_is_done_once_and_its_row_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, done = tmp_path / "demo.json", []
    rows.write_text(json.dumps([_row(2, 0.9)]))

    def run(variant: str, seed: int, test_seed: int) -> dict[str, Any]:
        done.append((variant, seed, test_seed))
        return {**_row(seed, 0.8), "test_seed": test_seed}

    monkeypatch.setattr(bench_demo, "run", run)
    for test_seed in ("10", "10", "20"):
        command = ["bench_demo.py", "--seeds", "1", "2", "--test-seed", test_seed]
        monkeypatch.setattr(sys, "argv", [*command, "--rows", str(rows)])
        bench_demo.main()
    # other test patients are another run
    assert done == [("mlip", 1, 11), ("mlip", 1, 21), ("mlip", 2, 22)]
    kept = [(row["seed"], row["test_seed"]) for row in json.loads(rows.read_text())]
    assert kept == [(1, 11), (1, 21), (2, 12), (2, 22)]
    assert (
        "| zero-shot macro-AUROC, local score | 0.850 (0.800 to 0.900) |" in capsys.readouterr().out
    )
