"""Retrieval and pointing by group.

Oracle: the marks of a group's images alone; resamples by hand.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mlip.transfer.measures.interval import patient_resamples
from mlip.transfer.measures.mark_subgroups import mark_subgroups
from mlip.transfer.measures.predictions import Series, of_marks
from mlip.transfer.measures.subgroups import Grouping

ROWS = np.array([5, 3, 9, *range(20, 77)])  # of 60 images, in no order
PATIENTS = np.arange(60) // 2  # two images each
IS_F = PATIENTS % 2 == 0


def grouping(*names: str, members: Any, stated: np.ndarray | None = None, small: int = 0) -> Any:
    everywhere = np.ones(60, dtype=bool)
    few = {"groups": small, "images": 0, "patients": 0}
    return Grouping("sex", names, np.array(members), everywhere if stated is None else stated, few)


def marks(name: str, places: np.ndarray, values: np.ndarray, head: str = "global") -> Any:
    series: Series = of_marks(head, None, name, "recall@10", ROWS[places], values)
    return name, head, series


def scored(*given: Any, of: Any) -> list[dict[str, Any]]:
    return mark_subgroups(given, [of], ROWS, PATIENTS, bootstrap=60, seed=2)


def test_a_group_s_score_is_that_of_its_own_queries_and_the_difference_is_paired() -> None:
    generator = np.random.default_rng(0)
    order = generator.permutation(60)
    there, back = (generator.random((2, 60)) < [[0.6], [0.3]]).astype(float)
    (table,) = scored(
        marks("image to text", order, there[order]),
        marks("text to image", np.arange(60), back),
        of=grouping("F", "M", members=[IS_F, ~IS_F]),
    )
    first, second = table["groups"]
    assert [first[k] for k in ("name", "images", "patients")] == ["F", 30, 15]
    own = [c["global"]["value"] for c in first["classes"]]
    assert own == pytest.approx([there[IS_F].mean(), back[IS_F].mean()])
    assert first["macro"]["global"]["value"] == pytest.approx(np.mean(own))
    apart = first["classes"][0]["difference"]["global"]
    assert apart["value"] == pytest.approx(there[IS_F].mean() - there[~IS_F].mean())
    assert apart["value"] == pytest.approx(-second["classes"][0]["difference"]["global"]["value"])
    weights = patient_resamples(PATIENTS, 60, 2)
    draws = [
        np.average(there[IS_F], weights=w[IS_F]) - np.average(there[~IS_F], weights=w[~IS_F])
        for w in weights
    ]
    assert apart["low"] < np.quantile(draws, 0.05) and apart["high"] > np.quantile(draws, 0.95)
    assert apart["low"] >= min(draws) and apart["high"] <= max(draws)


def test_what_a_group_was_asked_about_by_few_patients_is_not_told() -> None:
    """Ten patients in all queries show a group, five in a finding's queries its score."""
    ones = np.ones(60)
    few = np.flatnonzero(PATIENTS < 9)  # five of F, four of M
    (table,) = scored(
        marks("a", np.arange(60), ones),
        marks("b", few, ones[few]),
        of=grouping("F", "M", members=[IS_F, ~IS_F]),
    )
    told = [[c["global"]["value"] for c in group["classes"]] for group in table["groups"]]
    assert told == [[1.0, 1.0], [1.0, None]]
    assert [c["n"] for c in table["groups"][0]["classes"]] == [30, 10]
    assert table["groups"][0]["difference"]["global"]["classes"] == 1


def test_a_group_of_few_queries_is_counted_and_not_named() -> None:
    """Of sixty images both groups have fifteen patients; of those asked about M has nine."""
    asked = np.flatnonzero(IS_F | (PATIENTS < 18))
    (table,) = scored(
        marks("a", asked, np.ones(len(asked))), of=grouping("F", "M", members=[IS_F, ~IS_F])
    )
    assert [group["name"] for group in table["groups"]] == ["F"]
    assert table["small_groups"] == {"groups": 1, "images": 18, "patients": 9}
    apart = table["groups"][0]["difference"]["global"]
    assert apart["value"] is None and "fewer than 10 patients in all other rows" in apart["reason"]
    ten = np.flatnonzero(IS_F | (PATIENTS < 20))
    (table,) = scored(
        marks("a", ten, np.ones(len(ten))), of=grouping("F", "M", members=[IS_F, ~IS_F])
    )
    assert [group["patients"] for group in table["groups"]] == [15, 10]
    silent = grouping("F", members=[IS_F], stated=IS_F)
    (table,) = scored(marks("a", asked, np.ones(len(asked))), of=silent)
    assert table["not_stated"] == 18
    assert table["small_groups"] == {"groups": 0, "images": 0, "patients": 0}


def test_a_group_that_nothing_was_asked_about_is_no_small_one() -> None:
    """Beside 20 patients of M and three of a group that was small before, nobody of F."""
    is_m, is_x = PATIENTS < 20, PATIENTS > 26
    is_f = ~is_m & ~is_x
    of = grouping("F", "M", members=[is_f, is_m], small=1)
    for asked, expected in ((is_m | is_x, [1, 6, 3]), (is_m, [0, 0, 0])):
        places = np.flatnonzero(asked)
        (table,) = scored(marks("a", places, np.ones(len(places))), of=of)
        assert [group["name"] for group in table["groups"]] == ["M"]
        assert list(table["small_groups"].values()) == expected
    few = np.flatnonzero(is_m | is_x | (PATIENTS == 22))  # one of F: a small group, as X is
    (table,) = scored(marks("a", few, np.ones(len(few))), of=of)
    assert table["small_groups"] == {"groups": 2, "images": 8, "patients": 4}


def test_without_groups_or_queries_there_is_nothing() -> None:
    one = grouping("F", members=[IS_F])
    assert scored(of=one) == []
    assert (
        mark_subgroups(
            [marks("a", np.arange(3), np.ones(3))], [], ROWS, PATIENTS, bootstrap=5, seed=0
        )
        == []
    )
