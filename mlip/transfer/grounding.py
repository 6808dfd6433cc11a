"""Grounding: where in an image a phrase points, and how far that beats easy explanations.

A map is the weighted mean over the phrase's rows (knowledge-enriched tokens and linked entities,
the rows and weights of the local score, method.md section 4) of their cosine with each patch:
what the local score pools, before it is pooled. High = match. Boxes are (x0, y0, x1, y1) in pixels
of the model's input.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from mlip.transfer.features import TextBank
from mlip.transfer.interval import (
    Array,
    Estimate,
    estimate,
    mean_estimate,
    not_available,
    patient_resamples,
    weighted_mean,
)
from mlip.unit_length import unit_length

KINDS = ("keyword", "sentence")  # a bare name; a sentence that also says the side


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


@torch.no_grad()
def text_rows(model: Any, texts: TextBank) -> tuple[Tensor, Tensor]:
    """The unit rows of the local score and their weights, [N, T+K, D] and [N, T+K].

    Source:  method.md section 4 (rows, weight); weights sum to 1 where a text has any.
    """
    local = model.config.loss.local_alignment
    scales = model.scales
    learned = local.learn_scales
    scale = scales.knowledge_scale.item() if learned else local.knowledge_scale
    gain = scales.knowledge_gain.item() if learned else local.knowledge_gain
    tokens, knowledge = unit_length(texts.text.tokens), texts.knowledge
    entities = unit_length(knowledge.entities)
    similarity = torch.einsum("ntd,nkd->ntk", tokens, entities) * scale
    similarity = similarity.masked_fill(~knowledge.mask[:, None, :], -torch.inf)
    # a text without entities has a softmax over nothing: NaN by definition, 0 here
    attention = torch.softmax(similarity, dim=-1).nan_to_num(0.0)
    enriched = unit_length(tokens + gain * torch.einsum("ntk,nkd->ntd", attention, entities))
    attended = texts.text.attention
    device = next(model.parameters()).device
    token_weights = model.token_weights(
        texts.content_mask.to(device), None if attended is None else attended.to(device)
    ).cpu()
    row_weights = knowledge.row_weights * knowledge.mask
    u, s = token_weights.sum(1, keepdim=True), row_weights.sum(1, keepdim=True)
    share = torch.full_like(s, local.knowledge_share)
    share = torch.where(s > 0, share, 0.0)
    share = torch.where(u > 0, share, torch.where(s > 0, 1.0, 0.0))
    weights = torch.cat(
        [
            (1.0 - share) * token_weights / torch.where(u > 0, u, 1.0),
            share * row_weights / torch.where(s > 0, s, 1.0),
        ],
        dim=1,
    )
    return torch.cat([enriched, entities], dim=1), weights


def phrase_maps(model: Any, patches: Tensor, texts: TextBank) -> Tensor:
    """Similarity of every patch with every phrase, [N, M, P] in [-1, 1], high = match."""
    rows, weights = text_rows(model, texts)
    rows, weights = rows.nan_to_num(0.0), weights
    # a weighted mean of cosines is the cosine's numerator with the weighted mean row
    mean_row = torch.einsum("nj,njd->nd", weights, rows)
    return torch.einsum("nd,mpd->nmp", mean_row, unit_length(patches))


def token_maps(model: Any, patches: Tensor, texts: TextBank) -> Tensor:
    """Similarity of every patch of each image with every row of its own text, [N, T+K, P]."""
    rows, _ = text_rows(model, texts)
    return torch.einsum("njd,npd->njp", rows.nan_to_num(0.0), unit_length(patches))


def upsample(grid_map: Array, height_px: int, width_px: int) -> Array:
    """A patch map as a smooth picture (cubic), one value a pixel."""
    return cv2.resize(
        np.asarray(grid_map, dtype=np.float32), (width_px, height_px), interpolation=cv2.INTER_CUBIC
    )


def pointed_pixel(picture: Array, grid: tuple[int, int]) -> Array:
    """Centre (x, y) of the highest pixel of an upsampled map [H, W].

    Cubic upsampling lets neighbouring patches move the point inside the best patch: a patch of
    16 px would else never hit a nodule of 6 px beside its centre. The border beyond the outermost
    patch centres is extrapolated, not measured, and cannot be pointed at.
    """
    height, width = picture.shape
    top, left = int(height / grid[0] / 2), int(width / grid[1] / 2)
    inner = picture[top : height - top, left : width - left]
    y, x = np.unravel_index(int(inner.argmax()), inner.shape)
    return np.array([left + x + 0.5, top + y + 0.5])


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


def contrast_to_noise(values: Array, mask: Array) -> float:
    """(mean inside - mean outside) / sqrt(var inside + var outside); NaN where one is empty.

    Source:  BioViL (Boecking et al. 2022, section 4.3) takes the absolute value; signed here, so
             that a map which is high everywhere but the finding scores below zero.
    """
    inside, outside = values[mask], values[~mask]
    if inside.size == 0 or outside.size == 0:
        return float("nan")
    noise = float(np.sqrt(inside.var() + outside.var()))
    return float(inside.mean() - outside.mean()) / noise if noise > 0 else 0.0


class PixelPrior:
    """The one pixel that training boxes of a finding cover most often, with and without side.

    What a model scores that never looks at the image: findings live in habitual places, so this,
    not the box's area, is what pointing has to beat.
    """

    def __init__(self, size: tuple[int, int]) -> None:
        self.size = size
        self._cover: dict[tuple[str, str | None], Array] = {}

    def add(self, finding: str, side: str | None, boxes: Array) -> None:
        """One image's boxes; they count for the finding and, if a side is named, for both."""
        mask = box_mask(boxes, self.size)
        for key in {(finding, None), (finding, side)}:
            if key not in self._cover:
                self._cover[key] = np.zeros(self.size, dtype=np.int32)
            self._cover[key] += mask

    def pixel(self, finding: str, side: str | None) -> Array | None:
        cover = self._cover.get((finding, side))
        if cover is None:
            return None
        # the middle of the best region, where several pixels tie
        ys, xs = np.nonzero(cover == cover.max())
        middle = np.argmin((ys - ys.mean()) ** 2 + (xs - xs.mean()) ** 2)
        return np.array([xs[middle] + 0.5, ys[middle] + 0.5])


def evaluate_grounding(
    maps: Array,
    queries: Sequence[Query],
    patient_ids: Sequence[Any] | Array,
    *,
    grid: tuple[int, int],
    size: tuple[int, int],
    prior: PixelPrior | None,
    names: Mapping[str, str],
    bootstrap: int,
    seed: int,
) -> dict[str, Any]:
    """Pointing game per kind of phrase and finding, beside every control.

    Shapes:  maps [phrases, images, P] (phrase_maps); patient_ids [images]
    Returns: {kind: {"findings": [...], "all": {...}, "findings_at_twice_area": int}} with, for
             each row: hit, area (chance), prior, prior_with_side, swapped, over_swapped, cnr
    """
    result: dict[str, Any] = {}
    for kind in KINDS:
        chosen = [q for q in queries if q.kind == kind]
        if not chosen:
            continue
        measured = [_measure(q, maps, grid, size, prior) for q in chosen]
        patients = np.asarray(patient_ids)[[q.image for q in chosen]]
        weights = patient_resamples(patients, bootstrap, seed)
        rows = []
        for finding in dict.fromkeys(q.finding for q in chosen):
            own = np.array([q.finding == finding for q in chosen])
            rows.append(
                {
                    "finding": finding,
                    "name": names.get(finding, finding),
                    **_summary(
                        [m for m, o in zip(measured, own, strict=True) if o], weights[:, own]
                    ),
                }
            )
        rows.sort(key=lambda r: str(r["name"]))
        result[kind] = {
            "findings": rows,
            "all": _summary(measured, weights),
            "findings_at_twice_area": sum(
                r["hit"]["value"] >= 2.0 * r["area"] for r in rows if r["hit"]["value"] is not None
            ),
            "num_findings": len(rows),
        }
    return result


def _measure(
    query: Query,
    maps: Array,
    grid: tuple[int, int],
    size: tuple[int, int],
    prior: PixelPrior | None,
) -> dict[str, float]:
    nan = float("nan")
    mask = box_mask(query.boxes, size)
    shown = upsample(maps[query.phrase, query.image].reshape(grid), *size)
    any_side = prior.pixel(query.finding, None) if prior is not None else None
    one_side = prior.pixel(query.finding, query.side) if prior is not None else None
    swapped = nan
    if query.swapped is not None:
        other = upsample(maps[query.phrase, query.swapped].reshape(grid), *size)
        swapped = float(is_inside(pointed_pixel(other, grid), query.boxes))
    return {
        "hit": float(is_inside(pointed_pixel(shown, grid), query.boxes)),
        "area": float(mask.mean()),
        "prior": nan if any_side is None else float(is_inside(any_side, query.boxes)),
        "prior_with_side": nan if one_side is None else float(is_inside(one_side, query.boxes)),
        "swapped": swapped,
        "cnr": contrast_to_noise(shown, mask),
    }


def _summary(measured: Sequence[Mapping[str, float]], weights: Array) -> dict[str, Any]:
    columns = {key: np.array([m[key] for m in measured]) for key in measured[0]}
    paired = np.isfinite(columns["swapped"])
    cnr = columns["cnr"]
    known = np.isfinite(cnr)

    def mean_or_none(values: Array) -> float | None:
        kept = values[np.isfinite(values)]
        return float(kept.mean()) if len(kept) else None

    return {
        "n": len(measured),
        "hit": mean_estimate(columns["hit"], weights),
        "area": float(columns["area"].mean()),
        "prior": mean_or_none(columns["prior"]),
        "prior_with_side": mean_or_none(columns["prior_with_side"]),
        "swapped": mean_estimate(columns["swapped"][paired], weights[:, paired]),
        "over_swapped": _ratio(
            columns["hit"][paired], columns["swapped"][paired], weights[:, paired]
        ),
        "cnr": mean_estimate(cnr[known], weights[:, known]),
    }


def _ratio(hits: Array, swapped: Array, weights: Array) -> Estimate:
    """Hit rate over the swapped images' hit rate, with its interval."""
    if len(hits) == 0:
        return not_available("no image without the finding to swap in")
    if swapped.sum() == 0:
        return not_available("the swapped images were never hit", len(hits))
    with np.errstate(divide="ignore", invalid="ignore"):
        resampled = weighted_mean(hits, weights) / weighted_mean(swapped, weights)
    return estimate(float(hits.mean() / swapped.mean()), resampled, len(hits))
