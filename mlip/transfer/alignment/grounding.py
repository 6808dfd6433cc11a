"""Grounding: where in an image a phrase points, and how far that beats easy explanations.

Maps are those of patch_maps.py. Boxes are (x0, y0, x1, y1) in pixels of the model's input.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlip.dataloading.progress import Progress
from mlip.transfer.alignment.patch_maps import PhraseMaps, Upsampler, pointed_pixel
from mlip.transfer.array import Array
from mlip.transfer.measures.interval import (
    Estimate,
    estimate,
    mean_estimate,
    measured_mean,
    not_available,
    patient_resamples,
    patients_in,
    weighted_mean,
)
from mlip.transfer.measures.means import joined_ends, mean_over
from mlip.transfer.measures.predictions import KeepMarks
from mlip.transfer.truth.finding_masks import Mask

# a bare name; a sentence, of phantoms with the side; a phrase of the report that a box answers
KINDS = ("keyword", "sentence", "phrase")
POINTING = "pointing by "  # before the kind of a phrase, in the name of the method
COLUMNS = ("hit", "area", "prior", "prior_with_side", "swapped", "cnr", "miou")
MASK_COLUMNS = ("hit", "area", "cnr", "miou")  # the same against the pixels of a mask
IOU_THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5)  # of the cosine, as BioViL's mIoU
QUERIES_AT_ONCE = 256


@dataclass(frozen=True)
class Query:
    """One phrase asked of one image, with the boxes that answer it."""

    image: int  # row of the ImageBank
    finding: str
    side: str | None  # "left" | "right" of the patient, None where the finding has no side
    kind: str  # one of KINDS
    phrase: int  # row of the phrases' TextBank
    boxes: Array  # [n, 4] pixels, at least one
    swapped: int | None  # an image without the finding; None where there is none
    masks: tuple[Mask, ...] = ()  # where annotators drew pixels: together the finding's


def is_inside(point: Array, boxes: Array) -> bool:
    x, y = point
    inside = (boxes[:, 0] <= x) & (x < boxes[:, 2]) & (boxes[:, 1] <= y) & (y < boxes[:, 3])
    return bool(inside.any())


def box_mask(boxes: Array, size: tuple[int, int]) -> Array:
    """Pixels whose centre lies in any box, [H, W] bool."""
    ys, xs = np.arange(size[0]) + 0.5, np.arange(size[1]) + 0.5
    mask = np.zeros(size, dtype=bool)
    for x0, y0, x1, y1 in boxes:
        mask |= ((ys >= y0) & (ys < y1))[:, None] & ((xs >= x0) & (xs < x1))[None, :]
    return mask


def contrast_to_noise(pictures: Array, masks: Array) -> Array:
    """(mean inside - mean outside) / sqrt(var inside + var outside); NaN where one is empty.

    Shapes:  pictures [N, H, W], masks [N, H, W] bool -> [N]
    Source:  BioViL (Boecking et al. 2022, section 4.3) takes the absolute value; signed here, so
             that a map which is high everywhere but in the box scores below zero.
    """
    values = pictures.reshape(len(pictures), -1).astype(np.float64)
    values -= values.mean(axis=1, keepdims=True)  # keeps the variance by sums exact enough
    weight = masks.reshape(len(masks), -1).astype(np.float64)
    squares = values**2
    inside, total = weight.sum(axis=1), float(values.shape[1])
    sums = np.einsum("np,np->n", values, weight), np.einsum("np,np->n", squares, weight)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean_in, mean_out = sums[0] / inside, (values.sum(axis=1) - sums[0]) / (total - inside)
        var_in = sums[1] / inside - mean_in**2
        var_out = (squares.sum(axis=1) - sums[1]) / (total - inside) - mean_out**2
        noise = np.sqrt(np.clip(var_in, 0, None) + np.clip(var_out, 0, None))
        ratio = (mean_in - mean_out) / noise
    return np.where((noise == 0) & (inside > 0) & (inside < total), 0.0, ratio)


def mean_iou(pictures: Array, masks: Array) -> Array:
    """Overlap of a map with the truth, averaged over IOU_THRESHOLDS of the cosine, [N].

    Shapes:  pictures [N, H, W], masks [N, H, W] bool
    Source:  BioViL (Boecking et al. 2022, section 4.3). Calling everything scores the truth's area.
    """
    total = np.zeros(len(pictures))
    for threshold in IOU_THRESHOLDS:
        called = pictures > threshold
        both = (called & masks).sum(axis=(1, 2))
        total += both / np.maximum((called | masks).sum(axis=(1, 2)), 1)
    return total / len(IOU_THRESHOLDS)


class PixelPrior:
    """The one pixel that training boxes of a finding cover most often, with and without side.

    What a model scores that never looks at the image: findings live in habitual places, so this,
    not the box's area, is what pointing has to beat.
    """

    def __init__(self, size: tuple[int, int]) -> None:
        self.size = size
        self._cover: dict[tuple[str, str | None], Array] = {}
        self._pixel: dict[tuple[str, str | None], Array] = {}

    def add(self, finding: str, side: str | None, boxes: Array) -> None:
        """One image's boxes; they count for the finding and, if a side is named, for both."""
        mask = box_mask(boxes, self.size)
        self._pixel.clear()
        for key in {(finding, None), (finding, side)}:
            if key not in self._cover:
                self._cover[key] = np.zeros(self.size, dtype=np.int32)
            self._cover[key] += mask

    def pixel(self, finding: str, side: str | None) -> Array | None:
        key = (finding, side)
        cover = self._cover.get(key)
        if cover is None:
            return None
        if key in self._pixel:
            return self._pixel[key]
        # the middle of the best region, where several pixels tie
        ys, xs = np.nonzero(cover == cover.max())
        middle = np.argmin((ys - ys.mean()) ** 2 + (xs - xs.mean()) ** 2)
        self._pixel[key] = np.array([xs[middle] + 0.5, ys[middle] + 0.5])
        return self._pixel[key]


def evaluate_grounding(
    maps: PhraseMaps | Array,
    queries: Sequence[Query],
    patient_ids: Sequence[Any] | Array,
    *,
    grid: tuple[int, int],
    size: tuple[int, int],
    prior: PixelPrior | None,
    names: Mapping[str, str],
    bootstrap: int,
    seed: int,
    keep: KeepMarks | None = None,
) -> dict[str, Any]:
    """Pointing game per kind of phrase and finding, beside every control.

    maps     PhraseMaps, or phrase_maps: [phrases, images, P]
    keep     gets of each finding the images' hits and overlaps, of several phrases their mean
    Shapes:  patient_ids [images]
    Returns: {kind: {"findings": [...], "all": {...}, "findings_at_twice_area": int}} with, for
             each row: hit, area (chance), prior, prior_with_side, swapped, over_swapped, cnr, miou
             and "mask": {n, hit, area, cnr, miou} against mask pixels, where queries have masks;
             "over_findings": hit, cnr and miou as the mean of the findings' own, as BioViL has it
    """
    result: dict[str, Any] = {}
    upsample = Upsampler(grid, size)
    for kind in KINDS:
        chosen = [q for q in queries if q.kind == kind]
        if not chosen:
            continue
        measured = _measure(chosen, maps, size, prior, upsample)
        images = np.array([q.image for q in chosen])
        patients = np.asarray(patient_ids)[images]
        weights = patient_resamples(patients, bootstrap, seed)
        rows = []
        for finding in dict.fromkeys(q.finding for q in chosen):
            own = np.array([q.finding == finding for q in chosen])
            of_finding = {key: values[own] for key, values in measured.items()}
            if keep is not None:
                places, of = np.unique(images[own], return_inverse=True)
                for key in ("hit", "miou"):
                    marks = np.bincount(of, of_finding[key]) / np.bincount(of)
                    keep(f"{POINTING}{kind}", finding, key, places, marks)
            name = names.get(finding, finding)
            rows.append({"finding": finding, "name": name, **_summary(of_finding, weights[:, own])})
        rows.sort(key=lambda r: str(r["name"]))
        result[kind] = {
            "findings": rows,
            "all": _summary(measured, weights),
            "over_findings": {
                key: _mean_of(measured[key], weights, [q.finding for q in chosen])
                for key in ("hit", "cnr", "miou")
            },
            "findings_at_twice_area": sum(
                r["hit"]["value"] >= 2.0 * r["area"] for r in rows if r["hit"]["value"] is not None
            ),
            "num_findings": len(rows),
        }
    return result


def _measure(
    queries: Sequence[Query],
    maps: PhraseMaps | Array,
    size: tuple[int, int],
    prior: PixelPrior | None,
    upsample: Upsampler,
) -> dict[str, Array]:
    """One value a query and column; NaN where a control does not exist."""
    names = (*COLUMNS, *(f"mask_{key}" for key in MASK_COLUMNS))
    columns: dict[str, list[Array]] = {key: [] for key in names}
    known_masks: dict[bytes, Array] = {}
    told = Progress("phrases looked for")
    for start in range(0, len(queries), QUERIES_AT_ONCE):
        told(start, len(queries))
        part = queries[start : start + QUERIES_AT_ONCE]
        for q in part:
            if q.boxes.tobytes() not in known_masks:
                known_masks[q.boxes.tobytes()] = box_mask(q.boxes, size)
        masks = np.stack([known_masks[q.boxes.tobytes()] for q in part])
        phrase = [q.phrase for q in part]
        pictures = upsample(maps[phrase, [q.image for q in part]])
        # where no image lacks the finding, its own stands in and the value is struck out below
        other = upsample(maps[phrase, [q.image if q.swapped is None else q.swapped for q in part]])
        points = pointed_pixel(pictures, upsample.grid)
        columns["hit"].append(_hits(points, part))
        for key, values in _against_masks(pictures, points, part).items():
            columns[f"mask_{key}"].append(values)
        swapped = _hits(pointed_pixel(other, upsample.grid), part)
        swapped[[q.swapped is None for q in part]] = np.nan
        columns["swapped"].append(swapped)
        columns["area"].append(masks.mean(axis=(1, 2)))
        columns["cnr"].append(contrast_to_noise(pictures, masks))
        columns["miou"].append(mean_iou(pictures, masks))
        for key, with_side in (("prior", False), ("prior_with_side", True)):
            columns[key].append(_prior_hits(prior, part, with_side))
        if len(known_masks) > 4 * QUERIES_AT_ONCE:
            known_masks.clear()
    return {key: np.concatenate(values) for key, values in columns.items()}


def _against_masks(pictures: Array, points: Array, queries: Sequence[Query]) -> dict[str, Array]:
    """MASK_COLUMNS of each query; NaN where it has no mask."""
    found = {key: np.full(len(queries), np.nan) for key in MASK_COLUMNS}
    own = np.flatnonzero([len(q.masks) > 0 for q in queries])
    if len(own) == 0:
        return found
    masks = np.stack([np.any([m.pixels() for m in queries[i].masks], axis=0) for i in own])
    x, y = np.floor(points[own]).astype(int).T
    found["hit"][own] = masks[np.arange(len(own)), y, x]
    found["area"][own] = masks.mean(axis=(1, 2))
    found["cnr"][own] = contrast_to_noise(pictures[own], masks)
    found["miou"][own] = mean_iou(pictures[own], masks)
    return found


def _hits(points: Array, queries: Sequence[Query]) -> Array:
    return np.array([float(is_inside(p, q.boxes)) for p, q in zip(points, queries, strict=True)])


def _prior_hits(prior: PixelPrior | None, queries: Sequence[Query], with_side: bool) -> Array:
    """Whether the fixed pixel of each finding is in its boxes; NaN where there is none."""
    hits = np.full(len(queries), np.nan)
    if prior is None:
        return hits
    for i, q in enumerate(queries):
        pixel = prior.pixel(q.finding, q.side if with_side else None)
        if pixel is not None:
            hits[i] = is_inside(pixel, q.boxes)
    return hits


def _summary(columns: Mapping[str, Array], weights: Array) -> dict[str, Any]:
    paired = np.isfinite(columns["swapped"])
    cnr = columns["cnr"]
    known = np.isfinite(cnr)

    def mean_or_none(values: Array) -> float | None:
        kept = values[np.isfinite(values)]
        return float(kept.mean()) if len(kept) else None

    return {
        "n": len(columns["hit"]),
        "hit": mean_estimate(columns["hit"], weights),
        "area": float(columns["area"].mean()),
        "prior": mean_or_none(columns["prior"]),
        "prior_with_side": mean_or_none(columns["prior_with_side"]),
        "swapped": mean_estimate(columns["swapped"][paired], weights[:, paired]),
        "over_swapped": _ratio(
            columns["hit"][paired], columns["swapped"][paired], weights[:, paired]
        ),
        "cnr": mean_estimate(cnr[known], weights[:, known]),
        "miou": mean_estimate(columns["miou"], weights),
        "mask": _mask_summary(columns, weights),
    }


def _mean_of(values: Array, weights: Array, findings: Sequence[str]) -> Estimate:
    """The mean of the findings' means; its n is the findings that have one."""
    each = []
    for finding in dict.fromkeys(findings):
        own = np.isfinite(values) & np.array([name == finding for name in findings])
        if own.any():
            each.append(measured_mean(values[own], weights[:, own]))
    if not each:
        return not_available("no rows")
    # a resample without any row of a finding has no mean over all of them
    below, above = joined_ends(each, lambda draws: np.asarray(draws.mean(axis=0)))
    return estimate(*mean_over(each, len(each))._replace(resampled=below, above=above))


def _mask_summary(columns: Mapping[str, Array], weights: Array) -> dict[str, Any] | None:
    """Scores against mask pixels; None where no query has a mask."""
    drawn = np.isfinite(columns["mask_hit"])
    if not drawn.any():
        return None
    found: dict[str, Any] = {"n": int(drawn.sum())}
    for key in MASK_COLUMNS:
        values = columns[f"mask_{key}"]
        known = np.isfinite(values)
        found[key] = (
            float(values[known].mean())
            if key == "area"
            else mean_estimate(values[known], weights[:, known])
        )
    return found


def _ratio(hits: Array, swapped: Array, weights: Array) -> Estimate:
    """Hit rate over the swapped images' hit rate, with its interval.

    None where resamples without a hit on a swapped image, whose ratio is infinite, reach its upper
    end: without them it would be that of one hit, the greatest that is left. Nor where all have one
    ratio, as of no hit at all: an interval without width says that no other patient could differ.
    """
    if len(hits) == 0:
        return not_available("no image without the finding to swap in")
    if swapped.sum() == 0:
        return not_available("the swapped images were never hit", len(hits))
    value, units = float(hits.mean() / swapped.mean()), patients_in(weights)
    with np.errstate(divide="ignore", invalid="ignore"):
        resampled = weighted_mean(hits, weights) / weighted_mean(swapped, weights)
    known = resampled[np.isfinite(resampled)]
    greatest = max([value, *known])
    found = estimate(value, np.nan_to_num(resampled, nan=np.nan, posinf=1e9), len(hits), units)
    if found["high"] is not None and found["high"] > greatest:
        rare = "the swapped images were hit too rarely to bound it"
        return {**found, "low": None, "high": None, "reason": rare}
    if found["high"] is not None and found["low"] == found["high"]:
        same = "all draws of patients have one ratio"
        return {**found, "low": None, "high": None, "reason": same}
    return found
