"""Boxes in model pixels, against the pixels themselves."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from mlip.dataloading.pipelines.transforms import Transform
from mlip.dataloading.tables.table import ManifestError
from mlip.transfer.truth import finding_boxes
from mlip.transfer.truth.outside import OutsideBoxes
from tests.transfer.truth.one_box import write_manifest


def test_boxes_land_on_the_pixels_they_frame(tmp_path: Path) -> None:
    """Oracle: the bright rectangle, after the model's own image preparation."""
    config, manifest = write_manifest(tmp_path, "50,90,80,60")
    (box,) = finding_boxes.load_boxes(config, manifest, [0])[0]
    transform = Transform(config.data, train=False, seed=0)
    zero = np.zeros(1, dtype=np.int64)
    pixels = np.empty((224, 224), dtype=np.float32)
    image = cv2.imread(str(tmp_path / "one.png"), cv2.IMREAD_GRAYSCALE)
    transform.apply(image, transform.draw(zero, zero), 0, pixels)
    bright_y, bright_x = np.nonzero(pixels > 0)
    seen = (bright_x.min(), bright_y.min(), bright_x.max() + 1, bright_y.max() + 1)
    np.testing.assert_allclose(box.corners, seen, atol=1.0)
    assert (box.finding, box.side) == ("Left_Lung", None)


def test_a_box_that_the_crop_removes_is_dropped(tmp_path: Path) -> None:
    config, manifest = write_manifest(tmp_path, "90,0,20,18")
    assert finding_boxes.load_boxes(config, manifest, [0]) == {}


def test_a_box_outside_its_image_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    config, manifest = write_manifest(tmp_path, "150,90,80,60")
    with pytest.raises(ValueError, match=r"boxes\.csv.*does not lie inside its 200 x 300 image"):
        finding_boxes.load_boxes(config, manifest, [0])


def test_boxes_outside_their_images_are_told_all_at_once(tmp_path: Path) -> None:
    """One a run was told: of a published file with hundreds, a run of hours each."""
    outside = OutsideBoxes("boxes.csv")
    outside.look(0, np.array([[0.0, 0, 5, 5]]), (10, 20))
    outside.check()
    for row in range(3, 15):
        outside.look(row, np.array([[0.0, 0, 5, 5], [0, 0, 30, 5], [0, 0, 31, 5]]), (10, 20))
    with pytest.raises(ManifestError) as caught:
        outside.check()
    assert (
        "boxes.csv: data row 4: a box (x=0 y=0 w=30 h=5) does not lie inside its 20 x 10 image; in "
        "all 24 boxes of 12 rows are so: data rows 5, 6, 7, 8, 9, 10, 11, 12, 13, 14 and 1 more; "
        in str(caught.value)
    )


def test_missing_columns_are_all_named(tmp_path: Path) -> None:
    config, manifest = write_manifest(tmp_path, "50,90,80,60")
    (tmp_path / "boxes.csv").write_text("path,label,x,y\n")
    with pytest.raises(ValueError, match="h, w"):
        finding_boxes.load_boxes(config, manifest, [0])


def test_boxes_of_a_jpeg_that_is_turned_by_exif_lie_on_the_picture_as_shown(
    tmp_path: Path,
) -> None:
    """The stored header has 200 x 300 px, the picture 300 x 200: the box would be outside."""
    config, manifest = write_manifest(tmp_path, "50,90,80,60")
    upright = finding_boxes.load_boxes(config, manifest, [0])
    shown = cv2.imread(str(tmp_path / "one.png"), cv2.IMREAD_GRAYSCALE)
    stored = cv2.imencode(".jpg", cv2.rotate(shown, cv2.ROTATE_90_COUNTERCLOCKWISE))[1].tobytes()
    # one EXIF entry: orientation 6, to be turned clockwise
    tag = b"\x01\x12\x00\x03\x00\x00\x00\x01\x00\x06\x00\x00"
    exif = b"Exif\0\0MM\x00*\x00\x00\x00\x08\x00\x01" + tag + bytes(4)
    segment = b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif
    (tmp_path / "one.png").write_bytes(stored[:2] + segment + stored[2:])
    assert finding_boxes.load_boxes(config, manifest, [0]) == upright
