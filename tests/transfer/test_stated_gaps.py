"""A score that cannot be computed is n/a with its reason, never a number that looks like one.

Through the real command. Oracle: the planted gap, by count; neither a report's words nor a
patient's id ever come out.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest

from tests.transfer.small_manifest import (
    LABELS,
    ROWS,
    SECRETS,
    SPLITS,
    evaluate,
    pictures,
    require_silence,
    write,
)


@pytest.mark.parametrize("probe", ["adamw", "logistic"])
@pytest.mark.parametrize(
    ("split", "reason"),
    [
        ("test", "0 of 12 test rows carry the class"),
        ("train", "the training draw shows the class in one kind of rows only"),
        ("val", "val shows the class in one kind of rows only: there is no threshold"),
    ],
)
def test_a_class_without_positives_is_stated_and_never_one_half(
    probe: str, split: str, reason: str, tmp_path: Path
) -> None:
    without = {"labels": lambda i: "Edema" if SPLITS[i % 5] != split and i % 2 else "Mass"}
    settings = [*write(tmp_path, **without), *LABELS, f"transfer.probe={probe}"]
    assert evaluate(tmp_path, settings) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    (fraction,) = results["fractions"]
    (row,) = fraction["scores"]["classes"]
    for key in ("f1", "accuracy") if split == "val" else ("auroc", "auprc", "f1", "ece"):
        assert row[key]["value"] is None and row[key]["reason"] == reason
    macro = fraction["scores"]["macro"]["f1"]
    assert macro["value"] is None and macro["reason"] == reason
    assert (row["auroc"]["value"] is not None) == (split == "val")
    assert np.isfinite(fraction["fits"][0]["val_loss"]).all()
    assert reason in (tmp_path / "out" / "report.html").read_text()


def test_a_class_that_all_of_val_carries_has_no_threshold_for_that_reason(tmp_path: Path) -> None:
    """Of evaluate.threshold_rule=specificity=S it was told that no row of val carries the class."""
    everywhere = {"labels": lambda i: "Edema" if SPLITS[i % 5] == "val" or i % 2 else "Mass"}
    settings = [*write(tmp_path, **everywhere), *LABELS, "evaluate.threshold_rule=specificity=0.9"]
    assert evaluate(tmp_path, settings) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    (row,) = results["fractions"][0]["scores"]["classes"]
    reason = "val shows the class in one kind of rows only: there is no threshold"
    assert row["specificity"]["value"] is None and row["specificity"]["reason"] == reason


def test_a_mean_over_classes_says_which_share_of_them_it_is_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A rare class that a draw or the test split lacks leaves the mean; that was said nowhere."""

    def labels(i: int) -> str:
        return "Edema" if i % 2 else "Mass" if SPLITS[i % 5] != "train" else "Nodule"

    classes = "transfer.classes={Edema: zero, Mass: zero, Nodule: zero}"
    task = [*write(tmp_path, labels=labels), "transfer.task=classification", classes]
    assert evaluate(tmp_path, task) == 0
    said = capsys.readouterr().out
    (fraction,) = json.loads((tmp_path / "out" / "results.json").read_text())["fractions"]
    macro = fraction["scores"]["macro"]["auroc"]
    assert (macro["classes"], macro["classes_asked"]) == (1, 3)
    assert macro["value"] == fraction["scores"]["classes"][0]["auroc"]["value"]
    assert "over 1 of 3 classes" in said.split("macro AUROC")[1].splitlines()[0]
    assert "over 1 of 3 classes" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_scores_of_one_patient_have_no_interval_and_nothing_private_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    same = write(tmp_path, patient_id=lambda i: SECRETS[0] if i % 5 >= 3 else f"p{i}")
    assert evaluate(tmp_path, same) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    seen = 0

    def walk(value: object) -> None:
        nonlocal seen
        if isinstance(value, dict):
            if {"value", "low", "high", "n"} <= value.keys() and value["value"] is not None:
                seen += 1
                assert value["low"] is None and value["high"] is None, value
            for child in value.values():
                walk(child)

    walk(results)
    assert results["data"]["patients"] == 1 and seen > 20
    said = capsys.readouterr()
    require_silence(tmp_path, said.out + said.err)


def test_labels_of_one_patient_alone_are_counted_and_not_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mixed = {"labels": lambda i: f"{'Edema' if i % 3 else 'Rarity'}|Secretword{i:05d}"}
    assert evaluate(tmp_path, write(tmp_path, **mixed)) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    left = results["zero_shot"]["labels_without_concept"]
    assert left == ["Rarity", "12 more, each of one patient alone"]
    said = capsys.readouterr()
    require_silence(tmp_path, said.out + said.err)


def test_rows_that_say_two_things_at_once_are_left_out_and_counted(tmp_path: Path) -> None:
    both = {"labels": lambda i: "Edema|Mass" if i < 5 else ("Edema", "Mass", "")[i % 3]}
    exclusive = ["transfer.classes={Edema: zero, Mass: zero}", "transfer.exclusive=true"]
    assert evaluate(tmp_path, [*write(tmp_path, **both), *LABELS, *exclusive]) == 0
    data = json.loads((tmp_path / "out" / "results.json").read_text())["data"]
    blank = [SPLITS[i % 5] for i in range(5, ROWS) if i % 3 == 2]
    wanted = {s: SPLITS.count(s) + blank.count(s) for s in ("train", "val", "test")}
    assert data["unused"] == wanted
    kept = {split: entry["images"] for split, entry in data["splits"].items()}
    assert {s: kept[s] + wanted[s] for s in kept} == {"train": 12, "val": 6, "test": 12}
    assert "has no truth for" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize("task", [LABELS, []], ids=["probe", "nothing trained"])
def test_films_that_prepare_refuses_as_too_dark_are_in_no_score_and_counted(
    task: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model saw black and was scored for it, without a word."""
    root = Path(shutil.copytree(pictures(), tmp_path / "images"))
    low = np.random.default_rng(0).integers(0, 4096, (40, 60)).astype(np.uint16)
    cv2.imwrite(str(root / "8.png"), low)
    (root / "13.png").unlink()
    settings = [*write(tmp_path), *task, f"data.root={root}"]
    assert evaluate(tmp_path, settings) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["data"]["unreadable"] == {"too_dark": 1, "missing": 1}
    told = capsys.readouterr().out
    assert bool(task) or "left out, cannot be read: missing 1, too_dark 1" in told
    page = (tmp_path / "out" / "report.html").read_text()
    assert "missing 1" in page and "too_dark 1" in page
