"""Writes the CPU tables of docs/data.md and docs/evaluation.md, between their marks, from rows in
benchmarks/results: `python benchmarks/bench_dataloading.py report`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import harness

Row = dict[str, Any]
PAGES: dict[str, tuple[str, ...]] = {
    "docs/data.md": ("input rate", "input start", "input prepare"),
    "docs/evaluation.md": ("large retrieval",),
}
TITLES = {
    "dali": "DALI from shards, whole batches",
    "torch": "torch pipeline from shards, whole batches",
    "dataloader": "torch DataLoader with OpenCV, 256-px files, grey, freed memory kept",
    "dataloader_default": "the same, allocator left as it comes, as most code has it",
    "dataloader_rgb": "the same, three channels as most code has them, freed memory kept",
    "full": "the grey DataLoader on 2500 x 3000 px JPEG",
}


def origin(rows: Sequence[Row]) -> str:
    """Machines, versions, commits and days of rows, or that there are none."""
    if not rows:
        return "Not run."
    of: dict[str, list[Row]] = {}
    for row in rows:  # a table's rows may be of several machines
        setup = f"{row['cpu']}, Python {row['python']}, torch {row['torch']}"
        of.setdefault(setup, []).append(row)
    made = []
    for setup, own in of.items():
        commits = sorted({row["commit"] + (" and changes" * row["modified"]) for row in own})
        days = sorted({row["date"][:10] for row in own})
        made.append(f"{setup}, commit {', '.join(commits)}, {', '.join(days)}")
    return "; ".join(made) + "."


def newest(rows: Sequence[Row], *keys: str) -> list[Row]:
    """Of rows that agree in these columns the last one."""
    return list({str([row[key] for key in keys]): row for row in rows}.values())


def rate_table(rows: Sequence[Row]) -> list[Row]:
    """A line a contestant of the CPU."""
    table = []
    for row in rows:
        rounds = [float(ratio) for ratio in row["rounds_cpu"].split()]
        spread = "" if row["name"] == "dali" else f" ({min(rounds):.2f} to {max(rounds):.2f})"
        table.append(
            {
                "": TITLES[row["name"]],
                "images/s by the clock, median (best)": _median_and_best(row, "wall"),
                "images a processor second": _median_and_best(row, "cpu"),
                "DALI is x times that, by the clock": f"{row['dali_is_x_wall']:.2f}",
                "by processor (least to most)": f"{row['dali_is_x_cpu']:.2f}{spread}",
            }
        )
    return table or [{"": "not run"}]


def _median_and_best(row: Row, kind: str) -> str:
    return f"{row[f'images_per_{kind}_s']:,} ({row[f'best_per_{kind}_s']:,})"


def start_table(rows: Sequence[Row]) -> list[Row]:
    """The start on a million rows, against what is wanted."""
    if not rows:
        return [{"": "not run"}]
    (row,) = rows
    first = row["manifest_and_loader_cpu_s"] + row["first_plan_cpu_s"]
    return [
        {
            "": f"CSV of {row['rows']:,} rows, {row['csv_mb']} MB, to the first plan of rows",
            "measured": f"{first:.1f} processor seconds",
            "wanted": "10",
        },
        {
            "": f"the process at its peak, {row['imports_mib']} MiB of imports among it",
            "measured": f"{row['peak_mib']:,} MiB",
            "wanted": "1,024",
        },
        {
            "": "its vocabulary, once in a run's life",
            "measured": f"{row['vocabulary_cpu_s']:.1f} processor seconds, peak "
            f"{row['peak_with_vocabulary_mib']:,} MiB",
            "wanted": "-",
        },
    ]


def prepare_table(rows: Sequence[Row]) -> list[Row]:
    """A line a kind and size of source, large pictures and DICOM last."""
    table = []
    for row in sorted(rows, key=lambda row: (row["kind"] == "dicom", row["source_px"])):
        height, width = row["source_px"]
        memory = " and ".join(
            " to ".join(str(mib) for mib in pair) for pair in row["rss_mib_first_and_last_third"]
        )
        table.append(
            {
                "sources": f"{row['images']:,} {row['kind'].upper()} of {height} x {width} px",
                "images/s": f"{max(row['images_per_s']['prepare']):,.0f}",
                "share of the limit, by processor": f"{row['share_of_limit_cpu']:.2f}",
                "by the clock": f"{row['share_of_limit']:.2f}",
                "MiB of parent and workers, first to last third of two runs": memory,
            }
        )
    return table or [{"sources": "not run"}]


def retrieval_table(rows: Sequence[Row]) -> list[Row]:
    """Ranks, and the best reports of each image."""
    return [
        {
            "": f"{row['op']}, {row['images']:,} images, {row['texts']:,} reports",
            "processor seconds": f"{row['processor_s']:.0f}",
            "MiB above the embeddings": f"{row['added_mib']:.0f}",
            "all scores at once, MiB": f"{row['all_scores_mib']:,.0f}",
        }
        for row in rows
    ] or [{"": "not run"}]


def write_pages(
    root: Path = harness.ROOT, results: Path = harness.RESULTS, *, check: bool = False
) -> list[Path]:
    """The pages that changed; with `check` nothing is written.

    Raises:  ValueError where a page lacks a mark
    """
    rates = newest(harness.read_rows("dataloading_rate", results), "name")
    shown = {
        "input rate": (rate_table, [row for row in rates if row["name"] in TITLES]),
        "input start": (start_table, harness.read_rows("dataloading_start", results)[-1:]),
        "input prepare": (
            prepare_table,
            newest(harness.read_rows("dataloading_prepare", results), "kind", "source_px"),
        ),
        "large retrieval": (
            retrieval_table,
            newest(harness.read_rows("retrieval", results), "op", "images", "texts"),
        ),
    }
    text = {
        mark: f"{harness.markdown(table(rows))}\n\n{origin(rows)}"
        for mark, (table, rows) in shown.items()
    }
    return harness.write_pages(text, PAGES, root, check=check)
