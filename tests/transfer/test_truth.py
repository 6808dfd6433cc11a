"""Labels, prompts and boxes; box mapping against the pixels themselves."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pytest

from mlip.config import Config, Evaluate, load
from mlip.dataloading.manifest import Manifest, load_manifest
from mlip.dataloading.phantom_dataset import read_truth
from mlip.dataloading.phantom_reports import CONCEPT_IDS
from mlip.dataloading.table import ManifestError
from mlip.dataloading.transforms import Transform
from mlip.knowledge.concept_files import load_concepts
from mlip.knowledge.concepts import ConceptTable
from mlip.knowledge.linker import Linker
from mlip.transfer import truth
from mlip.transfer.annotations import Annotations, shared_names
from mlip.transfer.generated import phantom_meta, truth_of

GERMAN = Path(__file__).parent.parent / "knowledge" / "lexicon_de"


def write_manifest(folder: Path, box: str, labels: str = "Pneumonia") -> tuple[Config, Manifest]:
    image = np.zeros((300, 200), np.uint8)
    image[90:150, 50:130] = 255
    cv2.imwrite(str(folder / "one.png"), image)
    (folder / "manifest.csv").write_text(
        f"image,report,patient_id,split,labels\none.png,there is pneumonia here,p1,test,{labels}\n"
    )
    (folder / "boxes.csv").write_text(f"path,label,x,y,w,h\none.png,Left_Lung,{box}\n")
    config = load(
        [],
        [
            f"data.manifest={folder / 'manifest.csv'}",
            "data.columns.study_id=null",
            "data.columns.labels=labels",
            "data.resize_px=256",
            "data.crop_px=224",
        ],
    )
    return config, load_manifest(config.data)


def test_boxes_land_on_the_pixels_they_frame(tmp_path: Path) -> None:
    """Oracle: the bright rectangle, after the model's own image preparation."""
    config, manifest = write_manifest(tmp_path, "50,90,80,60")
    (box,) = truth.load_boxes(config, manifest, [0])[0]
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
    assert truth.load_boxes(config, manifest, [0]) == {}


def test_a_box_outside_its_image_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    config, manifest = write_manifest(tmp_path, "150,90,80,60")
    with pytest.raises(ValueError, match=r"boxes\.csv.*does not lie inside its 200 x 300 image"):
        truth.load_boxes(config, manifest, [0])


def test_missing_columns_are_all_named(tmp_path: Path) -> None:
    config, manifest = write_manifest(tmp_path, "50,90,80,60")
    (tmp_path / "boxes.csv").write_text("path,label,x,y\n")
    with pytest.raises(ValueError, match="h, w"):
        truth.load_boxes(config, manifest, [0])


def test_a_blank_label_cell_says_nothing_unless_everything_was_looked_for(tmp_path: Path) -> None:
    said = Annotations(*write_manifest(tmp_path, "50,90,80,60", labels=""))
    rows = np.array([0])
    assert truth.label_matrix(said, rows, ["a"], blank_is_negative=False).tolist() == [[-1]]
    assert truth.label_matrix(said, rows, ["a"], blank_is_negative=True).tolist() == [[0]]


def test_denied_and_uncertain_labels_are_what_their_columns_say(tmp_path: Path) -> None:
    """As RSNA's and NIH's normal images, denied in full, and CheXpert's -1."""
    lines = [
        "image,patient_id,split,labels,uncertain,negative",
        "a.png,p1,test,Edema,Pneumonia,",
        "b.png,p2,test,,,Edema|Pneumonia",
        "c.png,p3,test,,Edema,",
        "d.png,p4,test,Pneumonia,,Edema",
        "e.png,p5,test,Pneumonia,,",
    ]
    (tmp_path / "m.csv").write_text("\n".join(lines) + "\n")
    settings = [f"data.manifest={tmp_path / 'm.csv'}", "data.columns.study_id=null"]
    settings += ["data.columns.report=null", "data.columns.labels=labels"]
    settings += ["transfer.columns.uncertain=uncertain", "transfer.columns.negative=negative"]
    config = load([], settings)
    said = Annotations(config, load_manifest(config.data))
    findings = ["Edema", "Pneumonia"]
    matrix = truth.label_matrix(said, np.arange(5), findings, blank_is_negative=False)
    assert matrix.tolist() == [[1, -1], [0, 0], [-1, -1], [0, 1], [0, 1]]


def test_the_swapped_image_may_deny_the_finding_and_is_never_an_uncertain_one(
    tmp_path: Path,
) -> None:
    from mlip.transfer.queries import make_queries

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
    boxes = {0: [truth.Box("Pneumonia", None, (0.0, 0.0, 8.0, 8.0))]}
    said = Annotations(config, load_manifest(config.data))
    for seed in range(5):
        queries, _, _ = make_queries(images, said, boxes, load_concepts(), False, seed)
        assert {q.swapped for q in queries} == {1}


def test_boxes_of_a_jpeg_that_is_turned_by_exif_lie_on_the_picture_as_shown(
    tmp_path: Path,
) -> None:
    """The stored header has 200 x 300 px, the picture 300 x 200: the box would be outside."""
    config, manifest = write_manifest(tmp_path, "50,90,80,60")
    upright = truth.load_boxes(config, manifest, [0])
    shown = cv2.imread(str(tmp_path / "one.png"), cv2.IMREAD_GRAYSCALE)
    stored = cv2.imencode(".jpg", cv2.rotate(shown, cv2.ROTATE_90_COUNTERCLOCKWISE))[1].tobytes()
    # one EXIF entry: orientation 6, to be turned clockwise
    tag = b"\x01\x12\x00\x03\x00\x00\x00\x01\x00\x06\x00\x00"
    exif = b"Exif\0\0MM\x00*\x00\x00\x00\x08\x00\x01" + tag + bytes(4)
    segment = b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif
    (tmp_path / "one.png").write_bytes(stored[:2] + segment + stored[2:])
    assert truth.load_boxes(config, manifest, [0]) == upright


def test_labels_become_prompts_through_the_lexicon_and_no_finding_does_not() -> None:
    table = load_concepts()
    prompts, unknown = truth.lexicon_prompts(
        ["Pleural_Effusion", "No Finding", "Xyzzy"], Linker(table), table, Evaluate()
    )
    assert [p.finding for p in prompts] == ["Pleural_Effusion"]
    assert "there is pleural effusion." in prompts[0].positive
    assert "no pleural effusion." in prompts[0].negative
    assert unknown == ["No Finding", "Xyzzy"]


def test_a_label_is_asked_by_what_it_says() -> None:
    """The first word that the lexicon has was asked for: a fissure for its thickening, a heart for
    its insufficiency, anything chronic for chronic changes."""
    table = load_concepts(None)
    labels = {
        "Edema": "pulmonary edema",
        "calcified pleural plaques": "calcified pleural plaques",
        "NSG tube": "enteric tube",
        "external foreign body": "external foreign body",
        "fissure thickening": "fissure thickening",
        "Pleural Other": "pleural abnormality",
        "Nodule/Mass": "nodule/mass",
        "Support Devices": "medical device",
        "Enlarged Cardiomediastinum": table["wide_mediastinum"].name,
    }
    nobody = ["chronic changes", "end on vessel", "clear lungs", "no pneumothorax"]
    prompts, unknown = truth.lexicon_prompts([*labels, *nobody], Linker(table), table, Evaluate())
    assert {p.finding: p.positive[0] for p in prompts} == {k: f"{v}." for k, v in labels.items()}
    assert unknown == nobody
    fewer = ConceptTable([concept for concept in table if concept.id != "pleural_disease"])
    of_two = truth.lexicon_prompts(["Pleural Other"], Linker(fewer), fewer, Evaluate())
    assert of_two == ([], ["Pleural Other"])  # CheXpert's label of two concepts names no one


def test_prompts_are_the_users_and_deny_in_the_language_of_the_cues() -> None:
    table = load_concepts(GERMAN)
    labels = ["Pneumothorax", "Pleuraerguss"]
    own = Evaluate(
        positive_prompts=("{} nachweisbar.",), negative_prompts=("Kein {}.", "Kein {} {x}.")
    )
    prompts, _ = truth.lexicon_prompts(labels, Linker(table), table, own)
    assert prompts[0].positive == ("Pneumothorax nachweisbar.",)
    assert prompts[1].negative == ("Kein Pleuraerguss.", "Kein Pleuraerguss {x}.")
    apart = (
        "Rippenfellergu\u0308sse",
        "Pleuraergu\u0308sse",
    )  # an accent of its own, as files have it
    prompts, unknown = truth.lexicon_prompts(apart, Linker(table), table, own)
    assert unknown == [apart[0]] and prompts[0].positive == ("Pleuraerguss nachweisbar.",)
    with pytest.raises(ManifestError, match="'no {}.' as a statement of pneumothorax"):
        truth.lexicon_prompts(labels, Linker(table), table, Evaluate())


def test_labels_that_no_manifest_has_are_nobodys(tmp_path: Path) -> None:
    """Generated studies, no column of labels, another lexicon: the evaluation broke at its end."""
    _, manifest = write_manifest(tmp_path, "50,90,80,60")
    column = pa.chunked_array([["a", "a|b", "c"]])
    named = dataclasses.replace(manifest, label_column=column, patient_key=np.array([1, 2, 3]))
    assert shared_names(named) == ["a"]
    assert shared_names(dataclasses.replace(manifest, label_column=None)) == []


def test_prompts_of_phantoms_state_their_finding_or_deny_it() -> None:
    table = load_concepts(None)
    linker = Linker(table)
    prompts = truth.phantom_prompts(table)
    assert {p.finding for p in prompts} == set(CONCEPT_IDS)
    for prompt in prompts:
        for texts, state in ((prompt.positive, "present"), (prompt.negative, "absent")):
            found = [{m.concept_id: m.state for m in linker.link(text)} for text in texts]
            assert {states.get(prompt.finding) for states in found} == {state}, prompt.finding


def test_real_data_is_not_taken_for_phantoms(tmp_path: Path) -> None:
    _, manifest = write_manifest(tmp_path, "50,90,80,60")
    assert phantom_meta(manifest) is None
    (tmp_path / "meta.json").write_text('{"kind": "something else"}')
    assert phantom_meta(manifest) is None
    assert phantom_meta(dataclasses.replace(manifest, path="nowhere/m.csv")) is None


@pytest.mark.parametrize(
    "content", ["", "[]", "null", "[" * 100_000, '{"kind": "mlip phantom studies", "settings": []}']
)
def test_generated_studies_with_a_damaged_meta_are_not_scored_as_real_ones(
    tmp_path: Path, content: str
) -> None:
    _, manifest = write_manifest(tmp_path, "50,90,80,60")
    (tmp_path / "truth.jsonl").write_text("{}\n")
    (tmp_path / "meta.json").write_text(content)
    with pytest.raises(ManifestError, match=r"meta\.json: is damaged or not that of the"):
        phantom_meta(manifest)


@pytest.mark.parametrize("content", ["", "[]", "{}", "null", "{", "[" * 100_000, "\xff", None])
def test_a_truth_that_is_damaged_is_named(tmp_path: Path, content: str | None) -> None:
    _, manifest = write_manifest(tmp_path, "50,90,80,60")
    if content is not None:
        (tmp_path / "truth.jsonl").write_text(content + "\n" * bool(content), encoding="latin-1")
    with pytest.raises(ManifestError, match=r"truth\.jsonl: (is damaged|cannot be read)"):
        truth.oracle(manifest, np.arange(1))
    if content != "":  # a folder without a finding has no line
        with pytest.raises(ManifestError, match=r"truth\.jsonl: "), truth_of(manifest) as folder:
            read_truth(folder)


def test_a_missing_box_on_real_data_is_no_proof_of_absence() -> None:
    """Only an image labelled with other things can be the swapped image; anatomy has none."""
    from mlip.transfer.features import ImageBank
    from mlip.transfer.queries import make_queries

    labels = [("Pneumonia",), (), ("Effusion",), ("Pneumonia",)]

    class FakeManifest:
        label_column = "labels"

        def labels(self, row: int) -> tuple[str, ...]:
            return labels[row]

    class FakeAnnotations:
        manifest = FakeManifest()

        def states(self, rows: np.ndarray, classes: list[str]) -> np.ndarray:
            return np.array([[1 if c in labels[r] else -1 for c in classes] for r in rows])

    class FakeImages:
        row_index = np.arange(4)

    corners = (0.0, 0.0, 8.0, 8.0)
    boxes = {0: [truth.Box("Pneumonia", None, corners), truth.Box("Left_Lung", None, corners)]}
    images: ImageBank = FakeImages()  # type: ignore[assignment]
    queries, phrases, names = make_queries(
        images,
        FakeAnnotations(),
        boxes,
        load_concepts(),
        False,
        seed=0,  # type: ignore[arg-type]
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
    from mlip.transfer.queries import make_queries

    config, manifest = write_manifest(tmp_path, "50,90,80,60")
    path = tmp_path / "boxes.csv"
    path.write_text(
        "path,label,x,y,w,h,phrase\none.png,Pneumonia,10,20,40,60,patchy  opacity\n"
        "one.png,Pneumonia,80,20,40,60,patchy opacity\none.png,Pneumonia,80,220,40,60,\n"
    )

    class FakeImages:
        row_index = np.arange(1)

    images: Any = FakeImages()
    boxes = truth.load_boxes(config, manifest, [0])
    queries, phrases, _ = make_queries(
        images, Annotations(config, manifest), boxes, load_concepts(), False, 0
    )
    (asked,) = [q for q in queries if q.kind == "phrase"]
    assert phrases[asked.phrase] == "patchy opacity"
    assert asked.boxes.tolist() == [list(box.corners) for box in boxes[0][:2]]
    (named,) = [q for q in queries if q.kind == "keyword"]
    assert len(named.boxes) == 3
