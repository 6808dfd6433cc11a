"""The demo's tables: each figure under its own name, and differences paired by seed.

Oracle: figures chosen by hand; Student's t of two degrees of freedom is 4.303 at 97.5 %.
"""

from __future__ import annotations

from typing import Any

from benchmarks import bench_demo


def _result(seed: int, value: float, *, none: bool = False) -> dict[str, Any]:
    """Local scores and image to text are `value`, all others half of it."""

    def heads(at: dict[str, Any]) -> dict[str, Any]:
        return at | {"global": at["combined"]}

    def of(number: float) -> dict[str, Any]:
        return {"value": number}

    macro = heads({"local": of(value), "combined": of(value / 2)})
    ways = {"image_to_text": {"recall@10": of(value)}, "text_to_image": {"recall@10": of(0.5)}}
    keyword = {"hit": of(None if none else value), "over_swapped": of(1.0)}
    keyword |= {"area": 0.25, "prior_with_side": 0.5}
    part = {"all": keyword, "findings_at_twice_area": 3}
    return {
        "run": {"seed": seed, "pairs_seen": 12_000},
        "zero_shot": {"macro": macro, "worst": macro},
        "retrieval": {"scores": heads({"local": ways, "combined": ways})},
        "grounding": {"keyword": part, "sentence": part},
    }


def test_every_figure_stands_under_its_name() -> None:
    shown = bench_demo.measures(_result(1, 0.8))
    assert shown["zero-shot macro-AUROC, local score"] == 0.8
    assert shown["zero-shot macro-AUROC, global head"] == 0.4
    assert shown["recall@10 of 256, image to text, local"] == 0.8
    assert shown["recall@10 of 256, text to image, local"] == 0.5
    assert shown["pointing, keyword: hit rate"] == 0.8
    assert shown["pointing, keyword: area chance"] == 0.25
    text = bench_demo.table({"mlip": [_result(1, 0.8), _result(2, 0.9)], "clip": []})
    assert "mlip, mean of seeds 1, 2 (least to most)" in text and "clip" not in text
    assert "| zero-shot macro-AUROC, local score | 0.850 (0.800 to 0.900) |" in text
    assert "| pairs seen | 12000 (12000 to 12000) |" in text


def test_differences_are_paired_by_seed_with_student_s_interval() -> None:
    ours = [_result(seed, value) for seed, value in ((1, 0.7), (2, 0.8), (3, 0.9))]
    theirs = [
        _result(seed, value, none=seed == 3) for seed, value in ((3, 0.6), (1, 0.6), (2, 0.6))
    ]
    text = bench_demo.differences({"mlip": ours, "clip": theirs})
    assert "mlip minus clip, 3 seeds" in text
    assert "| zero-shot macro-AUROC, local score | +0.200 (-0.048 to +0.448) |" in text
    assert "hit rate" not in text and "pairs seen" not in text
    assert bench_demo.differences({"mlip": ours, "clip": theirs[:1]}) == ""
