"""Mask images as tools write them: read right, or refused with what is wrong with them.

Oracle: the mask that was drawn, before it was smoothed, compressed or coloured.
"""

from __future__ import annotations

import struct
import zlib

import cv2
import numpy as np
import pytest

from mlip.transfer.truth.mask_file import IGNORED, INSIDE, read_mask

SIDE = 96


def disc(inside: int, outside: int = 0) -> np.ndarray:
    y, x = np.mgrid[:SIDE, :SIDE]
    return np.where((y - 40) ** 2 + (x - 50) ** 2 < 25**2, inside, outside).astype(np.uint8)


def encoded(picture: np.ndarray, kind: str = ".png", *options: int) -> bytes:
    return cv2.imencode(kind, picture, options)[1].tobytes()


def palette_png(colours: list[tuple[int, int, int]], index: np.ndarray) -> bytes:
    """A PNG of 8-bit indices: cv2 writes none, so its header is rewritten and PLTE put behind."""
    grey = encoded(index)
    body = grey[33:]
    header = struct.pack(">IIBBBBB", SIDE, SIDE, 8, 3, 0, 0, 0)
    plte = b"".join(bytes(colour) for colour in colours)

    def chunk(name: bytes, content: bytes) -> bytes:
        crc = zlib.crc32(name + content)
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", crc)

    return grey[:8] + chunk(b"IHDR", header) + chunk(b"PLTE", plte) + body


def test_plain_masks_are_read_as_drawn() -> None:
    drawn = disc(INSIDE)
    drawn[80:90, 5:20] = IGNORED
    bits = encoded(disc(INSIDE), ".png", cv2.IMWRITE_PNG_BILEVEL, 1)
    wide = drawn.astype(np.uint16) * 257
    three = np.repeat(drawn[:, :, None], 3, axis=2)
    opaque = np.concatenate([three, np.full((SIDE, SIDE, 1), 255, np.uint8)], axis=2)
    for content in map(encoded, (drawn, wide, three, opaque)):
        np.testing.assert_array_equal(read_mask(content), drawn)
    np.testing.assert_array_equal(read_mask(bits), disc(INSIDE))
    black_white = palette_png([(0, 0, 0), (255, 255, 255)], disc(1))
    np.testing.assert_array_equal(read_mask(black_white), disc(INSIDE))
    assert not read_mask(encoded(disc(0))).any()
    drawn[drawn == IGNORED] = 128  # as some tools write it
    assert (read_mask(encoded(drawn))[82:88, 8:16] == IGNORED).all()


@pytest.mark.parametrize("middle", [None, 127, 130])
@pytest.mark.parametrize("kind", [".png", ".jpg"])
def test_a_mask_read_by_its_levels_is_that_of_each_pixel(middle: int | None, kind: str) -> None:
    """Oracle: every pixel compared with the farthest unjudged level that an area has."""
    drawn = disc(INSIDE)
    drawn[5:25, 5:45] = 0 if middle is None else middle
    content = encoded(cv2.GaussianBlur(drawn, (3, 3), 0), kind)
    grey = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_GRAYSCALE).astype(int)
    around = np.lib.stride_tricks.sliding_window_view(np.pad(grey, 1, "edge"), (3, 3))
    flat = grey[around.min(axis=(2, 3)) == around.max(axis=(2, 3))]
    slack = max([abs(p - IGNORED) for p in flat if abs(p - IGNORED) <= 3], default=0)
    expected = np.where(grey > IGNORED, INSIDE, 0)
    expected[np.abs(grey - IGNORED) <= slack] = IGNORED
    found = read_mask(content)
    np.testing.assert_array_equal(found, expected)
    assert found.dtype == np.uint8 and found.shape == (SIDE, SIDE)
    assert ((found == IGNORED).sum() > 500) == (middle is not None)


@pytest.mark.parametrize("quality", [50, 75, 95])
def test_a_jpeg_mask_is_the_mask_but_for_its_edge(quality: int) -> None:
    drawn = disc(INSIDE)
    drawn[80:90, 5:20] = IGNORED
    found = read_mask(encoded(drawn, ".jpg", cv2.IMWRITE_JPEG_QUALITY, quality))
    assert (found != drawn).mean() < 0.01
    # of the disc's edge, 1.7 % of the pixels, a quarter
    assert ((found == INSIDE) != (drawn == INSIDE)).mean() < 0.005


def test_a_smoothed_mask_is_cut_at_half_and_not_left_unjudged() -> None:
    """Its edge counted as 127: a thin finding was not judged at all."""
    fine = np.zeros((4 * SIDE, 4 * SIDE), np.uint8)
    fine[100:106, 40:300] = INSIDE  # a line of 1.5 px after it
    small = cv2.resize(fine, (SIDE, SIDE), interpolation=cv2.INTER_AREA)
    assert not (read_mask(encoded(small)) == IGNORED).any()
    np.testing.assert_array_equal(read_mask(encoded(small)) == INSIDE, small >= 128)
    blurred = cv2.GaussianBlur(disc(INSIDE), (0, 0), 3)
    found = read_mask(encoded(blurred))
    assert ((found == INSIDE) != (disc(INSIDE) == INSIDE)).mean() < 0.01


def with_alpha(alpha: np.ndarray) -> bytes:
    white = np.full((SIDE, SIDE, 3), 255, np.uint8)
    return encoded(np.concatenate([white, alpha[:, :, None]], axis=2))


def with_strip(mask: np.ndarray) -> np.ndarray:
    mask[80:] = 255
    return mask


RED, GREEN = (255, 0, 0), (0, 255, 0)
REFUSED = {
    "0 and 1": (encoded(disc(1)), "values of 0 to 1, which would all be outside"),
    "0 and 1 of 16 bits": (encoded(disc(1).astype(np.uint16)), "values of 0 to 1, "),
    "0 and 128": (encoded(disc(128)), "values of 0 to 128, which would all be not judged"),
    "0 and 127": (encoded(disc(127)), "leave the cell blank where nothing was judged"),
    "0 and 191": (encoded(disc(191)), "areas of the levels 0, 191"),
    "64 and 191": (encoded(disc(191, 64)), "areas of the levels 64, 191"),
    "0 and 200": (encoded(disc(200)), "areas of the levels 0, 200"),
    "0, 1 and 255, as label maps mark what is ignored": (
        encoded(with_strip(disc(1))),
        "areas of the levels 0, 1, 255",
    ),
    "a label map in steps of 85": (
        encoded(with_strip(disc(85))),
        "areas of the levels 0, 85, 255",
    ),
    "a smooth map of probabilities": (
        encoded(np.repeat(np.linspace(0, 255, SIDE).astype(np.uint8)[:, None] // 24 * 24, SIDE, 1)),
        "areas of the levels",
    ),
    "red": (encoded(disc(255)[:, :, None] * np.array([0, 0, 1], np.uint8)), "is in colours"),
    "a palette of colours": (palette_png([(0, 0, 0), GREEN, RED], disc(1)), "is in colours"),
    "a JPEG in colours": (
        encoded(disc(255)[:, :, None] * np.array([0, 1, 1], np.uint8), ".jpg"),
        "is in colours",
    ),
    "white, drawn in its alpha": (with_alpha(disc(255)), "has transparent pixels"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_mask_that_does_not_say_what_is_inside_is_refused(name: str) -> None:
    content, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        read_mask(content)
