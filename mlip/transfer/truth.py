"""What is true of the evaluated images: labels, prompts for them, boxes in model pixels.

Generated studies bring their own prompts (wordings kept out of training) and sides; for real data
the wordings come from the concept table and the boxes from a boxes.csv beside the manifest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from mlip.config import Config, Evaluate
from mlip.dataloading import phantom_oracle, phantom_reports
from mlip.dataloading.image_file import decode_grey, read_bytes, read_header
from mlip.dataloading.ledger import BadSample
from mlip.dataloading.manifest import Manifest, ManifestError
from mlip.dataloading.samples import SampleReader
from mlip.dataloading.transforms import Transform
from mlip.knowledge.plain_letters import plain
from mlip.transfer.annotations import (
    INSIDE,
    NEGATIVE,
    UNCERTAIN,
    UNSAID,
    Annotations,
    check_inside,
)
from mlip.transfer.box_file import box_file, read_box_file
from mlip.transfer.generated import phantom_meta, truth_of
from mlip.transfer.interval import Array
from mlip.transfer.zero_shot import Prompts

SIDES = ("left", "right")
# what a label may be of and is no finding: "lung", "clear", "chronic", "portable"
_NO_FINDINGS = frozenset({"anatomy", "normal", "qualifier", "technique"})


@dataclass(frozen=True)
class Box:
    """One annotated place of one image, in pixels of the model's input."""

    finding: str
    side: str | None
    corners: tuple[float, float, float, float]  # x0, y0, x1, y1
    phrase: str = ""  # words of the report that it answers


def oracle(manifest: Manifest, rows: Array) -> Callable[[Array], Array]:
    """How well reports fit the truth of images of generated studies: [n, n] for n of `rows`.

    The function takes places in `rows`. Ties are broken at random (keyed by n): this reader cannot
    tell the studies apart, and the ceiling is what guessing among them reaches.
    """
    names = [Path(manifest.image_path(row)).stem for row in rows.tolist()]
    with truth_of(manifest) as folder:
        truths = phantom_oracle.read_truths(folder, names)

    def scores_of(members: Array) -> Array:
        scores = phantom_oracle.oracle_scores([truths[i] for i in members.tolist()])
        generator = np.random.default_rng(len(members))
        # where information differs it does by far more: this only decides ties
        return scores + 1e-7 * generator.random(scores.shape)

    return scores_of


def phantom_prompts(table: Any) -> list[Prompts]:
    return [
        Prompts(
            concept,
            _title(table[concept].name if concept in table else concept.replace("_", " ")),
            tuple(wordings["positive"]),
            tuple(wordings["negative"]),
        )
        for concept, wordings in phantom_reports.HELD_OUT_PROMPTS.items()
    ]


def lexicon_prompts(
    labels: Iterable[str], linker: Any, table: Any, settings: Evaluate
) -> tuple[list[Prompts], list[str]]:
    """Prompts for the labels that name a concept of the table, and the labels that name none.

    A label that is a concept's name or synonym, or its CheXpert label, is asked by the concept's
    name; one that says more ("calcified pleural plaques") in its own words.
    Raises:  ManifestError for a sentence of evaluate.negative_prompts that a lexicon with its own
             cues reads as a statement: it is of another language.
    """
    prompts, unknown = [], []
    for label in labels:
        text = " ".join(plain(label).replace("_", " ").lower().split())
        found = _concept_of(label, text, linker, table)
        if found is None:
            unknown.append(label)
            continue
        concept, name = found
        if table.cues is not None:
            _require_denials(concept, name, linker, settings.negative_prompts)
        positive, negative = (
            tuple(sentence.replace("{}", name) for sentence in sentences)
            for sentences in (settings.positive_prompts, settings.negative_prompts)
        )
        prompts.append(Prompts(label, _title(text), positive, negative))
    return prompts, unknown


def _concept_of(label: str, text: str, linker: Any, table: Any) -> tuple[Any, str] | None:
    """The finding that a label names and the words to ask it by; None where it names none."""
    for mention in linker.link(text):
        concept = table[mention.concept_id]
        if concept.semantic_type in _NO_FINDINGS:
            continue
        # "no finding" and the like say what is not there: that is no finding to score
        if mention.state != "present":
            return None
        is_whole = text[mention.start : mention.end] == text
        return concept, concept.name if is_whole else text
    same = [
        concept
        for concept in table
        if concept.semantic_type not in _NO_FINDINGS
        and label in concept.mappings.get("chexpert", ())
    ]
    return (same[0], same[0].name) if len(same) == 1 else None


def _require_denials(concept: Any, name: str, linker: Any, sentences: Iterable[str]) -> None:
    for sentence in sentences:
        found = linker.link(sentence.replace("{}", name))
        if any(m.concept_id == concept.id and m.state == "present" for m in found):
            raise ManifestError(
                f"evaluate.negative_prompts: the cues of the lexicon read {sentence!r} as a "
                f"statement of {concept.id}: write evaluate.positive_prompts and "
                "evaluate.negative_prompts in the lexicon's language"
            )


def _title(text: str) -> str:
    return text[:1].upper() + text[1:]


def label_names(manifest: Manifest, rows: Array) -> list[str]:
    return sorted({name for row in rows.tolist() for name in manifest.labels(row)})


def label_matrix(
    annotations: Annotations, rows: Array, findings: Sequence[str], *, blank_is_negative: bool
) -> Array:
    """1 present, 0 absent, -1 not said or uncertain, [rows, findings].

    What the columns of negative and uncertain labels say holds. Of the other findings a row with a
    label tells that they are absent, a row without any nothing, except where every finding was
    looked for.
    """
    if annotations.manifest.label_column is None:
        states = np.full((len(rows), len(findings)), UNSAID, dtype=np.int8)
    else:
        states = annotations.states(rows, findings)
    has_label = np.array([bool(annotations.manifest.labels(row)) for row in rows.tolist()], bool)
    matrix = np.where(states == UNCERTAIN, np.int8(UNSAID), states)
    unsaid = states == UNSAID
    matrix[unsaid & (has_label | blank_is_negative)[:, None]] = NEGATIVE
    return matrix


def load_boxes(config: Config, manifest: Manifest, rows: Iterable[int]) -> dict[int, list[Box]]:
    """Boxes of boxes.csv beside the manifest for these rows, cut to the model's crop.

    Columns: path (as in the manifest), label, x, y, w, h in pixels of the file; side and phrase are
    optional.
    Where transfer.columns names a column of boxes or masks, that is read instead (a mask is the
    extents of its parts, named by the row's one label).
    A box that the centre crop leaves less than half of is dropped: it cannot be pointed at.
    Raises:  ManifestError naming the file and what is wrong with it.
    """
    columns = config.transfer.columns
    if columns.boxes is not None or columns.mask is not None:
        return _annotated(config, manifest, rows)
    drawn = read_box_file(manifest.path) or {}
    transform = Transform(config.data, train=False, seed=config.run.seed)
    meta = phantom_meta(manifest)
    fixed = (meta["settings"]["image_px"],) * 2 if meta is not None else None
    boxes: dict[int, list[Box]] = {}
    for row in rows:
        own = drawn.get(manifest.image_path(row), [])
        size = (fixed or _image_size(manifest, row)) if own else None
        if size is None:
            continue
        where = f"{box_file(manifest.path)}: data row {row + 1} of the manifest"
        corners = np.array([box.xywh for box in own])
        corners[:, 2:] += corners[:, :2]
        check_inside(corners, size, where)
        for box, (x0, y0, x1, y1) in zip(own, corners.tolist(), strict=True):
            moved = _to_model((x0, y0, x1, y1), size, transform)
            if moved is not None:
                side = box.side if box.side in SIDES else None
                boxes.setdefault(row, []).append(Box(box.label, side, moved, box.phrase))
    return boxes


def _image_size(manifest: Manifest, row: int) -> tuple[int, int] | None:
    try:
        name = manifest.image_name(row)
        content = read_bytes(manifest.root, manifest.image_path(row), name)
        header = read_header(content)
        if not header.plain:  # DICOM, or turned by EXIF: the size is that of what is decoded
            height, width = decode_grey(content, header).shape
            return height, width
    except BadSample:
        return None  # the loader has left the image out already
    return header.height, header.width


def sized_rows(
    config: Config, annotations: Annotations, rows: Iterable[int]
) -> Iterator[tuple[int, tuple[int, int]]]:
    """Each row with the (height, width) its annotations are in.

    Rows whose image cannot be read are left out, as the loader has left them out already.
    """
    reader = SampleReader(annotations.manifest, config.data)
    for row in rows:
        size = annotations.source_size(row)
        try:
            if size is None:
                height, width = reader.pixels(row, 0).shape
                size = (int(height), int(width))
        except BadSample:
            continue
        yield row, size


def _annotated(config: Config, manifest: Manifest, rows: Iterable[int]) -> dict[int, list[Box]]:
    """Boxes of the manifest's own columns, through the evaluation crop."""
    annotations = Annotations(config, manifest)
    transform = Transform(config.data, train=False, seed=config.run.seed)
    found: dict[int, list[Box]] = {}
    for row, size in sized_rows(config, annotations, rows):
        named: list[tuple[Array, str, str]] = []
        if config.transfer.columns.boxes is not None:
            boxes = annotations.boxes(row)
            check_inside(boxes.corners, size, f"{manifest.path}: data row {row + 1}")
            named = list(zip(boxes.corners, boxes.names, boxes.phrases, strict=True))
        elif len(labels := manifest.labels(row)) == 1:
            _, _, parts, _ = cv2.connectedComponentsWithStats(
                (annotations.mask(row, size) == INSIDE).astype(np.uint8)
            )
            for x, y, w, h, _ in parts[1:].tolist():
                named.append((np.array([x, y, x + w, y + h], dtype=float), labels[0], ""))
        for corners, name, phrase in named:
            x0, y0, x1, y1 = corners.tolist()
            moved = _to_model((x0, y0, x1, y1), size, transform)
            if moved is not None:
                found.setdefault(row, []).append(Box(name, None, moved, phrase))
    return found


def _to_model(
    corners: tuple[float, float, float, float], size: tuple[int, int], transform: Transform
) -> tuple[float, float, float, float] | None:
    """Corners in file pixels -> corners in the evaluation crop; None if most of the box is cut."""
    place = transform.placement(*size)
    margin = (transform.resize_px - transform.crop_px) // 2
    scale_x, scale_y = place.width / size[1], place.height / size[0]
    x0 = corners[0] * scale_x + place.left - margin
    y0 = corners[1] * scale_y + place.top - margin
    x1 = corners[2] * scale_x + place.left - margin
    y1 = corners[3] * scale_y + place.top - margin
    cut = [min(max(v, 0.0), float(transform.crop_px)) for v in (x0, y0, x1, y1)]
    kept = (cut[2] - cut[0]) * (cut[3] - cut[1])
    if kept < 0.5 * (x1 - x0) * (y1 - y0):
        return None
    return cut[0], cut[1], cut[2], cut[3]
