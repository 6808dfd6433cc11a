"""Mean average precision of boxes by the COCO tool, with intervals over patients.

strict  every image counts: a box nobody predicted is missed, a box on an empty image is false
compat  the published form, for comparison only: predictions of score 0.5 and more, and images
        without a prediction or without a true box left out, which as a rule makes it higher

pycocotools does the matching; the sums under resampling are ours and are tested to equal the
tool's own at weight one.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlip.dataloading.progress import Progress
from mlip.transfer.array import Array
from mlip.transfer.measures.interval import Measured, bounded, defined_mean
from mlip.transfer.measures.means import mean_of_fits, over_seeds
from mlip.transfer.measures.subgroups import Measure, Measures, enough

RECALL_POINTS = np.linspace(0.0, 1.0, 101)  # the COCO tool's
MOST_BOXES = 100  # per image, the COCO tool's largest


@dataclass(frozen=True)
class Truth:
    """True boxes of an image: corners [n, 4] in px, labels [n]."""

    corners: Array
    labels: Array


@dataclass(frozen=True)
class Found:
    """Predicted boxes of an image with their scores, any order."""

    corners: Array
    scores: Array
    labels: Array

    def over(self, cut: float) -> Found:
        kept = self.scores >= cut
        return Found(self.corners[kept], self.scores[kept], self.labels[kept])


def joined(found: Sequence[Found]) -> dict[str, Array]:
    """The boxes of all images, one image after the other.

    Shapes:  "corners" [D, 4], "scores", "labels" [D], "boxes" [images]: how many are an image's
    """
    return {
        **{
            name: np.concatenate([getattr(f, name) for f in found])
            for name in ("corners", "scores", "labels")
        },
        "boxes": np.array([len(f.scores) for f in found], dtype=np.int64),
    }


def divided(arrays: Mapping[str, Array]) -> list[Found]:
    """The boxes of each image, as views: what `joined` was given."""
    ends = np.cumsum(arrays["boxes"])[:-1]
    parts = [np.split(arrays[name], ends) for name in ("corners", "scores", "labels")]
    return [Found(*each) for each in zip(*parts, strict=True)]


@dataclass(frozen=True)
class Matches:
    """The COCO tool's matching of one class, ready to be summed under any weights.

    Shapes:  score, image [D] sorted by falling score; is_hit [T, D]; positives [images]
    """

    score: Array
    image: Array
    is_hit: Array
    positives: Array


def match(
    truth: Sequence[Truth], found: Sequence[Found], thresholds: Sequence[float], classes: int
) -> list[Matches]:
    """Matches of each class through pycocotools.

    Raises:  ValueError on a score that is not finite.
    """
    for f in found:
        if not np.isfinite(f.scores).all():
            raise ValueError("detection scores hold NaN or infinite values: the head is broken")
    evaluation = run_coco(truth, found, thresholds, classes)
    images = len(truth)
    result = []
    for k in range(classes):
        scores, hits, image = [], [], []
        positives = np.zeros(images, dtype=np.int64)
        for i in range(images):
            entry = evaluation.evalImgs[k * images + i]
            if entry is None:
                continue
            scores.append(np.asarray(entry["dtScores"], dtype=np.float64))
            hits.append(np.asarray(entry["dtMatches"]) > 0)
            image.append(np.full(len(entry["dtScores"]), i))
            positives[i] = len(entry["gtIds"])
        score = np.concatenate([*scores, np.zeros(0)])
        # the tool's own sort: stable, so equal scores keep the order of the images
        order = np.argsort(-score, kind="mergesort")
        is_hit = np.concatenate([*hits, np.zeros((len(thresholds), 0), dtype=bool)], axis=1)
        where = np.concatenate([*image, np.zeros(0, dtype=np.int64)]).astype(np.int64)
        result.append(Matches(score[order], where[order], is_hit[:, order], positives))
    return result


def match_fits(
    truth: Sequence[Truth],
    by_seed: Sequence[Sequence[Found]],
    thresholds: Sequence[float],
    classes: int,
    score_cut: float,
) -> list[list[Matches]]:
    """The strict matches of each fit: the longest part of a score, so that groups share them.

    Raises:  ValueError on a score that is not finite.
    """
    told, matched = Progress("fits matched"), list[list[Matches]]()
    for found in by_seed:
        told(len(matched), len(by_seed))
        matched.append(match(truth, [f.over(score_cut) for f in found], thresholds, classes))
    return matched


def run_coco(
    truth: Sequence[Truth], found: Sequence[Found], thresholds: Sequence[float], classes: int
) -> Any:
    """A pycocotools COCOeval after evaluate(): one area range, at most 100 boxes an image."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    images = [{"id": i} for i in range(len(truth))]
    categories = [{"id": k} for k in range(classes)]
    with contextlib.redirect_stdout(io.StringIO()):  # the tool prints its progress
        tables = []
        for boxes in (truth, found):
            tool = COCO()
            tool.dataset = {
                "images": images,
                "categories": categories,
                "annotations": _annotations(boxes),
            }
            tool.createIndex()
            tables.append(tool)
        evaluation = COCOeval(tables[0], tables[1], "bbox")
        parameters = evaluation.params
        parameters.iouThrs = np.array(thresholds, dtype=np.float64)
        parameters.areaRng = [[0.0, 1e10]]
        parameters.areaRngLbl = ["all"]
        parameters.maxDets = [MOST_BOXES]
        evaluation.evaluate()
    return evaluation


def _annotations(images: Sequence[Truth | Found]) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = []
    for i, boxes in enumerate(images):
        size = boxes.corners[:, 2:] - boxes.corners[:, :2]
        for b in range(len(boxes.corners)):
            entry = {
                "id": len(entries) + 1,
                "image_id": i,
                "category_id": int(boxes.labels[b]),
                "bbox": [*boxes.corners[b, :2].tolist(), *size[b].tolist()],
                "area": float(size[b].prod()),
                "iscrowd": 0,
            }
            if isinstance(boxes, Found):
                entry["score"] = float(boxes.scores[b])
            entries.append(entry)
    return entries


def average_precisions(matches: Matches, weights: Array) -> Array:
    """AP at each overlap under each row of weights of images, [R, T]; NaN without a true box.

    Precision is asked for at hits alone: it falls from one to the next, and no recall is reached
    between them. Of a hundred predictions an image few are one.

    Source:  COCOeval.accumulate: precision made falling, read at 101 recalls.
    """
    hits_at = [np.flatnonzero(hit) for hit in matches.is_hit]
    result = np.full((len(weights), len(hits_at)), np.nan)
    positives = weights @ matches.positives.astype(np.float64)
    for r in range(len(weights)):
        if positives[r] == 0:
            continue
        weight = weights[r][matches.image].astype(np.float64)
        shown = np.cumsum(weight)
        for t, places in enumerate(hits_at):
            hits = np.cumsum(weight[places])
            precision = hits / (shown[places] + np.spacing(1))
            falling = np.maximum.accumulate(precision[::-1])[::-1]
            at = np.searchsorted(hits / positives[r], RECALL_POINTS, side="left")
            reached = at < len(falling)
            result[r, t] = falling[at[reached]].sum() / len(RECALL_POINTS)
    return result


def mean_average_precision(matches: Sequence[Matches], weights: Array) -> Array:
    """mAP over overlaps and the classes that have a true box, [R]; NaN where none has."""
    return defined_mean(_by_class(matches, weights))


def _by_class(matches: Sequence[Matches], weights: Array) -> Array:
    """AP of each class over the overlaps, [classes, R]."""
    return np.stack([average_precisions(m, weights).mean(axis=1) for m in matches])


def compat_images(truth: Sequence[Truth], found: Sequence[Found], cut: float) -> Array:
    """Indices of the images that the published evaluation counts."""
    return np.array(
        [
            i
            for i, (t, f) in enumerate(zip(truth, found, strict=True))
            if len(t.corners) and (f.scores >= cut).any()
        ],
        dtype=np.int64,
    )


def detection_measures(
    truth: Sequence[Truth],
    by_seed: Sequence[Sequence[Matches]],
    weights: Array,
    patients: Array,
    *,
    classes: Sequence[str],
) -> Measure:
    """What some of the test images score over the seeds' fits, for subgroup_scores: strict AP of
    each class that enough of the patients have boxes of.

    by_seed  match_fits
    Shapes:  weights [R, images], patients [images]
    """
    has_box = [np.array([(t.labels == k).any() for t in truth]) for k in range(len(classes))]

    def measure(inside: Array) -> Measures:
        # an image of weight 0 is in neither count: nothing has to be matched again
        one, under = inside[None].astype(np.float64), weights * inside
        found: dict[str, dict[str, Measured]] = {}
        counts = {}
        for k, name in enumerate(classes):
            with_box = inside & has_box[k]
            counts[name] = (int(inside.sum()), int(with_box.sum()))
            found[name] = {}
            if not enough(patients[with_box]):
                continue
            each: list[Measured] = []
            for own in (matches[k] for matches in by_seed):
                value = float(average_precisions(own, one).mean())
                resampled = average_precisions(own, under).mean(axis=1)
                of = weights[:, with_box]
                each.append(bounded(value, resampled, counts[name][0], of))
            joined = mean_of_fits(each)
            assert joined is not None
            found[name]["strict"] = joined
        return Measures(found, counts)

    return measure


def detection_scores(
    truth: Sequence[Truth],
    by_seed: Sequence[Sequence[Found]],
    strict_by_seed: Sequence[Sequence[Matches]],
    weights: Array,
    *,
    thresholds: Sequence[float],
    classes: Sequence[str],
    compat_score_cut: float,
) -> dict[str, Any]:
    """mAP in both forms over the seeds' fits, and AP of each class in the strict form.

    strict_by_seed  match_fits of by_seed
    Shapes:         weights [R, images]
    Returns: {"strict": ..., "compat": ..., "classes": [{class, boxes, strict}], "images": n, ...}
    """
    strict: list[Measured | None] = []
    per_class: list[list[Measured | None]] = [[] for _ in classes]
    published: list[tuple[int, Measured | None]] = []
    ones = np.ones((1, len(truth)))
    has_box = np.array([len(t.labels) > 0 for t in truth], dtype=bool)
    told_fits = Progress("fits scored, with their intervals")
    for done, (found, matches) in enumerate(zip(by_seed, strict_by_seed, strict=True)):
        told_fits(done, len(by_seed))
        own, each = _by_class(matches, ones)[:, 0], _by_class(matches, weights)
        value = float(defined_mean(own[:, None])[0])
        told = bounded(value, defined_mean(each), len(truth), weights[:, has_box])
        strict.append(told if np.isfinite(value) else None)
        for k in range(len(classes)):
            with_box = np.array([(t.labels == k).any() for t in truth], dtype=bool)
            told = bounded(float(own[k]), each[k], len(truth), weights[:, with_box])
            per_class[k].append(told if np.isfinite(own[k]) else None)
        published.append(
            _published(truth, found, weights, thresholds, len(classes), compat_score_cut)
        )
    boxes = np.concatenate([*(t.labels for t in truth), np.zeros(0)])
    return {
        "strict": {
            **over_seeds(strict, "no test image has a true box"),
            "classes": len(np.unique(boxes)),
            "classes_asked": len(classes),
        },
        "compat": over_seeds(
            [score for _, score in published],
            f"no image has both a true box and one predicted at {compat_score_cut:g}",
        ),
        "compat_images": [images for images, _ in published],
        "classes": [
            {
                "class": name,
                "boxes": int((boxes == k).sum()),
                "strict": over_seeds(per_class[k], "no test image has a true box of the class"),
            }
            for k, name in enumerate(classes)
        ],
        "images": len(truth),
        "images_with_boxes": sum(len(t.corners) > 0 for t in truth),
        "headline": "strict",
    }


def _published(
    truth: Sequence[Truth],
    found: Sequence[Found],
    weights: Array,
    thresholds: Sequence[float],
    classes: int,
    cut: float,
) -> tuple[int, Measured | None]:
    """(how many images the published form counts of a fit, its mAP of them)"""
    kept = compat_images(truth, found, cut)
    if len(kept) == 0:
        return 0, None
    shown = [found[i].over(cut) for i in kept]
    matches = match([truth[i] for i in kept], shown, thresholds, classes)
    value = float(mean_average_precision(matches, np.ones((1, len(kept))))[0])
    of = weights[:, kept]
    return len(kept), bounded(value, mean_average_precision(matches, of), len(kept), of)
