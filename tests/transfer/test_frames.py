"""Images, masks and boxes through one geometry; what an encoder sees; draws by patient."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mlip.cli import main
from mlip.dataloading.manifest import ManifestError
from mlip.settings.config import ConfigError, load
from mlip.transfer.alignment.encoded_split import encode_split
from mlip.transfer.draws import HeldOut, balance, divide, draw_fraction, patient_draws
from mlip.transfer.fits.detection import warp_boxes
from mlip.transfer.fits.encoder import Encoder
from mlip.transfer.frames import Crops, Frame, Images, augmentation, frame_of, warp
from mlip.transfer.truth.annotations import Annotations
from mlip.transfer.truth.mask_file import INSIDE
from mlip.transfer.truth.outside import check_inside
from tests.small_run import small_export, small_run


@pytest.mark.parametrize("fit", ["letterbox", "stretch"])
@pytest.mark.parametrize("size", [(40, 100), (100, 40), (64, 64), (13, 17)])
def test_mask_and_box_of_one_object_stay_together(fit: str, size: tuple[int, int]) -> None:
    frame = Frame(64, fit)
    mask = np.zeros(size, dtype=np.uint8)
    y0, y1, x0, x1 = size[0] // 4, size[0] // 2, size[1] // 4, 3 * size[1] // 4
    mask[y0:y1, x0:x1] = INSIDE
    placed = frame.mask(mask)
    assert set(np.unique(placed)) <= {0, INSIDE}  # nearest: nothing in between
    box = frame.boxes(np.array([[x0, y0, x1, y1]], dtype=float), size)[0]
    ys, xs = np.nonzero(placed)
    # half a pixel of the coarser grid, where a mask's edge is rounded
    slack = max(1.0, 64 / min(size))
    found = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
    np.testing.assert_allclose(found, box, atol=slack)


def test_a_letterboxed_image_keeps_its_shape_and_black_margin() -> None:
    frame = Frame(64, "letterbox")
    placed = frame.image(np.full((32, 128), 200, dtype=np.uint8))
    assert (placed[:24] == 0).all() and (placed[40:] == 0).all() and (placed[24:40] == 200).all()
    assert (Frame(64, "stretch").image(np.full((32, 128), 200, np.uint8)) == 200).all()


def test_augmentation_moves_image_mask_and_boxes_alike_and_never_mirrors() -> None:
    matrix = next(m for e in range(20) if (m := augmentation(64, 1, e, 5)) is not None)
    assert np.linalg.det(matrix[:, :2]) > 0
    mask = np.zeros((64, 64), dtype=np.uint8)
    mask[20:30, 34:50] = INSIDE
    corners = np.array([[34.0, 20, 50, 30]])
    moved = warp(mask, matrix, nearest=True)
    assert set(np.unique(moved)) <= {0, INSIDE}
    boxes, kept = warp_boxes(corners, matrix, 64)
    ys, xs = np.nonzero(moved)
    found = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
    np.testing.assert_allclose(found, boxes[0], atol=1.5)
    assert kept.tolist() == [0] and corners.tolist() == [[34.0, 20, 50, 30]]
    np.testing.assert_array_equal(
        augmentation(64, 1, 3, 5) is None, augmentation(64, 1, 3, 5) is None
    )


def test_half_of_the_images_are_turned_and_scaled_as_far_as_published_about_their_middle() -> None:
    """HKU-MedAI/MGCA: p 0.5, 10 degrees and a tenth at most, both evenly drawn."""
    drawn = [augmentation(64, 1, epoch, 5) for epoch in range(2000)]
    moved = np.array([m for m in drawn if m is not None])
    assert abs(len(moved) / 2000 - 0.5) < 5 * (0.25 / 2000) ** 0.5
    scale = np.sqrt(np.linalg.det(moved[:, :, :2]))
    degrees = np.degrees(np.arctan2(moved[:, 0, 1], moved[:, 0, 0]))
    for found, least, most in ((scale, 0.9, 1.1), (degrees, -10.0, 10.0)):
        assert least <= found.min() and found.max() <= most
        middle, slack = (least + most) / 2, 0.06 * (most - least)
        assert np.quantile(found, [0, 0.5, 1]) == pytest.approx([least, middle, most], abs=slack)
    np.testing.assert_allclose(moved @ np.array([31.5, 31.5, 1.0]), 31.5)


def test_masks_and_boxes_are_framed_at_the_side_and_the_fit_asked_for() -> None:
    for own, frame in (
        (["transfer.task=detection"], Frame(96, "letterbox")),
        (["transfer.task=segmentation", "transfer.image_px=64"], Frame(64, "letterbox")),
        (["transfer.task=detection", "transfer.fit=stretch"], Frame(96, "stretch")),
        (["transfer.task=classification", "transfer.classes={mass: zero}"], None),
    ):
        assert frame_of(load([], [*small_run().settings, *own])) == frame


def test_an_encoder_sees_the_pixels_of_pre_training() -> None:
    run = small_run()
    rows = run.manifest.rows("test", with_report=False)[:4]
    bank = encode_split(run, run.manifest, rows).images
    images = Images(run.config, run.manifest, None)
    try:
        pixels = Crops(run.config, images, train=False, seed=0).batch(rows, 0)
        with torch.no_grad():
            found = run.model.encode_image(pixels).embedding
    finally:
        images.close()
    torch.testing.assert_close(found, bank.features.embedding, rtol=1e-5, atol=1e-6)


class _Ramp:
    """Every image is a ramp from left (black) to right (white)."""

    def many(self, rows: list[int]) -> list[tuple[np.ndarray, tuple[int, int]]]:
        ramp = np.broadcast_to(np.linspace(0, 65535, 1120).astype(np.uint16), (1120, 1120))
        return [(ramp, (1120, 1120)) for _ in rows]


@pytest.mark.parametrize("side", [32, 96, 192])
def test_a_classification_sees_the_same_part_of_an_image_at_the_resolution_asked_for(
    side: int,
) -> None:
    """transfer.image_px did nothing there. Oracle: 96 of 112 px about the middle of a ramp; the
    evaluation of the checkpoint itself keeps the size that it was trained with."""
    settings = [*small_run().settings, f"transfer.image_px={side}"]
    task = ["transfer.task=classification", "transfer.classes={mass: zero}"]
    images: Any = _Ramp()
    for own, size in ((task, side), ([], 96)):
        config = load([], [*settings, *own])
        crop = Crops(config, images, train=False, seed=0).batch(np.arange(2), 0)
        assert crop.shape == (2, 1, size, size)
        shown = crop[1, 0, size // 2].numpy() * config.data.std + config.data.mean
        wanted = (8 + (np.arange(size) + 0.5) * 96 / size) / 112
        # the margin is whole px of the letterboxed square, which is itself rounded to one
        np.testing.assert_allclose(shown, wanted, atol=1.0 / (size * 112 / 96))


def test_the_side_of_a_classification_reaches_its_encoder_and_its_results(tmp_path: Path) -> None:
    """Through the command, frozen and tuned; the same side as before is the same frame."""
    run, sizes, frames = small_run(), set[int](), []
    task = ["transfer.task=classification", "transfer.classes={pneumothorax: zero}"]
    task += ["transfer.val_share=0.3", "transfer.fractions=[100]", "transfer.seeds=[1]"]
    task += ["transfer.epochs=1", "evaluate.bootstrap=20", "evaluate.examples=1"]
    where = [f"checkpoint={small_export()}", "--out", str(tmp_path)]
    pooled = Encoder.pooled
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Encoder, "pooled", lambda self, x: sizes.add(x.shape[3]) or pooled(self, x))
        for side, encoder in ((0, "frozen"), (96, "tuned"), (64, "frozen"), (64, "tuned")):
            sizes.clear()
            own = [f"transfer.image_px={side}", f"transfer.encoder={encoder}"]
            assert main(["evaluate", *run.settings, *task, *own, *where]) == 0
            assert sizes == {side or 96}
            results = json.loads((tmp_path / "results.json").read_text())
            frames.append(results["fingerprints"]["frame"])
    assert frames[0] == frames[1] != frames[2] == frames[3]


def test_a_stretched_classification_is_refused() -> None:
    with pytest.raises(ConfigError, match="transfer.fit=stretch is for segmentation and detection"):
        load([], [*small_run().settings, "transfer.task=classification", "transfer.fit=stretch"])


@pytest.mark.parametrize("gib, is_kept", [(1, True), (0, False)])
def test_an_image_is_decoded_once_while_there_is_room(gib: int, is_kept: bool) -> None:
    run = small_run()
    images = Images(load([], [*run.settings, f"transfer.cache_gib={gib}"]), run.manifest, None)
    try:
        assert (images.read(0)[0] is images.read(0)[0]) == is_kept
    finally:
        images.close()


def test_unreadable_images_are_counted_by_reason() -> None:
    run = small_run()
    broken = dataclasses.replace(run.manifest, root=str(run.folder / "data" / "images"))
    images = Images(run.config, broken, None)
    try:
        rows, bad = images.usable(run.manifest.rows("test", with_report=False)[:3])
    finally:
        images.close()
    assert len(rows) == 0 and bad == {"missing": 3}


def test_a_smaller_fraction_is_part_of_a_larger_one_and_patients_stay_whole() -> None:
    rows = np.arange(400)
    patients = (rows // 3).astype(np.uint64)
    ten = draw_fraction(rows, patients, 10.0, seed=1)
    one = draw_fraction(rows, patients, 1.0, seed=1)
    assert set(one) < set(ten) and len(np.unique(patients[one])) == 2
    assert len(np.unique(patients[ten])) == 13
    for patient in np.unique(patients[ten]):
        assert set(rows[patients == patient]) <= set(ten)
    assert set(ten) != set(draw_fraction(rows, patients, 10.0, seed=2))
    np.testing.assert_array_equal(ten, draw_fraction(rows, patients, 10.0, seed=1))
    np.testing.assert_array_equal(draw_fraction(rows, patients, 100.0, 1), rows)
    draws = patient_draws(np.arange(20_000, dtype=np.uint64), 7)
    assert abs(draws.mean() - 0.5) < 5 * (1 / 12 / 20_000) ** 0.5


def test_balancing_keeps_every_positive() -> None:
    rows, positive = np.arange(20), np.arange(20) % 5 == 0
    chosen = balance(rows, positive, seed=3)
    assert set(rows[positive]) <= set(chosen) and len(chosen) == 8


def test_a_split_of_one_patient_is_refused_and_says_what_to_do() -> None:
    manifest = small_run().manifest
    train, test = manifest.rows("train"), manifest.rows("test")
    with pytest.raises(ManifestError, match="'val' has 0 usable patients.*transfer.val_share"):
        divide(manifest, 0.0, {"train": train, "val": train[:0], "test": test}, {})
    with pytest.raises(ManifestError, match="'test' has 1 usable patients"):
        divide(manifest, 0.3, {"train": train, "val": train[:0], "test": test[:1]}, {})
    cut = divide(manifest, 0.3, {"train": train, "val": train[:0], "test": test}, {})
    keys = manifest.patient_key
    assert len(cut.val) and not set(keys[cut.val]) & set(keys[cut.train])
    assert len(cut.hash) == 64


def test_the_test_split_opens_once_for_each_fit() -> None:
    held = HeldOut(np.arange(3))
    assert held.open((1.0, 1)).tolist() == [0, 1, 2]
    held.open((1.0, 2))
    with pytest.raises(RuntimeError, match="already read"):
        held.open((1.0, 1))


def test_a_box_outside_its_image_is_an_error_that_shows_the_box() -> None:
    check_inside(0, np.array([[0.0, 0, 20.5, 10]]), (10, 20), "file")
    with pytest.raises(ManifestError, match="x=5 y=5 w=30 h=2.*20 x 10"):
        check_inside(0, np.array([[5.0, 5, 35, 7]]), (10, 20), "file")
    for outside in ([-2.0, 0, 5, 5], [0, -2.0, 5, 5], [0, 0, 22, 5], [0, 0, 5, 12]):
        with pytest.raises(ManifestError, match="does not lie inside"):
            check_inside(0, np.array([[0.0, 0, 5, 5], outside]), (10, 20), "file")


def test_boxes_of_the_data_set_cannot_be_edited() -> None:
    run = small_run()
    config = load([], [*run.settings, "transfer.task=detection"])
    annotations = Annotations(config, run.manifest)
    row = next(r for r in range(len(run.manifest)) if len(annotations.boxes(r).corners))
    with pytest.raises(ValueError, match="read-only"):
        annotations.boxes(row).corners[0] /= 2.0
