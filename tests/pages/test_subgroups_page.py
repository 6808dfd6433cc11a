"""The tables of scores by group: what is shown of each, and which differences are counted."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from mlip.pages.page import render_page
from mlip.pages.run_page import render
from mlip.pages.subgroups import subgroup_context
from mlip.pages.tables import retrieval_context
from tests.small_run import small_results

TITLES = {"auroc": "AUROC", "sensitivity": "Sensitivity", "strict": "mAP"}


def _told(value: float | None, low: float | None = None, high: float | None = None) -> Any:
    reason = "few" if value is None else None
    return {"value": value, "low": low, "high": high, "n": 9, "reason": reason}


def _group(name: str, *apart: Any, classes: int = 3) -> dict[str, Any]:
    """A group whose findings differ from the others' by these."""
    over = {"classes": classes, "classes_asked": 3}
    return {
        "name": name,
        "images": 1200,
        "patients": 11,
        "macro": {"auroc": {**_told(0.8, 0.7, 0.9), **over}},
        "difference": {"auroc": {**_told(0.04, -0.13, 0.21), **over}},
        "classes": [
            {"class": f"lung_{k}", "n": 9, "positives": 5, "difference": {"auroc": each}}
            for k, each in enumerate(apart)
        ],
    }


def _table(*groups: dict[str, Any], small: int = 0, unsaid: int = 0) -> dict[str, Any]:
    few = {"groups": small, "images": 3 * small, "patients": 2 * small}
    return {"column": "sex", "groups": list(groups), "small_groups": few, "not_stated": unsaid}


def _context(*tables: dict[str, Any]) -> dict[str, Any]:
    found = subgroup_context(tables, TITLES, "auroc")
    assert found is not None
    return found


UP, DOWN, SAME = _told(0.1, 0.02, 0.2), _told(-0.3, -0.4, -0.1), _told(0.1, -0.1, 0.3)


def test_without_subgroups_there_is_nothing_to_show() -> None:
    assert subgroup_context([], TITLES, "auroc") is None


def test_differences_of_retrieval_are_of_directions_and_of_the_global_head() -> None:
    group = _group("F", UP)
    for name in ("macro", "difference"):
        group[name] = {head: group[name]["auroc"] for head in ("local", "global")}
    group["classes"][0]["difference"] = {"global": UP, "local": SAME}
    results: Any = {"retrieval": {**small_results()["retrieval"], "subgroups": [_table(group)]}}
    context = retrieval_context(results)
    assert context is not None
    found = context["by_group"]
    assert (found["classes"], found["headline"]) == ("directions", "Recall@10, global head")
    assert (found["compared"], found["apart_count"]) == (1, 1)
    pages = {**small_results(), **results}
    assert "Of 1 differences of single directions 1 have" in render(Path("none"), pages)


def test_differences_are_counted_once_and_named_by_size() -> None:
    edge = _told(0.1, 0.0, 0.2)  # 0 is in it
    given = (UP, DOWN, SAME, edge, _told(-0.1, -0.2, 0.0), _told(None), _told(0.5))
    pair = _table(_group("F", *given), _group("M", *given), unsaid=3)
    found = _context(pair)
    assert (found["compared"], found["apart_count"]) == (5, 2)
    assert found["by_chance"] == pytest.approx(0.25)
    assert [name for name, _ in found["apart"]] == ["lung 1, sex F", "lung 0, sex F"]
    # with a third group that is not shown one difference is not the other's
    assert _context({**pair, "small_groups": _table(small=1)["small_groups"]})["compared"] == 10
    assert _context(_table(_group("F", *given)))["compared"] == 5
    third = _context(_table(*(_group(name, *[DOWN] * 3) for name in "ABC")), pair)
    assert (third["compared"], third["apart_count"], len(third["apart"])) == (14, 11, 8)


def test_the_scale_reaches_past_the_widest_interval_and_no_further_than_one() -> None:
    assert ">-0.3<" in _context(_table(_group("F")))["axis"]
    wide = _group("F")
    wide["difference"]["auroc"] |= {"low": -0.97}
    assert ">-1.0<" in _context(_table(wide))["axis"]
    wide["difference"]["auroc"] |= {"low": None, "high": None}
    assert ">-0.1<" in _context(_table(wide))["axis"]


def _page(*tables: dict[str, Any]) -> str:
    run = {"name": "x", "seeds": [1]}
    template = {"fractions": [], "task": {"name": "classification"}, "splits": {}, "run": run}
    return render_page("transfer.html", {**template, "subgroups": _context(*tables)})


def test_a_mean_over_some_findings_says_over_how_many() -> None:
    page = _page(_table(_group("F", classes=2), _group("<b>"), small=1, unsaid=4))
    rows = re.findall(r"<tr><th scope=\"row\">(F|&lt;b&gt;)</th>.*?</tr>", page, re.DOTALL)
    assert rows == ["F", "&lt;b&gt;"]
    assert page.count("over 2 of 3 classes") == 2 and "over 3 of 3" not in page
    assert "Sensitivity" not in re.findall(r"<thead>.*?</thead>", page)[1]
    assert "1 group of fewer" in page and "(3 images)" in page and "4 images" in page


def test_a_group_without_a_score_has_its_reason() -> None:
    bare = {**_group("F"), "macro": {}, "difference": {}, "classes": []}
    silent = {**_group("M"), "difference": {"auroc": _told(None)}}
    found = _context(_table(bare, silent))
    first, second = found["tables"][0]["rows"]
    assert [score for score, _ in first["scores"]] == [None, {"value": None, "reason": ""}]
    assert second["scores"][1][0]["reason"] == "few" and found["compared"] == 0
    assert first["drawing"].count("<title>no difference") == 1
    assert "<title>auroc" not in first["drawing"]
    assert _page(_table(bare), _table(small=2)).count("<h3>By sex") == 2
