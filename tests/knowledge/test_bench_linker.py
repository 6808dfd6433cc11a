"""Figures of the linker's benchmark from mentions and rows that are given by hand."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks import linker_read, linker_speed
from benchmarks.bench_linker import only_unseen
from benchmarks.intervals import share, with_interval
from benchmarks.linker_reports import REPORTS, Finding, Report, read_reports
from mlip.knowledge.linker import Mention, default_linker


def test_an_interval_holds_95_of_a_hundred_draws() -> None:
    """Oracle: the normal law, 1.96 standard errors of a share of a half of 400 to each side."""
    rows = np.stack([np.arange(400) % 2, np.ones(400, int)], axis=1)
    made = with_interval(rows, share)
    assert made["value"] == 0.5
    assert made["high"] - made["low"] == pytest.approx(2 * 1.96 * 0.025, rel=0.06)


def test_a_finding_named_in_one_sentence_of_the_dev_half_is_not_unseen() -> None:
    report = Report("1", "Small nodule. Left effusion. Nodule again.", ())
    nodule, effusion, absent = (
        Finding(name, True, (), frozenset({name})) for name in ("nodule", "effusion", "edema")
    )
    mentions = [
        Mention("nodule", 6, 12, "present"),
        Mention("effusion", 19, 27, "present"),
        Mention("nodule", 29, 35, "present"),
    ]
    found = only_unseen(report, mentions, [nodule, effusion, absent], {"small nodule"})
    assert found == [False, True, True]


def test_the_speed_is_of_the_median_of_the_repeats_and_the_best_of_the_fastest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Oracle: twelve reports in 2, 9 and 4 s."""
    looks = iter([0.0, 2.0, 2.0, 11.0, 11.0, 15.0])
    monkeypatch.setattr(linker_speed, "SPEED_PARTS", 1)
    monkeypatch.setattr(linker_speed, "time", SimpleNamespace(process_time=lambda: next(looks)))
    linker: Any = SimpleNamespace(link=lambda text: [])
    made = linker_speed.speed([Report("1", "Clear.", ())] * 12, linker, repeats=3)
    assert made["best_per_s"] == 6 and made["per_s"] == {"value": 3, "low": 3, "high": 3}


def test_reports_read_by_hand_are_those_that_the_seed_draws() -> None:
    """Oracle: the ids of the kept letters; a report is of the half that its id's hash says."""
    labels, letters = linker_read.read_letters()
    assert len(labels) == 14 and {x for row in letters.values() for x in row} == {*"PAU", ""}
    if REPORTS.exists():
        reports = read_reports()
        drawn = [r.id for half in linker_read.DRAWS for r in linker_read.drawn(reports, half)]
        assert sorted(drawn) == sorted(letters)


def test_a_report_without_a_finding_follows_from_its_letters(tmp_path: Path) -> None:
    path = tmp_path / "letters.csv"
    path.write_text("id,Edema,Support Devices\na,A,P\nb,U,\nc,P,\nd,,\n", "utf-8")
    _, letters = linker_read.read_letters(path)
    assert [letters[name][-1] for name in "abcd"] == ["P", "A", "A", "P"]


def test_what_is_denied_is_scored_apart_from_what_is_stated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Oracle: two reports by hand; one denial of two is found, and the statement is."""
    monkeypatch.setattr(linker_read, "DRAWS", {"dev": (2, 1)})
    letters = {"2": ("P", "A", "A"), "3": ("", "A", "P")}
    monkeypatch.setattr(
        linker_read, "read_letters", lambda: (("Edema", "Pneumothorax", "No Finding"), letters)
    )
    texts = {"2": "Edema without pneumothorax.", "3": "Clear."}
    reports = [Report(name, text, ()) for name, text in texts.items()]
    assert not any(report.is_test for report in reports)
    scores = linker_read.read_scores(reports, default_linker())["dev"]
    assert scores["all"]["absent"]["recall"]["value"] == 0.5
    assert scores["all"]["absent"]["precision"]["value"] == 1
    assert scores["all"]["present"]["recall"]["value"] == 1
    assert scores["labels"]["No Finding"]["present"]["right"] == 1
