"""The image specification against slow NumPy arithmetic, and its parameters' distribution."""

from __future__ import annotations

import dataclasses

import cv2
import numpy as np
import pytest

from mlip.dataloading.pipelines.transforms import Parameters, Transform
from mlip.settings.config import Augment, Data

DATA = Data(resize_px=64, crop_px=48, mean=0.4, std=0.2)


def apply(
    transform: Transform, image: np.ndarray, parameters: Parameters, i: int = 0
) -> np.ndarray:
    out = np.full((transform.crop_px,) * 2, np.nan, np.float32)
    transform.apply(image, parameters, i, out)
    return out


def draw(transform: Transform, count: int, epoch: int = 0) -> Parameters:
    return transform.draw(np.full(count, epoch, np.int64), np.arange(count, dtype=np.int64))


@pytest.mark.parametrize("dtype, largest", [(np.uint8, 255.0), (np.uint16, 65535.0)])
def test_an_image_of_resize_px_is_cropped_and_normalised_exactly(
    dtype: type, largest: float
) -> None:
    image = np.random.default_rng(0).integers(0, int(largest) + 1, (64, 64)).astype(dtype)
    transform = Transform(DATA, train=False, seed=1)
    out = apply(transform, image, draw(transform, 1))
    expected = (image[8:56, 8:56] / largest - 0.4) / 0.2
    np.testing.assert_allclose(out, expected, atol=2e-6)


def test_augmentation_is_crop_contrast_about_one_half_and_brightness() -> None:
    image = np.random.default_rng(1).integers(0, 65536, (64, 64)).astype(np.uint16)
    transform = Transform(DATA, train=True, seed=3)
    parameters = draw(transform, 20)
    for i in range(20):
        top, left = int(parameters.top[i]), int(parameters.left[i])
        x = image[top : top + 48, left : left + 48] / 65535.0
        # gain and offset of (b * (0.5 + c * (x - 0.5)) - mean) / std give b and c back
        product = float(parameters.gain[i]) * 0.2
        brightness = 2.0 * (float(parameters.offset[i]) * 0.2 + 0.4) + product
        contrast = product / brightness
        assert 0.9 <= brightness <= 1.1 and 0.9 <= contrast <= 1.1
        expected = (brightness * (0.5 + contrast * (x - 0.5)) - 0.4) / 0.2
        np.testing.assert_allclose(apply(transform, image, parameters, i), expected, atol=1e-5)


@pytest.mark.parametrize("shape", [(128, 128), (128, 64), (50, 128), (32, 20), (64, 64), (9, 640)])
def test_letterbox_keeps_the_aspect_and_centres_on_black(shape: tuple[int, int]) -> None:
    transform = Transform(
        dataclasses.replace(DATA, crop_px=64, mean=0.0, std=1.0), train=False, seed=1
    )
    image = np.full(shape, 255, np.uint8)
    out = apply(transform, image, draw(transform, 1))
    height, width = (round(side * 64 / max(shape)) for side in shape)
    assert np.count_nonzero(out) == height * width
    rows, columns = np.flatnonzero(out.any(1)), np.flatnonzero(out.any(0))
    assert abs(rows[0] - (63 - rows[-1])) <= 1 and abs(columns[0] - (63 - columns[-1])) <= 1
    assert out.max() == 1.0


def test_placements_of_a_batch_are_those_of_its_images() -> None:
    transform = Transform(DATA, train=False, seed=1)
    height, width = np.random.default_rng(0).integers(8, 4000, (2, 500))
    height[:3], width[:3] = (64, 64, 16_384), (64, 40, 8)
    batch = np.stack(transform.placements(height, width), axis=1)
    for row, h, w in zip(batch.tolist(), height.tolist(), width.tolist(), strict=True):
        place = transform.placement(h, w)
        assert row == [place.height, place.width, place.top, place.left]


def test_shrinking_averages_areas() -> None:
    image = np.random.default_rng(2).integers(0, 256, (256, 256)).astype(np.uint8)
    transform = Transform(
        dataclasses.replace(DATA, crop_px=64, mean=0.0, std=1.0), train=False, seed=1
    )
    out = apply(transform, image, draw(transform, 1))
    expected = image.reshape(64, 4, 64, 4).mean((1, 3)) / 255.0
    assert np.abs(out - expected).max() <= 0.51 / 255.0  # the scaled image is rounded to 8 bits


def test_enlarging_interpolates_between_the_pixels() -> None:
    image = np.repeat(np.arange(0, 256, 8, dtype=np.uint8)[None], 32, axis=0)
    transform = Transform(
        dataclasses.replace(DATA, crop_px=64, mean=0.0, std=1.0), train=False, seed=1
    )
    out = apply(transform, image, draw(transform, 1)) * 255.0
    expected = 8.0 * np.clip((np.arange(64) + 0.5) / 2 - 0.5, 0, 31)  # pixel centres on each other
    assert np.abs(out - expected).max() <= 0.51


def test_left_stays_left_in_training() -> None:
    image = np.zeros((64, 64), np.uint8)
    image[:, :20] = 255
    transform = Transform(DATA, train=True, seed=1)
    parameters = draw(transform, 200)
    for i in range(200):
        out = apply(transform, image, parameters, i)
        assert out[:, :24].mean() > out[:, 24:].mean()


def test_rotation_turns_counter_clockwise_about_the_centre_of_the_crop() -> None:
    data = dataclasses.replace(DATA, augment=Augment(rotation_degrees=90.0, random_crop=False))
    transform = Transform(data, train=True, seed=1)
    image = np.random.default_rng(4).integers(0, 256, (64, 64)).astype(np.uint8)
    plain = draw(Transform(DATA, train=False, seed=1), 1)
    quarter = dataclasses.replace(plain, degrees=np.array([90.0], np.float32))
    turned = apply(transform, image, quarter)
    np.testing.assert_allclose(turned, np.rot90(apply(transform, image, plain)), atol=1e-5)


def test_small_angles_agree_with_the_rotation_matrix_of_opencv() -> None:
    transform = Transform(DATA, train=False, seed=1)
    forward = cv2.getRotationMatrix2D((23.5, 23.5), 5.0, 1.0)
    np.testing.assert_allclose(
        transform.rotation(5.0), cv2.invertAffineTransform(forward), atol=1e-9
    )


def test_parameters_depend_on_seed_epoch_and_position_only() -> None:
    transform = Transform(DATA, train=True, seed=9)
    index = np.arange(100, dtype=np.int64)
    epoch = index // 40
    whole = transform.draw(epoch, index)
    for part in (slice(0, 1), slice(35, 60), slice(99, 100)):
        again = transform.draw(epoch[part], index[part])
        for name in ("top", "left", "gain", "offset", "degrees"):
            assert (getattr(again, name) == getattr(whole, name)[part]).all()
    other = Transform(DATA, train=True, seed=10).draw(epoch, index)
    assert (other.gain != whole.gain).all()


def test_corners_cover_the_whole_slack_evenly() -> None:
    # 17 x 17 corners; chi-square per axis, 99.9 % point for 16 degrees is 39.3
    parameters = draw(Transform(DATA, train=True, seed=2), 17_000)
    for corner in (parameters.top, parameters.left):
        counts = np.bincount(corner, minlength=17)
        assert len(counts) == 17
        assert ((counts - 1000.0) ** 2 / 1000.0).sum() < 39.3


def test_brightness_contrast_and_angle_cover_both_sides_evenly() -> None:
    augment = Augment(brightness=0.1, contrast=0.2, rotation_degrees=7.0)
    transform = Transform(dataclasses.replace(DATA, augment=augment), train=True, seed=2)
    drawn = draw(transform, 16_000)
    gain, offset = drawn.gain.astype(np.float64) * 0.2, drawn.offset.astype(np.float64) * 0.2 + 0.4
    brightness = 2.0 * offset + gain  # as in the test of contrast above
    for share in (
        (brightness - 1.0) / 0.1,
        (gain / brightness - 1.0) / 0.2,
        drawn.degrees / 7.0,
    ):
        # 16 equal bins; chi-square, 99.9 % point for 15 degrees is 37.7
        counts = np.histogram(share, bins=16, range=(-1.0, 1.0))[0]
        assert counts.sum() >= 15_998  # float32 may round one over the edge
        assert ((counts - 1000.0) ** 2 / 1000.0).sum() < 37.7


def test_evaluation_uses_the_centre_and_no_augmentation() -> None:
    parameters = draw(Transform(DATA, train=False, seed=2), 50)
    assert set(parameters.top) == set(parameters.left) == {8}
    assert (parameters.gain == np.float32(1 / 0.2)).all()
    assert (parameters.degrees == 0).all()
