"""mAP on hand-made images; oracles: the COCO tool itself and arithmetic."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import numpy as np
import pytest
import torch

from mlip.dataloading.manifest import load_manifest
from mlip.settings.config import load
from mlip.transfer.fits.boxes import box_iou, keep_best
from mlip.transfer.fits.detection import Detection
from mlip.transfer.frames import Images, frame_of
from mlip.transfer.measures import average_precision
from mlip.transfer.measures.average_precision import (
    RECALL_POINTS,
    Found,
    Matches,
    Truth,
    average_precisions,
    detection_measures,
    detection_scores,
    divided,
    joined,
    match,
    match_fits,
    mean_average_precision,
    run_coco,
)
from mlip.transfer.measures.interval import patient_resamples
from mlip.transfer.measures.subgroups import Grouping, subgroup_scores
from mlip.transfer.truth.annotations import Annotations
from tests.small_run import small_run

IOUS = (0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75)
A, B = [10.0, 10, 30, 30], [50.0, 50, 90, 90]


def truth(*boxes: list[float], labels: list[int] | None = None) -> Truth:
    return Truth(np.array(boxes).reshape(-1, 4), np.array(labels or [0] * len(boxes), dtype=int))


def found(*boxes: tuple[list[float], float], labels: list[int] | None = None) -> Found:
    return Found(
        np.array([b for b, _ in boxes]).reshape(-1, 4),
        np.array([s for _, s in boxes], dtype=float),
        np.array(labels or [0] * len(boxes), dtype=int),
    )


def strict(truths: list[Truth], predictions: list[Found]) -> dict:
    weights = np.ones((3, len(truths)))
    return detection_scores(
        *(truths, [predictions], match_fits(truths, [predictions], IOUS, 1, 0.001), weights),
        thresholds=IOUS,
        classes=["object"],
        compat_score_cut=0.5,
    )


@pytest.mark.parametrize(
    ("truths", "predictions", "expected"),
    [
        ([truth(A), truth(B)], [found((A, 0.9)), found((B, 0.8))], 1.0),
        ([truth(A)], [found(([60.0, 60, 80, 80], 0.9))], 0.0),
        ([truth(A), truth(B)], [found(), found()], 0.0),
        # the box nobody predicted is missed: recall stops at one half, 51 of 101 points
        ([truth(A), truth(B)], [found((A, 0.9)), found()], 51 / 101),
        # a surer box on an image without truth halves the precision at every recall
        ([truth(A), truth()], [found((A, 0.5)), found((B, 0.9))], 0.5),
        # an equal score on a later image comes after: no harm
        ([truth(A), truth()], [found((A, 0.9)), found((B, 0.9))], 1.0),
        # down to a score of 0.001
        ([truth(A), truth(B)], [found((A, 0.002)), found((B, 0.0005))], 51 / 101),
    ],
    ids=["perfect", "all wrong", "none predicted", "one missed", "false on empty", "tie", "unsure"],
)
def test_the_strict_form_counts_every_image(
    truths: list[Truth], predictions: list[Found], expected: float
) -> None:
    scores = strict(truths, predictions)
    assert scores["strict"]["value"] == pytest.approx(expected)
    assert scores["strict"]["n"] == len(truths)


def test_the_published_form_leaves_missed_and_empty_images_out_and_says_so() -> None:
    truths = [truth(A), truth(B), truth()]
    predictions = [found((A, 0.9)), found((B, 0.4)), found((B, 0.95))]
    scores = strict(truths, predictions)
    assert scores["compat"]["value"] == pytest.approx(1.0)
    assert scores["compat_images"] == [1] and scores["compat"]["n"] == 1
    assert scores["strict"]["value"] < 0.7


def test_without_any_true_box_there_is_no_score() -> None:
    scores = strict([truth(), truth()], [found((A, 0.9)), found()])
    for form in ("strict", "compat"):
        assert scores[form]["value"] is None and scores[form]["reason"]


def _random_images(count: int) -> tuple[list[Truth], list[Found]]:
    rng = np.random.default_rng(3)
    truths, predictions = [], []
    for _ in range(count):
        boxes = rng.uniform(0, 60, (rng.integers(0, 4), 2))
        corners = np.concatenate([boxes, boxes + rng.uniform(10, 30, boxes.shape)], axis=1)
        labels = rng.integers(0, 2, len(corners))
        moved = corners + rng.normal(0, 3, corners.shape)
        extra = np.array([[5.0, 5, 20, 25]]).repeat(rng.integers(0, 3), axis=0)
        shown = np.concatenate([moved, extra])
        named = np.concatenate([labels, np.zeros(len(extra), int)])
        truths.append(Truth(corners, labels))
        predictions.append(Found(shown, rng.integers(1, 9, len(shown)) / 9.0, named))
    return truths, predictions


def test_our_sums_equal_the_coco_tools_own_on_random_boxes_with_ties() -> None:
    truths, predictions = _random_images(40)
    ours = match(truths, predictions, IOUS, 2)
    tool = run_coco(truths, predictions, IOUS, 2)
    with contextlib.redirect_stdout(io.StringIO()):
        tool.accumulate()
    precision = tool.eval["precision"][:, :, :, 0, 0]  # [T, R, K]
    expected = precision.mean(axis=(0, 1))
    one = np.ones((1, 40))
    for k in range(2):
        assert average_precisions(ours[k], one).mean() == pytest.approx(expected[k], abs=1e-9)
    assert mean_average_precision(ours, one)[0] == pytest.approx(expected.mean(), abs=1e-9)


def _every_precision(matches: Matches, weight: np.ndarray, t: int) -> float:
    """COCOeval.accumulate as it stands: precision and recall at every prediction."""
    weights, hit = weight[matches.image].astype(float), matches.is_hit[t]
    right, wrong = np.cumsum(weights * hit), np.cumsum(weights * ~hit)
    positives = float(weight @ matches.positives)
    if positives == 0:
        return float("nan")
    precision = right / (right + wrong + np.spacing(1))
    for i in range(len(precision) - 1, 0, -1):
        precision[i - 1] = max(precision[i - 1], precision[i])
    at = np.searchsorted(right / positives, RECALL_POINTS, side="left")
    return float(np.array([precision[i] for i in at if i < len(precision)]).sum() / 101)


def test_precision_at_hits_alone_is_that_of_every_prediction_to_the_last_bit() -> None:
    """Weights of 0 take an image's boxes and hits out, and all of a class's at the end."""
    truths, predictions = _random_images(40)
    rng = np.random.default_rng(1)
    weights = np.concatenate([rng.integers(0, 4, (30, 40)), np.zeros((1, 40), np.int64)])
    weights[0] = np.arange(40) == 0  # of one image
    nothing = [Found(f.corners[:0], f.scores[:0], f.labels[:0]) for f in predictions]
    far = [Found(f.corners + 500.0, f.scores, f.labels) for f in predictions]
    for given in (predictions, nothing, far):
        for matches in match(truths, given, IOUS, 2):
            ours = average_precisions(matches, weights)
            slow = [[_every_precision(matches, w, t) for t in range(len(IOUS))] for w in weights]
            np.testing.assert_array_equal(ours, np.array(slow))
            assert np.isnan(ours[-1]).all() and np.isfinite(ours[1:-1]).all()


def test_a_fit_is_matched_once_however_many_scores_and_groups_take_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The matching of 3,000 test images is most of a score; the published form has its own."""
    asked: list[int] = []
    plain = average_precision.run_coco

    def counted(truth: list[Truth], *given: Any) -> Any:
        asked.append(len(truth))
        return plain(truth, *given)

    monkeypatch.setattr(average_precision, "run_coco", counted)
    run = small_run()
    task = ("transfer.task=detection", "transfer.image_px=64", "evaluate.bootstrap=20")
    config = load([], [*run.settings, *task])
    manifest = load_manifest(config.data)
    images = Images(config, manifest, frame_of(config))
    made = Annotations(config, manifest)
    detection = Detection(config, manifest, made, images, torch.device("cpu"))
    test = manifest.rows("test", with_report=False)
    fits = [[found((A, 0.3)) for _ in test], [found((B, 0.4)) for _ in test]]
    inside = np.arange(len(test)) < len(test) // 2
    halves = Grouping("half", ("x", "y"), np.stack([inside, ~inside]), inside | True, {})
    patients = manifest.patient_key[test]
    weights = patient_resamples(patients, 20, 1)
    _, measure = detection.score([joined(fit) for fit in fits], test, test, weights)
    (found_by,) = subgroup_scores([halves], patients, measure)
    assert [group["name"] for group in found_by["groups"]] == ["x", "y"]
    assert asked == [len(test)] * 2


def test_joined_boxes_are_divided_again_into_those_of_each_image() -> None:
    nothing = found()
    images = [nothing, found((A, 0.3), (B, 0.2), labels=[1, 0]), nothing, found((B, 0.9)), nothing]
    for one, again in zip(images, divided(joined(images)), strict=True):
        for name in ("corners", "scores", "labels"):
            ours, wanted = getattr(again, name), getattr(one, name)
            assert ours.shape == wanted.shape and ours.tolist() == wanted.tolist()


def test_weights_of_images_equal_repeating_them() -> None:
    truths, predictions = _random_images(12)
    weights = np.array([[2, 0, 1, 3, 0, 1, 1, 0, 2, 1, 1, 0]])
    ours = mean_average_precision(match(truths, predictions, IOUS, 2), weights)[0]
    again = np.repeat(np.arange(12), weights[0])
    repeated = match([truths[i] for i in again], [predictions[i] for i in again], IOUS, 2)
    expected = mean_average_precision(repeated, np.ones((1, len(again))))[0]
    assert ours == pytest.approx(expected, abs=1e-9)


def test_a_group_is_scored_on_the_classes_that_enough_of_its_patients_have() -> None:
    pairs = [pair for pair in zip(*_random_images(80), strict=True) if len(pair[0].labels)][:40]
    truths, predictions = map(list, zip(*pairs, strict=True))
    rng = np.random.default_rng(0)
    weights, inside = rng.integers(0, 3, (20, 40)), np.arange(40) < 20
    for i in (*range(5), *range(20, 35)):  # both classes; in the first half the second is rare
        truths[i].labels[:1], predictions[i].labels[:1] = 1, 1
    for i in range(5, 20):
        truths[i].labels[:] = 0
    fits = [predictions, [found.over(0.5) for found in predictions]]
    matched = match_fits(truths, fits, IOUS, 2, 0.3)
    measure = detection_measures(
        truths, matched, weights, np.arange(40).clip(1), classes=["a", "b"]
    )
    half, rest = measure(inside), measure(~inside)
    with_b = sum((t.labels == 1).any() for t in truths[:20])
    assert with_b == 5 and half.counts["b"] == (20, 5) and half.classes["b"] == {}
    assert rest.classes.keys() == {"a", "b"} and "strict" in rest.classes["b"]
    value, resampled, n, units, *_ = half.classes["a"]["strict"]
    assert units == sum((t.labels == 0).any() for t in truths[:20])
    places = np.flatnonzero(inside)
    expected = [
        average_precisions(
            match([truths[i] for i in places], [fit[i].over(0.3) for i in places], IOUS, 2)[0],
            np.concatenate([np.ones((1, 20)), weights[:, inside]]),
        ).mean(axis=1)
        for fit in fits
    ]
    assert n == 20 and value == pytest.approx(np.mean(expected, axis=0)[0])
    assert resampled == pytest.approx(np.mean(expected, axis=0)[1:])
    # the difference of means is over what both sides have: the first class alone
    halves = Grouping("half", ("x",), inside[None], np.ones(40, bool), {})
    (table,) = subgroup_scores([halves], np.arange(40), measure)
    difference = table["groups"][0]["difference"]["strict"]
    assert difference["value"] == pytest.approx(value - rest.classes["a"]["strict"][0])
    assert (difference["classes"], difference["classes_asked"]) == (1, 2)


def test_nan_scores_are_an_error() -> None:
    with pytest.raises(ValueError, match="NaN"):
        match([truth(A)], [found((A, float("nan")))], IOUS, 1)


def test_overlap_and_suppression_by_hand() -> None:
    a = torch.tensor([[0.0, 0, 10, 10], [0, 0, 0, 0]])
    b = torch.tensor([[5.0, 0, 15, 10], [20, 20, 30, 30], [0, 0, 10, 10]])
    torch.testing.assert_close(box_iou(a, b), torch.tensor([[1 / 3, 0.0, 1.0], [0.0, 0, 0]]))
    boxes = torch.tensor([[0.0, 0, 10, 10], [1, 0, 11, 10], [50, 50, 60, 60], [0, 0, 10, 10]])
    scores, labels = torch.tensor([0.8, 0.9, 0.1, 0.7]), torch.tensor([0, 0, 0, 1])
    assert keep_best(boxes, scores, labels, 0.5, 100).tolist() == [1, 3, 2]
    assert keep_best(boxes, scores, labels, 0.5, 2).tolist() == [1, 3]
    assert keep_best(boxes[:0], scores[:0], labels[:0], 0.5, 100).tolist() == []


def test_suppression_in_blocks_is_the_greedy_one() -> None:
    """Oracle: one box after the other against all that were kept; ties and labels included."""
    made = torch.Generator().manual_seed(0)
    centre = torch.rand(500, 2, generator=made) * 60
    size = torch.rand(500, 2, generator=made) * 30
    boxes = torch.cat([centre - size / 2, centre + size / 2], dim=1)
    scores = (torch.rand(500, generator=made) * 40).round() / 40
    labels = torch.randint(0, 2, (500,), generator=made)
    overlaps = (box_iou(boxes, boxes) > 0.4) & (labels[:, None] == labels[None, :])
    kept: list[int] = []
    for i in torch.argsort(scores, descending=True, stable=True).tolist():
        if not overlaps[i, kept].any():
            kept.append(i)
    assert len(kept) > 100
    for most in (1, 60, len(kept) - 1, 500):
        assert keep_best(boxes, scores, labels, 0.4, most).tolist() == kept[:most]


def test_a_score_equal_to_the_cut_counts() -> None:
    found = Found(np.zeros((3, 4)), np.array([0.4, 0.5, 0.6]), np.array([0, 1, 2]))
    assert found.over(0.5).labels.tolist() == [1, 2]
