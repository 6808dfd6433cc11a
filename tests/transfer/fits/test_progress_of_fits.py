"""A fit says how far it is: an epoch of 25,000 films takes hours on a small machine."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mlip.dataloading import progress
from mlip.transfer.fits.fitting import batches, shuffled_batches
from tests.transfer import small_manifest
from tests.transfer.small_manifest import BOXES, LABELS, MASKS, evaluate, write

TUNED = "transfer.encoder=tuned"


@pytest.mark.parametrize(
    "task, lines",
    [
        ([*LABELS, TUNED], ["2 of 2 steps of epoch 1", "6 of 6 images predicted"]),
        ([*LABELS, "transfer.probe=logistic"], ["5 of 6 logistic fits"]),
        (MASKS, ["12 of 12 masks read", "2 of 2 steps of epoch 1", "6 of 6 images predicted"]),
        (BOXES, ["2 of 2 steps of epoch 1", "12 of 12 images predicted"]),
    ],
    ids=["tuned", "logistic", "segmentation", "detection"],
)
def test_every_fit_tells_its_steps_and_its_images(
    task: list[str],
    lines: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    small_manifest.pictures()  # made before
    monkeypatch.setattr(progress, "EVERY_S", 0.0)
    boxes = json.dumps([[5, 6, 20, 18, "Edema"]])
    assert evaluate(tmp_path, write(tmp_path, mask="mask.png", boxes=boxes) + task) == 0
    said = capsys.readouterr().err
    assert all(line in said for line in lines), said


def test_batches_are_all_rows_in_their_order_and_an_epoch_all_in_another() -> None:
    rows = np.arange(7)
    assert np.concatenate(list(batches(rows, 3))).tolist() == rows.tolist()
    assert list(batches(rows[:0], 3)) == []
    drawn = [part for _, part in shuffled_batches(rows, 3, seed=1, epoch=2, fewest=0)]
    assert [len(part) for part in drawn] == [3, 3, 1]
    assert sorted(np.concatenate(drawn).tolist()) == rows.tolist()
