"""Masks on the model's pixels; oracle: the image itself through the model's own preparation."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from mlip.dataloading.manifest import load_manifest
from mlip.dataloading.phantom.dataset import read_truth
from mlip.dataloading.pipelines.transforms import Transform
from mlip.settings.config import load
from mlip.transfer.alignment.queries import make_queries
from mlip.transfer.features import ImageBank
from mlip.transfer.truth import finding_boxes
from mlip.transfer.truth.annotations import Annotations
from mlip.transfer.truth.finding_masks import load_masks
from tests.small_run import small_run


def test_a_mask_column_lands_on_the_pixels_that_it_marks(tmp_path: Path) -> None:
    image = np.zeros((300, 200), np.uint8)
    cv2.ellipse(image, (90, 120), (40, 25), 20, 0, 360, 255, -1)
    for name in ("one", "two", "three", "mask"):
        cv2.imwrite(str(tmp_path / f"{name}.png"), image)
    (tmp_path / "manifest.csv").write_text(
        "image,report,patient_id,split,labels,mask\n"
        "one.png,there is pneumonia here,p1,test,Pneumonia,mask.png\n"
        "two.png,there is pneumonia here,p2,test,Pneumonia|Edema,mask.png\n"
        "three.png,there is pneumonia here,p3,test,Pneumonia,\n"
    )
    settings = [
        *(f"data.manifest={tmp_path / 'manifest.csv'}", "data.columns.study_id=null"),
        *("data.columns.labels=labels", "data.resize_px=256", "data.crop_px=224"),
        "transfer.columns.mask=mask",
    ]
    config = load([], settings)
    found = load_masks(config, load_manifest(config.data), [0, 1, 2])
    assert found.keys() == {0}  # two labels share a mask, a blank cell is no annotation
    (mask,) = found[0]
    assert (mask.finding, mask.side) == ("Pneumonia", None)
    transform = Transform(config.data, train=False, seed=0)
    zero = np.zeros(1, dtype=np.int64)
    pixels = np.empty((224, 224), dtype=np.float32)
    transform.apply(image, transform.draw(zero, zero), 0, pixels)
    bright = pixels > 0
    assert (mask.pixels() ^ bright).sum() <= 0.03 * bright.sum()  # the edge alone


def test_phantom_masks_lie_in_their_boxes_and_a_sided_sentence_asks_for_one_side() -> None:
    run = small_run()
    rows = run.manifest.rows("test").tolist()
    boxes = finding_boxes.load_boxes(run.config, run.manifest, rows)
    masks = load_masks(run.config, run.manifest, rows)
    whole = read_truth(run.folder / "data")
    assert read_truth(run.folder / "data", only=[]) == {}
    some = next(iter(whole))
    assert read_truth(run.folder / "data", only={some}).keys() == {some}
    for row, own in boxes.items():
        for box in own:
            same = [m for m in masks[row] if (m.finding, m.side) == (box.finding, box.side)]
            ys, xs = np.nonzero(np.any([m.pixels() for m in same], axis=0))
            x0, y0, x1, y1 = box.corners
            inside = (xs >= x0 - 1.5) & (xs < x1 + 1.5) & (ys >= y0 - 1.5) & (ys < y1 + 1.5)
            # a side may hold several boxes of a finding
            assert inside.any() and (len([b for b in own if b == box]) > 1 or inside.mean() > 0.4)

    class FakeImages:
        row_index = np.array(rows)

    images: ImageBank = FakeImages()
    queries, phrases, _ = make_queries(
        images, Annotations(run.config, run.manifest), boxes, run.table, True, 0, masks
    )
    for query in queries:
        sides = {m.side for m in query.masks}
        assert {m.finding for m in query.masks} <= {query.finding}
        if query.side is not None and query.side in phrases[query.phrase]:
            assert sides == {query.side}
    assert any(len({m.side for m in q.masks}) == 2 for q in queries if q.kind == "keyword")
