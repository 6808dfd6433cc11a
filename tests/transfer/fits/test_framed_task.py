"""Levels that are kept, epochs that go over a small draw again, one pre-training a seed."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mlip.cli import main
from mlip.dataloading.manifest import load_manifest
from mlip.pretrained import save_pretrained
from mlip.settings.config import Config, load
from mlip.transfer.fingerprint import hash_of_weights
from mlip.transfer.fits.encoder import Start, open_start
from mlip.transfer.fits.fitting import shuffled_batches
from mlip.transfer.fits.segmentation import Segmentation
from mlip.transfer.frames import Images, frame_of
from mlip.transfer.truth.annotations import Annotations
from mlip.transfer.truth.mask_file import INSIDE
from tests.small_run import small_run

TASK = (
    *("transfer.task=segmentation", "transfer.mask_source=phantom", "transfer.image_px=64"),
    *("transfer.decoder_width=4", "transfer.val_share=0.3", "transfer.fractions=[100]"),
    *("transfer.epochs=1", "transfer.seeds=[1,2]", "evaluate.bootstrap=20", "evaluate.examples=0"),
)


def _task(config: Config) -> tuple[Segmentation, Start, np.ndarray]:
    manifest = load_manifest(config.data)
    images = Images(config, manifest, frame_of(config))
    task = Segmentation(
        config, manifest, Annotations(config, manifest), images, torch.device("cpu")
    )
    start = open_start(config, small_run().model.vision, 1)
    return task, start, manifest.rows("train", with_report=False)[:6]


def test_kept_levels_are_those_computed_anew_and_augmented_images_are_never_kept() -> None:
    """Oracle: the encoder on the batch itself."""
    task, start, rows = _task(load([], [*small_run().settings, *TASK]))
    encoder = task._encoder(start)
    plain = encoder.levels(task._pictures(rows, [None] * 6))
    for _ in range(2):  # computed, then kept
        levels, matrices = task._levels(encoder, rows, None, 1)
        assert matrices == [None] * 6
        for ours, wanted in zip(levels, plain, strict=True):
            torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=1e-4)
    assert task._kept.keys() == set(rows.tolist())
    warped = task._matrices(rows, 3, 1)
    assert 0 < sum(m is None for m in warped) < 6
    levels, _ = task._levels(encoder, rows[::-1].copy(), 3, 1)
    anew = encoder.levels(task._pictures(rows[::-1], warped[::-1]))
    for ours, wanted in zip(levels, anew, strict=True):
        torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=1e-4)
    task._encoder(dataclasses.replace(start, weights_hash="another"))
    assert not task._kept


def test_a_mask_is_read_once_however_often_it_is_asked_what_it_shows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Draws, balance and counts ask each time; a file of ten million pixels takes 0.1 s."""
    one = "transfer.classes={pleural_effusion: zero}"
    task, _, rows = _task(load([], [*small_run().settings, *TASK, one]))
    asked: list[int] = []
    plain = task.annotations.mask

    def counted(row: int, size: tuple[int, int]) -> np.ndarray:
        asked.append(row)
        return plain(row, size)

    monkeypatch.setattr(task.annotations, "mask", counted)
    first = task.positive(rows)
    again = task.positive(rows[::-1])
    assert sorted(asked) == sorted(rows.tolist())
    shown = [bool((task.mask(row) == INSIDE).any()) for row in rows.tolist()]
    assert first.tolist() == again[::-1].tolist() == shown and 0 < sum(shown) < len(shown)
    assert task.positive(rows[:0]).tolist() == []


def test_a_film_that_is_not_kept_is_not_decoded_again_for_its_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    task, _, rows = _task(load([], [*small_run().settings, *TASK, "transfer.cache_gib=0"]))
    usable, bad = task.images.usable(rows)
    assert usable.tolist() == rows.tolist() and not bad
    sizes = [task.images.read(row)[1] for row in rows.tolist()]

    def refused(row: int, attempt: int) -> np.ndarray:
        raise AssertionError("was decoded again")

    monkeypatch.setattr(task.images.reader, "pixels", refused)
    assert [task.images.size(row) for row in rows.tolist()] == sizes == [(112, 112)] * 6
    assert task.positive(rows).all()


def test_no_level_is_kept_beyond_the_room_or_of_a_tuned_encoder() -> None:
    task, start, rows = _task(load([], [*small_run().settings, *TASK, "transfer.cache_gib=0.0001"]))
    encoder = task._encoder(start)
    task._levels(encoder, rows, None, 1)
    assert len(task._kept) < 6
    encoder.is_frozen = False
    task._encoder(dataclasses.replace(start, weights_hash="another"))
    task._levels(encoder, rows, None, 1)
    assert not task._kept


def test_an_epoch_of_a_small_draw_goes_over_it_again_in_a_new_order() -> None:
    rows = np.arange(10)
    once = list(shuffled_batches(rows, 4, 1, 2, fewest=0))
    assert [number for number, _ in once] == [2, 2, 2]
    again = list(shuffled_batches(rows, 4, 1, 1, fewest=7))
    assert [number for number, _ in again] == [1] * 3 + [2] * 3 + [3] * 3
    for at in range(0, 9, 3):
        seen = np.concatenate([b for _, b in again[at : at + 3]])
        assert sorted(seen.tolist()) == rows.tolist()
    assert again[0][1].tolist() != again[3][1].tolist()
    later = [number for number, _ in shuffled_batches(rows, 4, 1, 2, fewest=7)]
    assert later == [4] * 3 + [5] * 3 + [6] * 3


def test_each_seed_has_its_own_pre_training_where_the_path_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, hashes = small_run(), []
    for seed in (1, 2):
        model = copy.deepcopy(run.model)
        with torch.no_grad():
            next(model.vision.parameters()).mul_(seed)
        hashes.append(hash_of_weights(model.vision))
        save_pretrained(tmp_path / f"run_{seed}", model, run.config, run.tokenizer, run.table)
    command = ["evaluate", *run.settings, *TASK, "transfer.precision=bf16", "--out"]
    command += [str(tmp_path / "out")]
    assert main([*command, f"checkpoint={tmp_path}/run_{{seed}}"]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["fingerprints"]["weights"] == hashes and hashes[0] != hashes[1]
    assert results["run"]["checkpoint"] == f"{tmp_path}/run_{{seed}}"
    assert results["run"]["precision"] == "bf16"
    assert "precision</dt>" in (tmp_path / "out" / "report.html").read_text()
    capsys.readouterr()
    assert main([*command, f"checkpoint={tmp_path}/none_{{seed}}"]) == 4
    assert "none_1" in capsys.readouterr().err
