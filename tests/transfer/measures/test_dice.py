"""Dice in its forms on hand-made masks; oracles: arithmetic and torchmetrics."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchmetrics.functional.segmentation import dice_score

from mlip.transfer.fits.segmentation import mask_loss
from mlip.transfer.measures.dice import (
    count,
    dice_measures,
    dice_per_image,
    dice_scores,
    pooled_dice,
)
from mlip.transfer.measures.interval import estimate
from mlip.transfer.measures.subgroups import Measures
from mlip.transfer.truth.mask_file import IGNORED, INSIDE


def _masks(*rows: list[int]) -> np.ndarray:
    return np.array(rows, dtype=np.uint8).reshape(len(rows), 1, -1) * INSIDE


def _called(*rows: list[int]) -> np.ndarray:
    return np.array(rows, dtype=bool).reshape(len(rows), 1, -1)


def test_each_form_by_hand() -> None:
    truth = _masks([1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1])
    shown = _called([1, 0, 0, 0], [0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0])
    counts = count(shown, truth)
    # 2 * 1 / (1 + 2), empty and silent, empty and loud, missed
    np.testing.assert_allclose(dice_per_image(counts), [2 / 3, 1.0, 0.0, 0.0])
    scores = dice_scores([counts], np.ones((5, 4)))
    assert scores["published"]["value"] == pytest.approx((2 / 3 + 1) / 4)
    assert scores["positive_only"]["value"] == pytest.approx((2 / 3) / 2)
    assert scores["positive_only"]["n"] == 2
    assert scores["pooled"]["value"] == pytest.approx(2 * 1 / (2 + 6))


def test_a_group_is_scored_alone_where_five_of_its_patients_have_something_to_find() -> None:
    rng = np.random.default_rng(1)
    truth = (rng.random((20, 8, 9)) < 0.4).astype(np.uint8) * INSIDE
    truth[6:14] = 0
    fits = [count(rng.random((20, 8, 9)) < share, truth) for share in (0.3, 0.6)]
    weights, inside = rng.integers(0, 3, (30, 20)), np.arange(20) < 14
    measure = dice_measures(fits, weights, np.arange(20))
    alone = dice_scores([counts.of(inside) for counts in fits], weights[:, inside])
    for key, measured in measure(inside).whole.items():
        told = estimate(*measured)
        assert told["n"] == alone[key]["n"]
        for name in ("value", "low", "high"):
            assert told[name] == pytest.approx(alone[key][name])
    assert measure(inside).whole.keys() == alone.keys()
    # six images with truth, of four patients
    assert measure(inside & (np.arange(20) != 0)).whole.keys() == alone.keys()
    of_four = dice_measures(fits, weights, np.arange(20).clip(2))
    assert (
        of_four(inside) == Measures() and of_four(np.arange(20) < 15).whole.keys() == alone.keys()
    )


def test_random_masks_equal_torchmetrics() -> None:
    rng = np.random.default_rng(0)
    truth, shown = rng.random((6, 8, 9)) < 0.4, rng.random((6, 8, 9)) < 0.5
    counts = count(shown, truth.astype(np.uint8) * INSIDE)
    for i in range(6):
        expected = dice_score(
            torch.tensor(shown[i])[None, None].long(),
            torch.tensor(truth[i])[None, None].long(),
            num_classes=1,
            average="micro",
        )
        assert dice_per_image(counts)[i] == pytest.approx(float(expected))
    both = 2 * (shown & truth).sum() / (shown.sum() + truth.sum())
    assert pooled_dice(counts, np.ones((1, 6)))[0] == pytest.approx(both)


def test_ignored_pixels_count_nowhere() -> None:
    truth = np.array([[[INSIDE, IGNORED, IGNORED, 0]]], dtype=np.uint8)
    assert dice_per_image(count(_called([1, 1, 0, 0]), truth))[0] == 1.0
    logits = torch.tensor([[[[3.0, 9.0, -9.0, -3.0]]]])
    other = torch.tensor([[[[3.0, -9.0, 9.0, -3.0]]]])
    mask = torch.from_numpy(truth)
    assert float(mask_loss(logits, mask)) == pytest.approx(float(mask_loss(other, mask)))


@pytest.mark.parametrize("called", [[0, 0], [0, 1]], ids=["silent", "loud"])
def test_without_any_truth_no_form_has_a_value(called: list[int]) -> None:
    """The published form would be the share of images on which the model is silent."""
    scores = dice_scores([count(_called(called), _masks([0, 0]))], np.ones((3, 1)))
    for form in ("published", "positive_only", "pooled"):
        assert scores[form]["value"] is None
        assert scores[form]["reason"] == "no test image has anything to find"


def test_the_loss_equals_its_formula_in_float64_and_is_least_at_the_truth() -> None:
    rng = np.random.default_rng(1)
    shown = rng.normal(0, 2, (2, 1, 4, 5))
    truth = rng.random((2, 4, 5)) < 0.5
    p = 1 / (1 + np.exp(-shown[:, 0]))
    right = np.where(truth, p, 1 - p)
    focal = (-((1 - right) ** 2) * np.log(right)).mean()
    dice = (2 * (p * truth).sum() + 1) / (p.sum() + truth.sum() + 1)
    mask = torch.from_numpy(truth.astype(np.uint8) * INSIDE)
    ours = float(mask_loss(torch.from_numpy(shown), mask))
    assert ours == pytest.approx(10 * focal - np.log(dice), rel=1e-9)
    best = float(mask_loss(torch.from_numpy(np.where(truth, 20.0, -20.0))[:, None], mask))
    assert best == pytest.approx(0.0, abs=1e-6)
