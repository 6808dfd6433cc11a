"""Each trained task on pictures of one bright rectangle, where a right pipeline must score high.

Oracle: the rectangles' own places; a broken mask, box or label path cannot reach these scores, and
labels drawn by lot must stay near chance.
"""

from __future__ import annotations

import dataclasses
import json
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from mlip.dataloading.manifest import load_manifest
from mlip.pages.transfer_page import render_transfer
from mlip.settings.config import load
from mlip.transfer.fits.logistic import fit_logistic
from mlip.transfer.fits.protocol import transfer_run
from tests.raw_layouts import encode_mask
from tests.temporary import shared_folder

SIDE = 48
SETTINGS = [
    *("data.columns.report=null", "data.columns.study_id=null", "data.columns.labels=labels"),
    *(f"data.resize_px={SIDE}", f"data.crop_px={SIDE}", "data.channels=1"),
    "model.vision.options={embedding_size: 8, hidden_sizes: [8, 16, 24], depths: [1, 1, 1], "
    "layer_type: basic}",
    *("transfer.start=random", "transfer.encoder=tuned", "transfer.fractions=[100]"),
    *("transfer.seeds=[1]", "transfer.batch=16", "transfer.lr=5e-3", "transfer.patience=99"),
    *("transfer.decoder_width=8", "evaluate.bootstrap=50", "evaluate.examples=2"),
]


@cache
def _manifest() -> Path:
    """160 pictures of noise, three of four with a rectangle that is brighter."""
    folder = shared_folder("rectangles")
    rng = np.random.default_rng(0)
    columns: dict[str, list[str]] = {
        name: [] for name in ("image", "patient_id", "split", "labels", "boxes", "mask", "lot")
    }
    for i in range(160):
        picture = rng.normal(60, 12, (SIDE, SIDE))
        mask = np.zeros((SIDE, SIDE), dtype=np.uint8)
        boxes = []
        if i % 4:
            w, h = rng.integers(14, 22, 2)
            x, y = rng.integers(0, SIDE - w), rng.integers(0, SIDE - h)
            mask[y : y + h, x : x + w] = 1
            boxes = [[int(x), int(y), int(w), int(h), "thing"]]
        picture += 120.0 * mask
        cv2.imwrite(str(folder / f"{i}.png"), picture.clip(0, 255).astype(np.uint8))
        split = "train" if i < 96 else "val" if i < 120 else "test"
        values = (f"{i}.png", f"p{i}", split, "thing" if i % 4 else "", json.dumps(boxes))
        values += (encode_mask(mask), "thing" if rng.random() < 0.5 else "")
        for name, value in zip(columns, values, strict=True):
            columns[name].append(value)
    pa.parquet.write_table(pa.table(columns), folder / "m.parquet")
    return folder / "m.parquet"


def run(*overrides: str) -> dict[str, Any]:
    config = load([], [*SETTINGS, f"data.manifest={_manifest()}", *overrides])
    return transfer_run(config, load_manifest(config.data), None)


def test_segmentation_finds_the_rectangle() -> None:
    results = run("transfer.task=segmentation", "transfer.columns.mask=mask", "transfer.epochs=5")
    scores = results["fractions"][0]["scores"]
    assert scores["images_with_truth"] == 30 and scores["images"] == 40
    assert scores["dice"]["positive_only"]["value"] > 0.85
    assert scores["dice"]["pooled"]["value"] > 0.85
    page = render_transfer(results)
    assert "<polygon" in page and "all pixels pooled" in page and "Not for clinical use" in page


def test_detection_finds_the_rectangle() -> None:
    results = run(
        *("transfer.task=detection", "transfer.columns.boxes=boxes", "transfer.epochs=14"),
        *("transfer.box_loss=objects", "transfer.augment=false"),
    )
    scores = results["fractions"][0]["scores"]
    assert scores["images_with_boxes"] == 30 and scores["strict"]["n"] == 40
    assert scores["strict"]["value"] > 0.4
    assert scores["compat"]["value"] is None or scores["compat"]["n"] <= 30
    results["config"]["transfer"]["compat_score_cut"] = 0.3
    page = render_transfer(results)
    assert "<rect" in page and "without a prediction of 0.3 or more" in page


@pytest.mark.parametrize("probe", ["adamw", "logistic"])
def test_a_frozen_probe_tells_rectangles_from_none_and_lots_stay_at_chance(probe: str) -> None:
    task = (
        "transfer.task=classification",
        "transfer.classes={thing: zero}",
        f"transfer.probe={probe}",
    )
    frozen = (
        *task,
        "transfer.encoder=frozen",
        "transfer.epochs=30",
        "transfer.fractions=[20, 100]",
    )
    results = run(*frozen, "transfer.seeds=[1, 2]")
    twenty, whole = (f["scores"]["macro"]["auroc"] for f in results["fractions"])
    assert whole["value"] > 0.9 and len(whole["seeds"]) == 2
    assert [f["fits"][0]["patients"] for f in results["fractions"]] == [19, 96]
    assert twenty["n"] == whole["n"] == 40
    by_lot = run(*frozen, "data.columns.labels=lot", "transfer.fractions=[100]")
    estimate = by_lot["fractions"][0]["scores"]["macro"]["auroc"]
    assert estimate["low"] < 0.5 + 0.2 and estimate["value"] < 0.75
    page = render_transfer(results)
    for part in ("ROC: sensitivity", "Precision against recall", "Confusion", "Worst cases"):
        assert part in page
    assert ", scored 0." in page and "Dashed orange" not in page  # nothing is outlined here
    # with the counts a second time the accuracy lay outside the page
    assert page.count(">Positives</th>") == 1 and ">Accuracy</th>" in page


def _without_test_truth(folder: Path) -> Path:
    """The same studies, their test rows labelled the other way round and without box or mask."""
    columns = pyarrow.parquet.read_table(_manifest()).to_pydict()
    for i, split in enumerate(columns["split"]):
        if split == "test":
            columns["labels"][i] = "" if columns["labels"][i] else "thing"
            columns["mask"][i], columns["boxes"][i] = "-1", "[]"
    pa.parquet.write_table(pa.table(columns), folder / "m.parquet")
    return folder / "m.parquet"


@pytest.mark.parametrize(
    "task",
    [
        ("transfer.task=classification", "transfer.classes={thing: zero}"),
        ("transfer.task=segmentation", "transfer.columns.mask=mask"),
        ("transfer.task=detection", "transfer.columns.boxes=boxes"),
    ],
    ids=["classification", "segmentation", "detection"],
)
def test_no_truth_of_test_reaches_a_fit_and_test_is_opened_after_it(
    task: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the fits of a manifest whose test rows say the opposite, digit by digit."""
    from mlip.transfer.draws import HeldOut
    from mlip.transfer.fits.fitting import Record
    from mlip.transfer.fits.protocol import TASKS

    name = task[0].partition("=")[2]
    order: list[str] = []
    opened, fitted = HeldOut.open, TASKS[name].fit

    def open_and_note(self: HeldOut, fit: Any) -> Any:
        order.append("open")
        return opened(self, fit)

    def fit_and_note(self: Any, start: Any, train: Any, val: Any, seed: int) -> tuple[Any, Record]:
        is_test = self.manifest.split == 2
        assert not is_test[train].any() and not is_test[val].any()
        order.append("fit")
        return fitted(self, start, train, val, seed)

    monkeypatch.setattr(HeldOut, "open", open_and_note)
    monkeypatch.setattr(TASKS[name], "fit", fit_and_note)
    settings = (*task, "transfer.encoder=frozen", "transfer.epochs=2", "transfer.monitor=score")
    settings += ("transfer.seeds=[1, 2]", "evaluate.examples=0")
    first = run(*settings)["fractions"][0]
    root = f"data.root={_manifest().parent}"
    other = run(*settings, f"data.manifest={_without_test_truth(tmp_path)}", root)["fractions"][0]
    assert order == ["fit", "open"] * 4
    for mine, theirs in zip(first["fits"], other["fits"], strict=True):
        for key in ("train_loss", "val_loss", "val_score", "best_epoch", "steps"):
            assert mine[key] == theirs[key], key
    if name == "classification":
        cuts = [f["scores"]["classes"][0]["threshold_logits"] for f in (first, other)]
        assert cuts[0] == cuts[1]
    assert first["scores"] != other["scores"]


def test_a_tuned_encoder_leaves_the_checkpoint_as_it_was() -> None:
    from mlip.transfer.fingerprint import hash_of_weights
    from mlip.transfer.fits.encoder import open_start

    config = load(
        [],
        [*SETTINGS, f"data.manifest={_manifest()}", "transfer.task=classification"]
        + ["transfer.classes={thing: zero}", "transfer.epochs=1"],
    )
    vision = open_start(config, None, 5).vision
    before = hash_of_weights(vision)
    own = dataclasses.replace(
        config, transfer=dataclasses.replace(config.transfer, start="checkpoint")
    )
    told = {"step": 3, "device": "abacus"}
    results = transfer_run(own, load_manifest(own.data), vision, facts=told)
    assert hash_of_weights(vision) == before == results["fingerprints"]["weights"]
    # what an export tells stands beside what the task knows itself
    assert results["run"]["step"] == 3 and results["run"]["device"] == "cpu"


def test_broken_features_are_an_error_not_a_half() -> None:
    import torch

    from mlip.transfer.fits.encoder import open_start

    config = load(
        [],
        [*SETTINGS, f"data.manifest={_manifest()}", "transfer.task=classification"]
        + ["transfer.classes={thing: zero}", "transfer.encoder=frozen"],
    )
    vision = open_start(config, None, 5).vision
    with torch.no_grad():
        next(vision.parameters()).fill_(torch.nan)
    own = dataclasses.replace(
        config, transfer=dataclasses.replace(config.transfer, start="checkpoint")
    )
    with pytest.raises(ValueError, match="features hold NaN"):
        transfer_run(own, load_manifest(own.data), vision)


def test_a_draw_of_one_class_alone_calls_no_other() -> None:
    # the first class was called, though train had no row of it
    x = np.random.default_rng(0).normal(size=(6, 3))
    targets = np.tile(np.array([0, 0, 1], np.int8), (6, 1))
    predict = fit_logistic(x, targets, x, targets, exclusive=True)
    assert predict(x).argmax(axis=1).tolist() == [2] * 6


@pytest.mark.parametrize("exclusive", [False, True])
def test_val_and_not_train_chooses_the_strength_of_the_logistic_probe(exclusive: bool) -> None:
    """Oracle: features of pure noise. Train fits best without a penalty; a val that contradicts it
    is lost least with the strongest."""
    generator = np.random.default_rng(0)
    x, truth = generator.normal(size=(40, 30)), np.arange(40) % 2
    targets = np.stack([truth, 1 - truth], axis=1).astype(np.int8)

    def widest(val_targets: np.ndarray) -> float:
        return float(np.ptp(fit_logistic(x, targets, x, val_targets, exclusive=exclusive)(x)))

    assert widest(targets) > 5.0 and widest(1 - targets) < 0.5
