"""The pointing game and its controls, with features made so that the answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from mlip.transfer.alignment import grounding
from mlip.transfer.alignment.grounding import PixelPrior, Query
from mlip.transfer.alignment.patch_maps import Upsampler, pointed_pixel
from mlip.transfer.measures.interval import patient_resamples
from mlip.transfer.truth.finding_masks import Mask

SIZE = (64, 64)


def test_contrast_to_noise_is_the_formula_and_keeps_its_sign() -> None:
    generator = np.random.default_rng(0)
    pictures = generator.standard_normal((2, 8, 8)) + 5.0
    masks = np.zeros((2, 8, 8), dtype=bool)
    masks[:, 2:5, 3:6] = True
    pictures[0][masks[0]] += 2.0
    pictures[1][masks[1]] -= 2.0
    found = grounding.contrast_to_noise(pictures, masks)
    for picture, mask, value in zip(pictures, masks, found, strict=True):
        inside, outside = picture[mask], picture[~mask]
        assert value == pytest.approx(
            (inside.mean() - outside.mean()) / np.sqrt(inside.var() + outside.var())
        )
    assert found[0] > 0 > found[1]


def test_contrast_to_noise_of_a_box_over_everything_is_undefined() -> None:
    assert np.isnan(grounding.contrast_to_noise(np.ones((1, 4, 4)), np.ones((1, 4, 4), bool)))[0]


def test_the_prior_is_the_pixel_most_training_boxes_cover_by_side_and_without() -> None:
    prior = PixelPrior(SIZE)
    left, right = np.array([[40.0, 10, 60, 30]]), np.array([[4.0, 10, 24, 30]])
    for _ in range(3):
        prior.add("effusion", "right", right)
    prior.add("effusion", "left", left)
    assert grounding.is_inside(prior.pixel("effusion", None), right)
    assert grounding.is_inside(prior.pixel("effusion", "left"), left)
    assert prior.pixel("nodule", None) is None


def _queries(boxes: list[np.ndarray], kind: str = "keyword") -> list[Query]:
    count = len(boxes)
    return [Query(i, "nodule", None, kind, 0, box, (i + 1) % count) for i, box in enumerate(boxes)]


def _boxes(count: int) -> list[np.ndarray]:
    generator = np.random.default_rng(5)
    corners = generator.integers(0, 3, (count, 2)) * 16 + 8
    return [np.array([[x, y, x + 16, y + 16]], dtype=float) for x, y in corners]


def evaluate(maps: np.ndarray, queries: list[Query], prior: PixelPrior | None = None) -> dict:
    return grounding.evaluate_grounding(
        maps,
        queries,
        np.arange(maps.shape[1]),
        grid=(8, 8),
        size=SIZE,
        prior=prior,
        names={"nodule": "Nodule"},
        bootstrap=100,
        seed=0,
    )


def test_maps_that_know_the_truth_hit_always_and_beat_every_control() -> None:
    boxes = _boxes(60)
    masks = [grounding.box_mask(b, SIZE).reshape(8, 8, 8, 8).mean(axis=(1, 3)) for b in boxes]
    prior = PixelPrior(SIZE)
    for box in boxes:
        prior.add("nodule", None, box)
    found = evaluate(np.stack(masks).reshape(1, 60, 64), _queries(boxes), prior)["keyword"]
    row = found["all"]
    assert row["hit"]["value"] == 1.0
    assert row["area"] == pytest.approx(1 / 16)
    assert row["prior"] < 0.4 and row["swapped"]["value"] < 0.4
    assert row["over_swapped"]["value"] == pytest.approx(1 / row["swapped"]["value"])
    assert row["cnr"]["value"] > 1
    assert (found["findings_at_twice_area"], found["num_findings"]) == (1, 1)


def test_the_fixed_pixel_by_side_is_that_of_the_phrase_s_side() -> None:
    prior = PixelPrior(SIZE)
    left, right = np.array([[40.0, 10, 60, 30]]), np.array([[4.0, 10, 24, 30]])
    for side, box in (("right", right), ("right", right), ("left", left)):
        prior.add("nodule", side, box)
    queries = [
        Query(i, "nodule", side, "sentence", 0, box, None)
        for i, (side, box) in enumerate([("left", left), ("right", right), ("left", left)])
    ]
    row = evaluate(np.zeros((1, 3, 64)), queries, prior)["sentence"]["all"]
    assert row["prior"] == pytest.approx(1 / 3) and row["prior_with_side"] == 1.0


def test_the_mean_over_findings_counts_a_rare_finding_as_a_frequent_one() -> None:
    """Oracle: nine phrases that hit and one of another finding that does not."""
    values = np.array([1.0] * 9 + [0.0])
    findings = ["nodule"] * 9 + ["mass"]
    weights = np.ones((20, 10))
    weights[0, 9] = 0.0  # a resample without the mass has no mean over both
    found = grounding._mean_of(values, weights, findings)
    # none of nine missed, and one of one: the next of either may be otherwise
    assert (found["value"], found["n"]) == (0.5, 2) and found["low"] < 0.5 < found["high"]
    half = grounding._mean_of(np.where(values == 0, np.nan, values), weights, findings)
    assert (half["value"], half["n"]) == (1.0, 1)
    boxes = _boxes(60)
    masks = [grounding.box_mask(b, SIZE).reshape(8, 8, 8, 8).mean(axis=(1, 3)) for b in boxes]
    row = evaluate(np.stack(masks).reshape(1, 60, 64), _queries(boxes))["keyword"]
    assert row["over_findings"]["cnr"] == {**row["all"]["cnr"], "n": 1}


def test_a_map_that_ignores_the_image_gains_nothing_over_the_swapped_image() -> None:
    heat = np.zeros((1, 60, 64))
    heat[:, :, 27] = 1.0  # one habitual place
    row = evaluate(heat, _queries(_boxes(60)))["keyword"]["all"]
    assert 0.0 < row["hit"]["value"] < 1.0
    assert row["over_swapped"]["value"] == 1.0


def test_without_a_prior_or_a_swapped_image_the_columns_are_not_available() -> None:
    queries = [Query(0, "nodule", None, "keyword", 0, _boxes(1)[0], None)]
    row = evaluate(np.zeros((1, 1, 64)), queries)["keyword"]["all"]
    assert row["prior"] is None and row["swapped"]["value"] is None
    assert row["over_swapped"]["reason"] == "no image without the finding to swap in"


def test_mean_overlap_by_hand() -> None:
    masks = np.zeros((2, 4, 4), dtype=bool)
    masks[:, :2] = True
    pictures = np.zeros((2, 4, 4))
    pictures[0, :2] = 1.0  # exactly the truth at every threshold
    pictures[1, :1] = 0.25  # half of it, at two thresholds of five
    np.testing.assert_allclose(grounding.mean_iou(pictures, masks), [1.0, 2 / 5 * 0.5])


def _mask(pixels: np.ndarray, side: str | None = None) -> Mask:
    return Mask("nodule", side, np.packbits(pixels.reshape(-1)), pixels.shape[0])


def test_masks_are_scored_by_their_pixels_and_boxes_as_before() -> None:
    """By hand: the finding is the left half of its box; a map hot on the box is half right."""
    size, half = (64, 64), np.zeros((64, 64), dtype=bool)
    half[16:48, 16:32] = True
    box = np.array([[16.0, 16, 48, 48]])
    heat = np.zeros((8, 8))
    heat[2:6, 2:6] = 1.0
    maps = heat.reshape(1, 1, 64)
    queries = [Query(0, "nodule", None, "keyword", 0, box, None, (_mask(half),))]
    row = evaluate(np.concatenate([maps, maps], axis=1), queries)["keyword"]["all"]
    pictures = Upsampler((8, 8), size)(maps[0, 0])[None]
    assert row["mask"]["n"] == 1 and row["mask"]["area"] == half.mean()
    assert row["mask"]["miou"]["value"] == pytest.approx(
        grounding.mean_iou(pictures, half[None])[0]
    )
    assert row["mask"]["cnr"]["value"] == pytest.approx(
        grounding.contrast_to_noise(pictures, half[None])[0]
    )
    assert row["mask"]["miou"]["value"] < 0.55 < row["miou"]["value"]
    point = pointed_pixel(pictures, (8, 8))[0]
    assert row["mask"]["hit"]["value"] == float(half[int(point[1]), int(point[0])])


def test_several_masks_of_a_query_are_one_and_queries_without_any_do_not_count() -> None:
    left, right = np.zeros((2, 64, 64), dtype=bool)
    left[8:24, 8:24], right[8:24, 40:56] = True, True
    boxes = _boxes(2)
    queries = [
        Query(0, "nodule", None, "keyword", 0, boxes[0], None, (_mask(left), _mask(right))),
        Query(1, "nodule", None, "keyword", 0, boxes[1], None),
    ]
    heat = np.full((8, 8), -1.0)
    heat[1:3, 1:3], heat[1:3, 5:7] = 0.45, 0.45
    row = evaluate(np.tile(heat.reshape(1, 1, 64), (1, 2, 1)), queries)["keyword"]["all"]
    assert row["n"] == 2 and row["mask"]["n"] == 1
    assert row["mask"]["area"] == pytest.approx(2 * 256 / 4096)
    assert row["mask"]["hit"]["value"] == 1.0 and row["mask"]["cnr"]["value"] > 1
    nothing = evaluate(np.zeros((1, 2, 64)), queries[1:])["keyword"]["all"]
    assert nothing["mask"] is None


def test_a_ratio_over_hardly_a_hit_has_no_interval() -> None:
    """Draws without a swapped hit are of an infinite ratio. Left out, the upper end was that of one
    hit: below a true ratio of 80 in all of 167 draws of 80 queries that told an interval."""
    weights = patient_resamples(np.arange(80), 400, 0)
    for hit_of_swapped in (1, 2):
        swapped = np.arange(80) < hit_of_swapped
        told = grounding._ratio(np.ones(80), swapped.astype(float), weights)
        assert told["value"] == 80 / hit_of_swapped and told["low"] is told["high"] is None
        assert told["reason"] == "the swapped images were hit too rarely to bound it"
    told = grounding._ratio(np.ones(80), (np.arange(80) < 12).astype(float), weights)
    draws = 1 / np.average(np.tile(np.arange(80) < 12, (400, 1)), axis=1, weights=weights)
    assert told["reason"] is None and told["low"] < 80 / 12 < told["high"] <= draws.max()
    # draws in which each swapped image was hit are bounded by the greatest of them
    told = grounding._ratio((np.arange(80) > 0).astype(float), np.ones(80), weights)
    assert told["reason"] is None and told["low"] < 79 / 80 < told["high"] == 1.0


def test_a_ratio_that_all_draws_have_has_no_interval() -> None:
    """ "0.0x (0.0 to 0.0)" of 80 queries is surer than 0 of 80, which may be 4 in 100."""
    weights = patient_resamples(np.arange(80), 400, 0)
    half = (np.arange(80) % 2).astype(float)
    for hits, swapped, value in ((np.zeros(80), half, 0.0), (half, half, 1.0)):
        told = grounding._ratio(hits, swapped, weights)
        assert (told["value"], told["low"], told["high"]) == (value, None, None)
        assert told["reason"] == "all draws of patients have one ratio"
