"""Phrases asked of images, and images that answer for "not there"."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mlip.dataloading.manifest import load_manifest
from mlip.knowledge.concept_files import load_concepts
from mlip.settings.config import load
from mlip.transfer.truth import finding_boxes
from mlip.transfer.truth.annotations import Annotations
from tests.transfer.truth.one_box import write_manifest


def test_the_swapped_image_may_deny_the_finding_and_is_never_an_uncertain_one(
    tmp_path: Path,
) -> None:
    from mlip.transfer.alignment.queries import make_queries

    lines = ["image,patient_id,split,labels,uncertain,negative", "a.png,p1,test,Pneumonia,,"]
    lines += ["b.png,p2,test,,,Pneumonia", "c.png,p3,test,Edema,Pneumonia,", "d.png,p4,test,,,"]
    (tmp_path / "m.csv").write_text("\n".join(lines) + "\n")
    settings = [f"data.manifest={tmp_path / 'm.csv'}", "data.columns.study_id=null"]
    settings += ["data.columns.report=null", "data.columns.labels=labels"]
    settings += ["transfer.columns={uncertain: uncertain, negative: negative}"]
    config = load([], settings)

    class FakeImages:
        row_index = np.arange(4)

    images: Any = FakeImages()
    boxes = {0: [finding_boxes.Box("Pneumonia", None, (0.0, 0.0, 8.0, 8.0))]}
    said = Annotations(config, load_manifest(config.data))
    for seed in range(5):
        queries, _, _ = make_queries(images, said, boxes, load_concepts(), False, seed)
        assert {q.swapped for q in queries} == {1}


def test_the_swapped_image_of_a_generated_one_has_no_box_of_the_finding() -> None:
    from mlip.transfer.alignment.queries import make_queries

    class FakeImages:
        row_index = np.arange(6)

    images: Any = FakeImages()
    corners = (0.0, 0.0, 8.0, 8.0)
    boxes = {i: [finding_boxes.Box("pneumothorax", "left", corners)] for i in range(6) if i != 4}
    boxes[4] = [finding_boxes.Box("lung_nodule", "left", corners)]
    said: Any = None
    queries, _, _ = make_queries(images, said, boxes, load_concepts(), True, 0)
    of_finding = [q.swapped for q in queries if q.finding == "pneumothorax"]
    assert len(of_finding) == 20 and set(of_finding) == {4}
    assert all(q.swapped != 4 for q in queries if q.finding == "lung_nodule")


def test_a_missing_box_on_real_data_is_no_proof_of_absence() -> None:
    """Only an image labelled with other things can be the swapped image; anatomy has none."""
    from mlip.transfer.alignment.queries import make_queries

    labels = [("Pneumonia",), (), ("Effusion",), ("Pneumonia",)]

    class FakeManifest:
        label_column = "labels"

        def labels(self, row: int) -> tuple[str, ...]:
            return labels[row]

    class FakeAnnotations:
        manifest = FakeManifest()
        transfer = load([], []).transfer

        def states(self, rows: np.ndarray, classes: list[str]) -> np.ndarray:
            return np.array([[1 if c in labels[r] else -1 for c in classes] for r in rows])

    class FakeImages:
        row_index = np.arange(4)

    corners = (0.0, 0.0, 8.0, 8.0)
    boxes = {
        0: [
            finding_boxes.Box("Pneumonia", None, corners),
            finding_boxes.Box("Left_Lung", None, corners),
        ]
    }
    images: Any = FakeImages()
    said: Any = FakeAnnotations()
    queries, phrases, names = make_queries(
        images,
        said,
        boxes,
        load_concepts(),
        False,
        seed=0,
    )
    swapped = {(q.finding, q.kind): q.swapped for q in queries}
    assert swapped["Pneumonia", "keyword"] == 2
    assert swapped["Left_Lung", "keyword"] is None
    assert ("Left_Lung", "sentence") not in swapped  # nobody states a part of the body
    assert phrases == ["left lung", "pneumonia", "there is pneumonia."]
    assert names["Left_Lung"] == "Left lung"


def test_words_of_a_report_are_asked_once_and_answered_by_all_of_their_boxes(
    tmp_path: Path,
) -> None:
    from mlip.transfer.alignment.queries import make_queries

    config, manifest = write_manifest(tmp_path, "50,90,80,60")
    path = tmp_path / "boxes.csv"
    path.write_text(
        "path,label,x,y,w,h,phrase\none.png,Pneumonia,10,20,40,60,patchy  opacity\n"
        "one.png,Pneumonia,80,20,40,60,patchy opacity\none.png,Pneumonia,80,220,40,60,\n"
    )

    class FakeImages:
        row_index = np.arange(1)

    images: Any = FakeImages()
    boxes = finding_boxes.load_boxes(config, manifest, [0])
    queries, phrases, _ = make_queries(
        images, Annotations(config, manifest), boxes, load_concepts(), False, 0
    )
    (asked,) = [q for q in queries if q.kind == "phrase"]
    assert phrases[asked.phrase] == "patchy opacity"
    assert asked.boxes.tolist() == [list(box.corners) for box in boxes[0][:2]]
    (named,) = [q for q in queries if q.kind == "keyword"]
    assert len(named.boxes) == 3


def test_what_is_asked_of_boxes_is_known_before_there_are_images(tmp_path: Path) -> None:
    from mlip.transfer.alignment.queries import box_phrases, make_queries

    class FakeImages:
        row_index = np.arange(3)

    images: Any = FakeImages()
    corners = (0.0, 0.0, 8.0, 8.0)
    sided = [finding_boxes.Box("pleural_effusion", side, corners) for side in ("left", "right")]
    boxes = {0: sided, 1: [finding_boxes.Box("pleural_effusion", None, corners)]}
    table, said = load_concepts(), Annotations(*write_manifest(tmp_path, "50,90,80,60"))
    _, phrases, _ = make_queries(images, said, boxes, table, True, 0)
    assert set(box_phrases(boxes, table, True)) == set(phrases)
    assert any(phrase.endswith("on the right.") for phrase in phrases)
    assert box_phrases(boxes, table, False) == ["pleural effusion"]
    assert not box_phrases({}, table, True)
