"""Maps of patches, with features made so that the answer is known."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch

from mlip.batch import ImageFeatures
from mlip.transfer.alignment import patch_maps
from mlip.transfer.alignment.patch_maps import Upsampler
from mlip.transfer.alignment.prompts import encode_prompts
from mlip.transfer.features import TextBank, local_scores
from tests.small_run import small_run

GRID, SIZE = (4, 4), (64, 64)


def encode(*texts: str) -> TextBank:
    run = small_run()
    return encode_prompts(run, list(texts))


def test_rows_and_weights_are_those_of_the_local_score() -> None:
    """Pooled by hand (method.md section 4), they give what the kernel gives."""
    run = small_run()
    bank = encode("there is a left pleural effusion.", "no pneumothorax.", "clear lungs and heart.")
    torch.manual_seed(1)
    patches = torch.randn(5, 16, run.config.model.embed_dim)
    rows, weights = patch_maps.text_rows(run.model, bank)
    unit = torch.nn.functional.normalize(patches, dim=-1)
    s = torch.einsum("njd,mpd->mnjp", rows.nan_to_num(0.0), unit)
    scale = run.model.scales.attention_scale.detach()
    r = (torch.softmax(scale * s, dim=-1) * s).sum(dim=-1)
    by_hand = (weights * r).sum(dim=-1).numpy()
    by_kernel = local_scores(run.model, patches, bank)
    np.testing.assert_allclose(by_hand, by_kernel, atol=2e-6)
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(3))


def test_a_denied_finding_has_no_row_of_its_own_but_changes_its_words() -> None:
    run = small_run()
    bank = encode("no pneumothorax.", "pneumothorax.")
    _, weights = patch_maps.text_rows(run.model, bank)
    tokens = bank.content_mask.shape[1]
    assert weights[0, tokens:].sum() == 0.0
    assert weights[1, tokens:].sum() == pytest.approx(
        run.config.loss.local_alignment.knowledge_share
    )


def test_high_means_match() -> None:
    """The patch that equals the phrase's row is the highest, its opposite the lowest."""
    run = small_run()
    bank = encode("pleural effusion")
    rows, weights = patch_maps.text_rows(run.model, bank)
    mean_row = torch.einsum("nj,njd->nd", weights, rows.nan_to_num(0.0))[0]
    patches = torch.zeros(1, 16, len(mean_row))
    patches[0, 6], patches[0, 9] = mean_row, -3 * mean_row
    heat = patch_maps.phrase_maps(run.model, patches, bank)[0, 0]
    assert int(heat.argmax()) == 6 and int(heat.argmin()) == 9
    assert heat[6] > 0 > heat[9]


def test_upsampling_is_opencvs_cubic() -> None:
    maps = np.random.default_rng(0).standard_normal((3, 2, 16)).astype(np.float32)
    ours = Upsampler(GRID, SIZE)(maps)
    theirs = cv2.resize(maps[2, 1].reshape(GRID), SIZE[::-1], interpolation=cv2.INTER_CUBIC)
    np.testing.assert_allclose(ours[2, 1], theirs, atol=1e-5)


def test_the_point_is_the_hottest_patch_moved_towards_its_warmer_neighbour() -> None:
    heat = np.zeros(GRID, dtype=np.float32)
    heat[1, 2] = 1.0
    upsample = Upsampler(GRID, SIZE)
    x, y = patch_maps.pointed_pixel(upsample(heat.reshape(-1)), GRID)
    assert abs(x - 40) <= 1 and abs(y - 24) <= 1
    heat[1, 3] = 0.6
    moved, _ = patch_maps.pointed_pixel(upsample(heat.reshape(-1)), GRID)
    assert moved > x + 1


def test_an_even_map_does_not_point_into_a_corner() -> None:
    x, y = patch_maps.pointed_pixel(np.ones(SIZE), GRID)
    assert min(x, y) >= 8  # half a patch


def test_maps_follow_the_model_from_image_to_phrase() -> None:
    run = small_run()
    features = ImageFeatures(
        embedding=torch.zeros(2, 32), patches=torch.randn(2, 9, 32), grid=(3, 3)
    )
    maps = patch_maps.phrase_maps(run.model, features.patches, encode("nodule", "no nodule"))
    assert maps.shape == (2, 2, 9) and float(maps.abs().max()) <= 1.0 + 1e-5


def test_maps_made_when_asked_for_are_those_made_at_once() -> None:
    run, bank = small_run(), encode("nodule", "no nodule", "there is a left pleural effusion.")
    patches = torch.randn(4, 9, 32)
    whole = patch_maps.phrase_maps(run.model, patches, bank).numpy()
    maps = patch_maps.PhraseMaps(run.model, patches, bank)
    phrases, images = [2, 0, 2], [1, 3, 3]
    np.testing.assert_allclose(maps[phrases, images], whole[phrases, images], atol=1e-6)
    np.testing.assert_allclose(maps[1, 2], whole[1, 2], atol=1e-6)
