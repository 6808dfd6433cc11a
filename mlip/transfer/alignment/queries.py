"""Which phrases are asked of which images, and what an image without the finding is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mlip.dataloading.manifest import Manifest
from mlip.dataloading.phantom import reports as phantom_reports
from mlip.settings.config import Config
from mlip.transfer.alignment.grounding import PixelPrior, Query
from mlip.transfer.features import ImageBank
from mlip.transfer.truth import finding_boxes
from mlip.transfer.truth.annotations import Annotations
from mlip.transfer.truth.finding_masks import Mask
from mlip.transfer.truth.labels import label_matrix

PRIOR_ROWS = 4000  # training rows behind the fixed pixel; more no longer move it


def make_queries(
    images: ImageBank,
    annotations: Annotations,
    boxes: Mapping[int, Sequence[finding_boxes.Box]],
    table: Any,
    is_phantom: bool,
    seed: int,
    masks: Mapping[int, Sequence[Mask]] | None = None,
) -> tuple[list[Query], list[str], dict[str, str]]:
    """Queries, the phrases they point into, and findings' names for people.

    A name asks for all boxes of the finding; a sentence with a side for those of that side; words
    of a report for those that answer them. Every wording is a query of its own, so that no wording
    is picked.

    masks    the rows' masks, where there are any: a query takes those of its finding and side
    """
    by_image: list[dict[str, list[finding_boxes.Box]]] = []
    for row in images.row_index.tolist():
        found: dict[str, list[finding_boxes.Box]] = {}
        for box in boxes.get(row, ()):
            found.setdefault(box.finding, []).append(box)
        by_image.append(found)
    findings = sorted({name for found in by_image for name in found})
    names = {f: _name(f, table) for f in findings}
    without = _images_without(findings, images, annotations, by_image, is_phantom)
    generator = np.random.default_rng(seed)
    phrases: dict[str, int] = {}
    queries: list[Query] = []
    for i, found in enumerate(by_image):
        in_image = (masks or {}).get(int(images.row_index[i]), ())
        for finding, own in sorted(found.items()):
            free, drawn = without[finding], [m for m in in_image if m.finding == finding]
            wordings = _wordings(finding, names[finding].lower(), is_phantom, bool(free))
            for asked in _asked(own, wordings):
                queries.append(
                    Query(
                        image=i,
                        finding=finding,
                        side=asked.side,
                        kind=asked.kind,
                        phrase=phrases.setdefault(asked.text, len(phrases)),
                        boxes=np.array([box.corners for box in asked.boxes]),
                        swapped=free[int(generator.integers(len(free)))] if free else None,
                        masks=asked.of_masks(drawn),
                    )
                )
    return queries, list(phrases), names


class _Asked(NamedTuple):
    """Words asked of an image, and the boxes of a finding that answer them."""

    kind: str
    text: str
    boxes: Sequence[finding_boxes.Box]
    names_side: bool = False

    @property
    def side(self) -> str | None:
        """That of all boxes with a side; None where there are two, or none."""
        sides = {box.side for box in self.boxes if box.side is not None}
        return sides.pop() if len(sides) == 1 else None

    def of_masks(self, drawn: Sequence[Mask]) -> tuple[Mask, ...]:
        """Those of the finding's masks that answer too: none of a report's words."""
        if self.kind == "phrase":
            return ()
        return tuple(m for m in drawn if not self.names_side or m.side == self.side)


def _asked(
    own: Sequence[finding_boxes.Box], wordings: Mapping[str, Sequence[str]]
) -> Iterator[_Asked]:
    """All that is asked of an image about a finding with these boxes."""
    for text in wordings["keyword"]:
        yield _Asked("keyword", text, own)
    for text in wordings["sentence"]:
        if "{side}" not in text:
            yield _Asked("sentence", text, own)
            continue
        for side in sorted({box.side for box in own if box.side is not None}):
            of_side = [box for box in own if box.side == side]
            yield _Asked("sentence", text.format(side=side), of_side, names_side=True)
    for text in dict.fromkeys(box.phrase for box in own if box.phrase):
        yield _Asked("phrase", text, [box for box in own if box.phrase == text])


def box_phrases(
    boxes: Mapping[int, Sequence[finding_boxes.Box]], table: Any, is_phantom: bool
) -> list[str]:
    """What make_queries asks of such boxes whatever images they are of: names, and generated
    studies' sentences."""
    found: dict[str, None] = {}
    for box in (box for own in boxes.values() for box in own):
        wordings = _wordings(box.finding, _name(box.finding, table).lower(), is_phantom, False)
        for text in (text for texts in wordings.values() for text in texts):
            if box.side is not None or "{side}" not in text:
                found[text.replace("{side}", str(box.side))] = None
    return list(found)


def _images_without(
    findings: Sequence[str],
    images: ImageBank,
    annotations: Annotations,
    by_image: Sequence[Mapping[str, Any]],
    is_phantom: bool,
) -> dict[str, list[int]]:
    """Images known to lack each finding.

    Phantoms are boxed in full. On real data a missing box means that nobody drew one: there only
    an image whose labels name other things or deny it, and never a part of the body, counts as
    without it.
    """
    if is_phantom:
        return {f: [i for i, found in enumerate(by_image) if f not in found] for f in findings}
    labels = label_matrix(annotations, images.row_index, findings, blank_is_negative=False)
    return {
        f: np.flatnonzero(labels[:, k] == 0).tolist() if (labels[:, k] == 1).any() else []
        for k, f in enumerate(findings)
    }


def make_prior(config: Config, manifest: Manifest, size: tuple[int, int]) -> PixelPrior:
    """The fixed-pixel prior from the training split's boxes."""
    rows = manifest.rows("train", with_report=False)[:PRIOR_ROWS]
    prior = PixelPrior(size)
    for own in finding_boxes.load_boxes(config, manifest, rows.tolist()).values():
        for finding in {box.finding for box in own}:
            chosen = [box for box in own if box.finding == finding]
            # the prior knows a box's side only where the query would
            for side in {box.side for box in chosen}:
                corners = np.array([box.corners for box in chosen if box.side == side])
                prior.add(finding, side, corners)
    return prior


def _name(finding: str, table: Any) -> str:
    text = table[finding].name if finding in table else finding.replace("_", " ").lower()
    return text[:1].upper() + text[1:]


def _wordings(
    finding: str, name: str, is_phantom: bool, can_be_absent: bool
) -> Mapping[str, Sequence[str]]:
    if is_phantom and finding in phantom_reports.GROUNDING_PHRASES:
        return phantom_reports.GROUNDING_PHRASES[finding]
    # nobody states a part of the body: it is only named
    return {"keyword": [name], "sentence": [f"there is {name}."] if can_be_absent else []}
