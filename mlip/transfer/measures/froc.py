"""Free-response ROC of boxes: the share of true boxes found at a given number of false alarms.

Beside average precision because readers ask it this way: how many findings does it point out at
one false mark an image? Every image counts, those without a true box too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlip.dataloading.progress import Progress
from mlip.transfer.array import Array
from mlip.transfer.measures.average_precision import Found, Truth
from mlip.transfer.measures.interval import Measured, bounded
from mlip.transfer.measures.means import over_seeds

RATES = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)  # false marks an image, as Object-CXR and LUNA16


@dataclass(frozen=True)
class Marks:
    """Predictions as marks, ready to be counted under any weights of the images.

    Shapes:  score, image, is_hit [D], sorted by falling score; positives [images] true boxes
    """

    score: Array
    image: Array
    is_hit: Array
    positives: Array


def marks_of(truth: Sequence[Truth], found: Sequence[Found]) -> Marks:
    """Each prediction's centre is a mark: inside a true box of its label it hits, else it is false.

    A box is hit once, by its best mark; more marks in it are neither hits nor false.
    Source:  Object-CXR's localisation score, whose predictions are points; ours: a box's centre.
    Raises:  ValueError on a score that is not finite.
    """
    scores: list[float] = []
    images: list[int] = []
    hits: list[bool] = []
    for i, (true, own) in enumerate(zip(truth, found, strict=True)):
        if not np.isfinite(own.scores).all():
            raise ValueError("detection scores hold NaN or infinite values: the head is broken")
        centre = (own.corners[:, :2] + own.corners[:, 2:]) / 2
        inside = (
            (centre[:, None] >= true.corners[None, :, :2]).all(axis=2)
            & (centre[:, None] < true.corners[None, :, 2:]).all(axis=2)
            & (own.labels[:, None] == true.labels[None, :])
        )
        is_free = np.ones(len(true.corners), dtype=bool)
        for p in np.argsort(-own.scores, kind="stable").tolist():
            over = np.flatnonzero(inside[p])
            new = over[is_free[over]]
            if len(over) and not len(new):
                continue
            is_free[new[:1]] = False
            scores.append(float(own.scores[p]))
            images.append(i)
            hits.append(len(new) > 0)
    order = np.argsort(-np.array(scores), kind="stable")
    return Marks(
        np.array(scores)[order],
        np.array(images, dtype=np.int64)[order],
        np.array(hits, dtype=bool)[order],
        np.array([len(t.corners) for t in truth], dtype=np.int64),
    )


def sensitivities(marks: Marks, weights: Array) -> Array:
    """Share of true boxes found at each of RATES, [R, rates]; NaN without a true box.

    The highest share that a threshold reaches without exceeding the rate: equal scores stand or
    fall together, and nothing is read between two thresholds. Marks beyond the highest rate are
    not counted: of a hundred an image they are most.

    Shapes:  weights [R, images] >= 0
    """
    result = np.full((len(weights), len(RATES)), np.nan)
    ends = np.flatnonzero(np.r_[marks.score[1:] != marks.score[:-1], np.ones(len(marks.score[:1]))])
    rates = np.array(RATES) * (1 + 1e-12)
    enough = 2 * int(RATES[-1]) * len(marks.positives)  # thresholds, as a rule; more where not
    for r, weight in enumerate(weights.astype(np.float64)):
        positives, images = float(weight @ marks.positives), float(weight.sum())
        if positives == 0:
            continue
        count = enough
        while True:
            kept = ends[:count]
            first = slice(0, kept[-1] + 1 if len(kept) else 0)
            each, is_hit = weight[marks.image[first]], marks.is_hit[first]
            false = np.cumsum(each * ~is_hit)[kept] / images
            if count >= len(ends) or false[-1] > rates[-1]:
                break
            count *= 2
        hits = np.cumsum(each * is_hit)[kept] / positives
        # both rise: the last threshold within the rate has the highest share
        result[r] = np.r_[0.0, hits][np.searchsorted(false, rates, side="right")]
    return result


def froc_scores(
    truth: Sequence[Truth], by_seed: Sequence[Sequence[Found]], weights: Array
) -> dict[str, Any]:
    """{"mean": over RATES, "rates": {rate: ...}}, each over the seeds' fits with an interval.

    Shapes:  weights [R, images]
    """
    columns: list[list[Measured | None]] = [[] for _ in range(len(RATES) + 1)]
    has_box = np.array([len(t.labels) > 0 for t in truth], dtype=bool)
    told = Progress("fits scored by false marks, with their intervals")
    for done, found in enumerate(by_seed):
        told(done, len(by_seed))
        marks = marks_of(truth, found)
        value = sensitivities(marks, np.ones((1, len(truth))))[0]
        resampled = sensitivities(marks, weights)
        for k, (own, each) in enumerate(
            [(value.mean(), resampled.mean(axis=1)), *zip(value, resampled.T, strict=True)]
        ):
            known = bounded(float(own), each, len(truth), weights[:, has_box])
            columns[k].append(known if np.isfinite(own) else None)
    mean, *rates = (over_seeds(c, "no test image has a true box") for c in columns)
    return {"mean": mean, "rates": {f"{r:g}": s for r, s in zip(RATES, rates, strict=True)}}
