"""Labels, boxes and masks of a manifest's own columns; what is wrong with them is named."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch

from mlip.dataloading.dicom.radiograph import write_radiograph
from mlip.dataloading.manifest import Manifest, ManifestError, load_manifest
from mlip.dataloading.pipelines.samples import SampleReader
from mlip.dataloading.splits import SPLITS
from mlip.settings.config import Config, load
from mlip.transfer.fits.classification import target_matrix
from mlip.transfer.fits.protocol import TASKS
from mlip.transfer.frames import Images, frame_of
from mlip.transfer.truth import finding_boxes
from mlip.transfer.truth.annotations import Annotations
from mlip.transfer.truth.mask_file import IGNORED, INSIDE
from tests.raw_layouts import encode_mask

HEIGHT, WIDTH = 40, 60


def make(tmp_path: Path, *overrides: str, **columns: Any) -> tuple[Config, Manifest]:
    """Two rows: a PNG and a DICOM file of the same size."""
    pixels = np.random.default_rng(0).integers(0, 65536, (HEIGHT, WIDTH)).astype(np.uint16)
    cv2.imwrite(str(tmp_path / "a.png"), pixels)
    write_radiograph(tmp_path / "b.dcm", pixels, patient_id="q", study_id="s")
    rows = {
        "image": ["a.png", "b.dcm"],
        "patient_id": ["p", "q"],
        "labels": ["Nodule", "Nodule"],
        **columns,
    }
    pa.parquet.write_table(pa.table(rows), tmp_path / "m.parquet")
    named = [f"transfer.columns.{name}={name}" for name in columns]
    settings = [f"data.manifest={tmp_path / 'm.parquet'}", "data.columns.labels=labels"]
    settings += [
        "data.columns.report=null",
        "data.columns.study_id=null",
        "data.columns.split=null",
    ]
    settings += ["data.resize_px=60", "data.crop_px=60", *named, *overrides]
    config = load([], settings)
    return config, load_manifest(config.data)


def test_label_states_and_what_policies_make_of_them(tmp_path: Path) -> None:
    config, manifest = make(tmp_path, uncertain=["Edema", ""], negative=["Mass", "Edema"])
    found = Annotations(config, manifest)
    states = found.states(np.arange(2), ["Nodule", "Edema", "Mass"])
    assert states.tolist() == [[1, 2, 0], [1, 0, -1]]
    for policy, expected in (("one", 1), ("zero", 0), ("ignore", -1)):
        classes = {"Nodule": "one", "Edema": policy, "Mass": "one"}
        assert target_matrix(states, classes, "zero").tolist() == [[1, expected, 0], [1, 0, 0]]
    assert target_matrix(states, classes, "ignore")[1].tolist() == [1, 0, -1]
    assert found.names() == {"Nodule", "Edema", "Mass"}


def test_a_label_stated_both_ways_is_refused(tmp_path: Path) -> None:
    config, manifest = make(tmp_path, negative=["", "Nodule"])
    with pytest.raises(ManifestError, match="data row 2 states 'Nodule' in two"):
        Annotations(config, manifest).states(np.arange(2), ["Nodule"])


def test_run_lengths_files_and_boxes_give_the_same_mask(tmp_path: Path) -> None:
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    mask[5:15, 10:30] = 1
    config, manifest = make(tmp_path, mask=[encode_mask(mask), "-1"])
    found = Annotations(config, manifest)
    np.testing.assert_array_equal(found.mask(0, (HEIGHT, WIDTH)), mask * INSIDE)
    assert not found.mask(1, (HEIGHT, WIDTH)).any() and not found.masks_are_files
    picture = mask * 255
    picture[20, 20] = 127
    cv2.imwrite(str(tmp_path / "m.png"), picture)
    config, manifest = make(tmp_path, mask=["m.png", ""])
    found = Annotations(config, manifest)
    drawn = found.mask(0, (HEIGHT, WIDTH))
    assert drawn[20, 20] == IGNORED and found.masks_are_files
    assert [found.has_mask(0), found.has_mask(1)] == [True, False]
    boxes = [json.dumps([[10, 5, 20, 10, "Nodule"]]), ""]
    config, manifest = make(tmp_path, "transfer.mask_source=boxes", boxes=boxes)
    filled = Annotations(config, manifest).mask(0, (HEIGHT, WIDTH))
    np.testing.assert_array_equal(filled, mask * INSIDE)
    # two boxes of one film, which begin and end a pixel outside of it, as rounded ones may
    boxes = [json.dumps([[-1, -1, 11, 6, "Nodule"], [50, 35, 11, 6, "Nodule"]]), ""]
    config, manifest = make(tmp_path, "transfer.mask_source=boxes", boxes=boxes)
    filled = Annotations(config, manifest).mask(0, (HEIGHT, WIDTH)) == INSIDE
    assert filled[:5, :10].all() and filled[35:, 50:].all() and filled.sum() == 2 * 50


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("5 3000", "mask of 60 x 40 px: run lengths: leave the image"),
        ("small.png", "is 10 x 10 px, its image 60 x 40"),
        ("ones.png", "holds values of 0 to 1, which would all be outside: expected 255 inside"),
        ("nowhere.png", "cannot be read: missing"),
        ("DOE_JANE/m.png", "cannot be read: an image leads outside data.root"),
    ],
)
def test_a_mask_that_does_not_fit_is_named(tmp_path: Path, cell: str, message: str) -> None:
    cv2.imwrite(str(tmp_path / "small.png"), np.zeros((10, 10), np.uint8))
    cv2.imwrite(str(tmp_path / "ones.png"), np.eye(HEIGHT, WIDTH, dtype=np.uint8))
    (tmp_path / "DOE_JANE").symlink_to("/")
    config, manifest = make(tmp_path, mask=[cell, ""])
    with pytest.raises(ManifestError, match=message) as caught:
        Annotations(config, manifest).mask(0, (HEIGHT, WIDTH))
    assert "data row 1" in str(caught.value) and "DOE" not in str(caught.value)


@pytest.mark.parametrize("cell", ["nonsense", "[[1, 2, 3]]", '[[1, 2, 0, 5, "a"]]'])
def test_a_box_that_is_none_is_named(tmp_path: Path, cell: str) -> None:
    config, manifest = make(tmp_path, boxes=[cell, ""])
    with pytest.raises(ManifestError, match="data row 1: .*box"):
        Annotations(config, manifest).boxes(0)


def test_grounding_reads_the_manifests_own_boxes_and_masks_dicom_too(tmp_path: Path) -> None:
    boxes = [json.dumps([[10, 5, 20, 10, "Nodule"]])] * 2
    config, manifest = make(tmp_path, boxes=boxes)
    found = finding_boxes.load_boxes(config, manifest, [0, 1])
    # 60 x 40 in a square of 60: ten rows of margin above
    expected = [finding_boxes.Box("Nodule", None, (10.0, 15.0, 30.0, 25.0))]
    assert found == {0: expected, 1: expected}
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    mask[5:15, 10:30] = 1
    config, manifest = make(tmp_path, mask=[encode_mask(mask)] * 2)
    assert finding_boxes.load_boxes(config, manifest, [0, 1]) == {0: expected, 1: expected}
    config, manifest = make(tmp_path)
    (tmp_path / "boxes.csv").write_text("path,label,x,y,w,h\nb.dcm,Nodule,10,5,20,10\n")
    assert finding_boxes.load_boxes(config, manifest, [0, 1]) == {1: expected}


def test_only_images_with_a_box_are_opened_for_their_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All were decoded again, 25,000 of the test list of ChestX-ray14 for its 984 with boxes."""
    config, manifest = make(tmp_path, boxes=['[[10, 5, 20, 10, "Nodule"]]', ""])
    opened: list[int] = []
    pixels = SampleReader.pixels

    def count(self: SampleReader, row: int, epoch: int) -> Any:
        opened.append(row)
        return pixels(self, row, epoch)

    monkeypatch.setattr(SampleReader, "pixels", count)
    assert list(finding_boxes.load_boxes(config, manifest, [0, 1])) == [0]
    assert opened == [0]


def test_a_list_that_is_a_subset_needs_its_column(tmp_path: Path) -> None:
    named = ("transfer.task=segmentation", "transfer.subset=gold")
    config, manifest = make(tmp_path, *named, subset=["gold", ""])
    found = Annotations(config, manifest)
    assert found.of_subset(np.arange(2), "test").tolist() == [0]
    assert found.of_subset(np.arange(2), "train").tolist() == [0, 1]
    config, manifest = make(tmp_path, *named, "transfer.subset_of=all")
    with pytest.raises(ManifestError, match="set transfer.columns.subset"):
        Annotations(config, manifest).of_subset(np.arange(2), "train")


@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_an_image_without_a_box_of_the_classes_was_not_looked_at_for_them(
    task: str, tmp_path: Path
) -> None:
    """boxes.csv beside real images: a nodule's box says nothing about lungs."""
    (tmp_path / "boxes.csv").write_text(
        "path,label,x,y,w,h\na.png,Left_Lung,5,5,20,20\nb.dcm,Nodule,5,5,9,9\n"
    )
    for classes, kept in (("{Left_Lung: zero}", [0]), ("{}", [0, 1])):
        settings = [f"transfer.task={task}", "transfer.mask_source=boxes"]
        config, manifest = make(tmp_path, *settings, f"transfer.classes={classes}")
        manifest = dataclasses.replace(manifest, keep_without_report=True)
        images = Images(config, manifest, frame_of(config))
        annotations = Annotations(config, manifest)
        own = TASKS[task](config, manifest, annotations, images, torch.device("cpu"))
        rows = [row for split in SPLITS for row in own.rows(split).tolist()]
        assert sorted(rows) == kept
        images.close()


def test_a_meta_file_of_another_program_gives_no_size_to_boxes(tmp_path: Path) -> None:
    """An exporter's meta.json beside real films of 60 x 80 px: their boxes were said to be of 9."""
    (tmp_path / "boxes.csv").write_text("path,label,x,y,w,h\na.png,Nodule,5,5,20,20\n")
    (tmp_path / "meta.json").write_text('{"settings": {"image_px": 9}}')
    annotations = Annotations(*make(tmp_path, "transfer.task=detection"))
    assert annotations.boxes(0).size != (9, 9)
    # what nobody is known to have looked at is not taken for negative
    assert annotations.looked_at(np.arange(2)).tolist() == [0]


def test_a_blank_cell_of_a_column_of_boxes_says_that_there_is_none(tmp_path: Path) -> None:
    """The films without a finding of a public set: without them every alarm on one is missed."""
    boxes = [json.dumps([[5, 5, 20, 20, "Nodule"]]), ""]
    settings = ("transfer.task=detection", "transfer.classes={Nodule: zero}")
    config, manifest = make(tmp_path, *settings, boxes=boxes)
    assert Annotations(config, manifest).looked_at(np.arange(2)).tolist() == [0, 1]


def test_a_manifest_that_changes_under_an_evaluation_stops_it(tmp_path: Path) -> None:
    """Its rows may be others by now: each image would get another's mask."""
    config, manifest = make(tmp_path, mask=["-1", "5 3"])
    make(tmp_path, mask=["5 3", "-1"])
    with pytest.raises(ManifestError, match="changed while it was read; start again"):
        Annotations(config, manifest)


@pytest.mark.parametrize("field", ["patient_id", "image"])
def test_a_column_of_identifiers_is_none_of_labels(tmp_path: Path, field: str) -> None:
    """Names of labels stand in results and on pages."""
    config, manifest = make(tmp_path, f"data.columns.labels={field}")
    with pytest.raises(ManifestError, match=f"columns.labels and data.columns.{field} are both"):
        Annotations(config, manifest)


@pytest.mark.parametrize("height", ["99999999", "9" * 5000, "0"])
def test_a_size_that_no_image_has_is_refused(tmp_path: Path, height: str) -> None:
    """An empty mask of it took as many bytes."""
    columns = {"source_height": [height, "16384"], "source_width": ["99999999", "60"]}
    config, manifest = make(tmp_path, mask=["-1", "-1"], **columns)
    assert Annotations(config, manifest).source_size(1) == (16384, 60)
    with pytest.raises(ManifestError, match="data row 1: .*whole numbers of px from 1 to 16384"):
        Annotations(config, manifest).mask(0, (HEIGHT, WIDTH))


@pytest.mark.parametrize("cell", ["[" * 100_000, f'[[1{"0" * 400}, 2, 3, 4, "Mass"]]'])
def test_boxes_nested_or_as_large_as_no_number_are_an_error_of_their_row(
    tmp_path: Path, cell: str
) -> None:
    config, manifest = make(tmp_path, boxes=[cell, "[]"])
    with pytest.raises(ManifestError, match="data row 1: boxes: expected JSON"):
        Annotations(config, manifest).boxes(0)
