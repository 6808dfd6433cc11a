"""Tables of the input path's pages come from rows, and are those of the rows at hand."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import bench_dataloading, bench_prepare, data_report, harness

FACTS = {
    "date": "2026-11-27T10:00:00+00:00",
    "commit": "abc",
    "modified": False,
    "python": "3.11",
    "torch": "2.13",
    "cpu": "a CPU",
}


def _pages(folder: Path) -> Path:
    for name, marks in data_report.PAGES.items():
        page = folder / name
        page.parent.mkdir(parents=True, exist_ok=True)
        text = "".join(f"<!-- {mark}: begin -->\n<!-- {mark}: end -->\n" for mark in marks)
        page.write_text(text, encoding="utf-8")
    return folder


def _rate(name: str, rounds: str, **more: Any) -> dict[str, Any]:
    return {
        "name": name,
        "images_per_wall_s": 9000,
        "best_per_wall_s": 9500,
        "images_per_cpu_s": 6000,
        "best_per_cpu_s": 6500,
        "dali_is_x_wall": 1.5,
        "dali_is_x_cpu": 2.1,
        "rounds_cpu": rounds,
        **FACTS,
        **more,
    }


def test_tables_are_made_of_the_newest_row_of_each_kind(tmp_path: Path) -> None:
    results = tmp_path / "results"
    results.mkdir()
    older = [_rate("dataloader", "9.00", commit="old"), {"name": "dali_gpu", "status": "not run"}]
    newer = [_rate("dali", "1.00 1.00"), _rate("dataloader", "1.90 2.30", modified=True)]
    harness.write_rows("", older, results / "dataloading_rate-1.json")
    harness.write_rows("", newer, results / "dataloading_rate-2.json")
    prepared = {
        "images": 10000,
        "kind": "jpeg",
        "source_px": [500, 600],
        "images_per_s": {"limit": [700.0], "prepare": [600.0, 640.0]},
        "share_of_limit": 0.9,
        "share_of_limit_cpu": 0.85,
        "rss_mib_first_and_last_third": [[300, 310], [305, 312]],
        **FACTS,
    }
    larger = prepared | {"source_px": [1024, 1024], "share_of_limit_cpu": 0.93, "cpu": "another"}
    harness.write_rows("", [larger, prepared], results / "dataloading_prepare-1.json")
    searched = {"op": "ranks", "images": 2000, "texts": 1_000_000, "processor_s": 41.0} | FACTS
    searched |= {"wall_s": 77.0, "added_mib": 30.0, "all_scores_mib": 7629.0}
    harness.write_rows("", [searched], results / "retrieval-1.json")
    begun = {"rows": 1_000_000, "csv_mb": 700, "imports_mib": 250, "vocabulary_cpu_s": 9.0} | FACTS
    begun |= {"peak_mib": 900, "peak_with_vocabulary_mib": 950, "first_plan_cpu_s": 0.5}
    for run, seconds in (("1", 8.0), ("2", 5.0)):
        row = begun | {"manifest_and_loader_cpu_s": seconds}
        harness.write_rows("", [row], results / f"dataloading_start-{run}.json")
    root = _pages(tmp_path / "root")
    assert data_report.write_pages(root, results, check=True) == [
        root / name for name in data_report.PAGES
    ]
    data_report.write_pages(root, results)
    page = (root / "docs/data.md").read_text(encoding="utf-8")
    assert "| 9,000 (9,500) | 6,000 (6,500) | 1.50 | 2.10 (1.90 to 2.30) |" in page
    assert "commit abc, abc and changes, 2026-11-27." in page
    assert "9.00" not in page and "old" not in page
    assert "| 10,000 JPEG of 500 x 600 px | 640 | 0.85 | 0.90 | 300 to 310 and 305 to 312 |" in page
    software = "Python 3.11, torch 2.13, commit abc, 2026-11-27"
    assert f"another, {software}; a CPU, {software}." in page
    assert page.index("500 x 600 px") < page.index("1024 x 1024 px")
    assert "to the first plan of rows | 5.5 processor seconds | 10 |" in page
    assert "250 MiB of imports among it | 900 MiB | 1,024 |" in page
    found = (root / "docs/evaluation.md").read_text(encoding="utf-8")
    assert "| ranks, 2,000 images, 1,000,000 reports | 41 | 30 | 7,629 |" in found
    assert data_report.write_pages(root, results, check=True) == []


def test_without_rows_every_table_says_not_run(tmp_path: Path) -> None:
    root = _pages(tmp_path)
    data_report.write_pages(root, tmp_path)
    page = (root / "docs/data.md").read_text(encoding="utf-8")
    assert page.count("Not run.") == 3 and page.count("not run") == 3


def test_the_pages_are_those_of_the_rows_at_hand() -> None:
    stale = data_report.write_pages(check=True)
    assert stale == [], "run python benchmarks/bench_dataloading.py report"


def test_ratios_say_how_many_times_as_fast_dali_is_round_by_round() -> None:
    """Oracle: rounds of 100, 200 and 100 images a second against 200, 300 and 400 of DALI."""
    theirs = [(100.0, 10.0), (200.0, 10.0), (100.0, 20.0)]
    dali = [(200.0, 30.0), (300.0, 40.0), (400.0, 20.0)]
    row = bench_dataloading.rates_of(theirs, dali)
    assert (row["dali_is_x_wall"], row["rounds_wall"]) == (2.0, "2.00 1.50 4.00")
    assert (row["dali_is_x_cpu"], row["rounds_cpu"]) == (3.0, "3.00 4.00 1.00")
    assert (row["images_per_wall_s"], row["best_per_wall_s"]) == (100, 200)


def test_the_share_of_the_limit_is_of_the_best_rounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: 10 files in 5 and 4 s, in 8 and 10 s of processor, beside limits of 5 and 2 a s."""
    clock, processor = iter([0.0, 5.0, 5.0, 9.0]), iter([0.0, 8.0, 8.0, 18.0])
    limits = iter([(4.0, 2.0), (5.0, 1.0)])
    memory = SimpleNamespace(stop=lambda: (300.0, 310.0))
    for name, made in (
        ("make_sources", lambda *_: [None] * 10),
        ("limit", lambda *_: next(limits)),
        ("build_shards", lambda *_: SimpleNamespace(images=10)),
        ("Memory", lambda: memory),
        ("cpu_seconds", lambda: next(processor)),
        ("time", SimpleNamespace(monotonic=lambda: next(clock))),
    ):
        monkeypatch.setattr(bench_prepare, name, made)
    options: Any = SimpleNamespace(images=10, kind="jpeg", height=5, width=6, workers=2, repeats=2)
    row = bench_prepare.measure(options, tmp_path)
    assert row["images_per_s"] == {"limit": [4.0, 5.0], "prepare": [2.0, 2.5]}
    assert (row["share_of_limit"], row["share_of_limit_cpu"]) == (0.5, 0.625)
