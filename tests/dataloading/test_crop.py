"""The compiled crop against NumPy's two passes over a padded image, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest

from mlip.dataloading.pipelines.crop import crop_batch, crop_one


def slow_crop(
    image: np.ndarray, top: int, left: int, scale: np.float32, offset: np.float32, size: int
) -> np.ndarray:
    far = size + 60  # wider than any window reaches
    padded = np.pad(image, far)
    window = padded[far + top : far + top + size, far + left : far + left + size]
    return np.multiply(window, scale, dtype=np.float32) + offset


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_any_window_of_any_image_is_numpys_to_the_bit(dtype: type) -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        height, width, size = rng.integers(1, 40, 3)
        image = rng.integers(0, np.iinfo(dtype).max + 1, (height, width)).astype(dtype)
        top, left = (int(v) for v in rng.integers(-60, 60, 2))
        scale, offset = rng.normal(size=2).astype(np.float32)
        out = np.full((size, size), np.nan, np.float32)
        crop_one(image, top, left, scale, offset, out)
        expected = slow_crop(image, top, left, scale, offset, int(size))
        assert np.array_equal(out, expected)


def test_a_batch_is_its_images_one_by_one_also_where_they_may_not_be_written() -> None:
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (6, 30, 20)).astype(np.uint8)
    images.flags.writeable = False
    top, left = rng.integers(-9, 9, (2, 6))
    scale, offset = rng.normal(size=(2, 6)).astype(np.float32)
    out = np.full((6, 24, 24), np.nan, np.float32)
    crop_batch(images, top, left, scale, offset, out)
    for i in range(6):
        expected = slow_crop(images[i], int(top[i]), int(left[i]), scale[i], offset[i], 24)
        assert np.array_equal(out[i], expected)
