"""What the pages say of the step on a GPU, computed from rows of bench_step.py.

A cell is a figure, the status of a row that has none, or "not run"; never a number from memory.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks.gpu_rows import NOT_RUN, commit_of, commits, date_of
from benchmarks.step_law import as_text
from benchmarks.step_reading import FEEDS
from benchmarks.step_timing import PARTS
from benchmarks.step_variants import ENGINES, OURS, VARIANTS

Row = dict[str, Any]
Cell = tuple[str, str]  # a figure or why there is none, and the commits it is of
PAIRS = (256, 1024)


def find(rows: list[Row], kinds: tuple[str, ...], **where: Any) -> Row | None:
    """The row of a case: one with a figure first, then the newest, then by the order of kinds."""
    found = [
        row
        for row in rows
        if row.get("kind") in kinds and all(row.get(k) == v for k, v in where.items())
    ]

    def rank(row: Row) -> tuple[bool, str, int]:
        return row["status"] == "ok", date_of(row), -kinds.index(row["kind"])

    return max(found, key=rank, default=None)


def cell(row: Row | None, show: Callable[[Row], str]) -> str:
    """A figure of the row, or why it has none."""
    if row is None:
        return NOT_RUN
    return show(row) if row["status"] == "ok" else str(row["status"])


def _more(row: Row | None, show: Callable[[Row], str]) -> str:
    """A further figure of a row: why there is none is said once a line."""
    return "-" if row is not None and row["status"] != "ok" else cell(row, show)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _step(rows: list[Row], pairs: int) -> Row | None:
    return find(rows, ("batch", "scaling"), pairs=pairs)


def batch_table(rows: list[Row]) -> list[Row]:
    """Every size that was tried, and the two that are always named."""
    tried = [row for row in rows if row.get("kind") == "batch"]
    sizes = sorted({*PAIRS, *(row["pairs"] for row in tried)})
    table = []
    for pairs in sizes:
        cases = [row for row in tried if row["pairs"] == pairs] or [None]
        for row in cases:
            table.append(
                {
                    "pairs": f"{pairs:,}",
                    "micro-batch": "-" if row is None else (row["micro"] or "none"),
                    "pairs/s": cell(row, lambda r: f"{r['pairs_per_s']:,.0f}"),
                    "step, ms": _more(row, lambda r: f"{r['step_ms']:.1f}"),
                    "utilisation": _more(row, lambda r: _percent(r.get("utilisation"))),
                    "with padding": _more(
                        row, lambda r: _percent(r.get("utilisation_with_padding"))
                    ),
                    "of the nominal rate": _more(
                        row, lambda r: _percent(r.get("utilisation_of_nominal"))
                    ),
                    "peak memory, GiB": _more(row, lambda r: f"{r.get('peak_gib', 0):.1f}"),
                    "padding": _more(row, lambda r: _percent(r["padding_share"])),
                    "commit": commits(row),
                }
            )
    return table


def with_parts(rows: list[Row]) -> list[Row]:
    """Rows that hold the time of each part, smaller batches first."""
    made = [row for row in rows if row.get("kind") == "parts" and row["status"] == "ok"]
    return sorted(made, key=lambda row: row["pairs"])


def _part_ms(part: str, row: Row) -> str:
    return f"{row['parts_ms'][part]:.2f}"


def parts_table(rows: list[Row]) -> list[Row]:
    """Milliseconds of each part, a column a batch, and the commit of each column."""
    table: list[Row] = [{"part": part} for part in (*PARTS, "commit")]
    for pairs in PAIRS:
        row = find(rows, ("parts",), pairs=pairs)
        for say, line in zip((cell, *[_more] * len(PARTS)), table[:-1], strict=False):
            line[f"{pairs:,} pairs, ms"] = say(row, partial(_part_ms, line["part"]))
        table[-1][f"{pairs:,} pairs, ms"] = commits(row)
    return table


def variant_table(rows: list[Row], history: list[Row]) -> list[Row]:
    """Each way of computing the step, and how many times longer it takes than ours.

    history: of the same card, earlier rows of the same cases too
    """
    table = []
    made = [row for row in rows if row.get("kind") == "variant"]
    for name in (*VARIANTS, *ENGINES):
        tried = sorted((r for r in made if r["variant"] == name), key=lambda r: r["pairs"])
        for row in tried or [None]:
            table.append(_variant_line(history, name, row))
    return table


def _ours_for(rows: list[Row], row: Row) -> Row | None:
    """Our own step to hold `row` against: of the same commit, or the newest that was there before.

    A later one would make a way that was not run again look slow by what has become fast since.
    """
    kinds = ("variant", "batch", "scaling")
    same = [r for r in rows if commit_of(r) == commit_of(row)]
    before = [r for r in rows if date_of(r) <= date_of(row)]
    where = {"variant": OURS, "pairs": row["pairs"], "micro": row["micro"], "status": "ok"}
    return find(same, kinds, **where) or find(before, kinds, **where)


def _variant_line(rows: list[Row], name: str, row: Row | None) -> Row:
    ours = None if row is None else _ours_for(rows, row)

    def times_ours(row: Row) -> str:
        return f"{row['step_ms'] / ours['step_ms']:.2f}" if ours else NOT_RUN

    return {
        "way": name,
        "pairs": "-" if row is None else f"{row['pairs']:,}",
        "step, ms": cell(row, lambda r: f"{r['step_ms']:.1f}"),
        "times ours": _more(row, times_ours),
        "peak memory, GiB": _more(row, lambda r: f"{r.get('peak_gib', 0):.1f}"),
        "graph breaks": _more(row, lambda r: str(r.get("graph_breaks", "-"))),
        "commit": commits(row, ours if row is not None and row["status"] == "ok" else None),
    }


def reading_table(rows: list[Row]) -> list[Row]:
    """The step fed by the loader, and how many times longer it takes than on held batches."""
    table = []
    for name in FEEDS:
        row = find(rows, ("reading",), variant=name)
        table.append(
            {
                "images from": name,
                "pairs": "-" if row is None else row["pairs"],
                "pairs/s": cell(row, lambda r: f"{r['pairs_per_s']:,.0f}"),
                "step, ms": _more(row, lambda r: f"{r['step_ms']:.1f}"),
                "on held batches, ms": _more(row, lambda r: f"{r['held_step_ms']:.1f}"),
                "times held": _more(row, lambda r: f"{r['step_ms'] / r['held_step_ms']:.2f}"),
                "host waits, ms": _more(row, lambda r: f"{r['wait_ms']:.2f}"),
                "threads": _more(row, lambda r: str(r["workers"])),
                "commit": commits(row),
            }
        )
    return table


def scaling_table(rows: list[Row]) -> list[Row]:
    made = sorted(
        (row for row in rows if row.get("kind") == "scaling"),
        key=lambda row: (row["pairs"], row["micro"]),
    )
    return [
        {
            "pairs": f"{row['pairs']:,}",
            "micro-batch": row["micro"] or "none",
            "time a pair, ms": cell(row, lambda r: f"{r['step_ms'] / r['pairs']:.3f}"),
            "pairs/s": _more(row, lambda r: f"{r['pairs_per_s']:,.0f}"),
            "peak memory, GiB": _more(row, lambda r: f"{r.get('peak_gib', 0):.1f}"),
            "commit": commits(row),
        }
        for row in made
    ] or [{"pairs": "64 to 8,192", "micro-batch": "-", "time a pair, ms": NOT_RUN}]


def law_lines(rows: list[Row]) -> list[str]:
    names = {"step_ms": "time", "peak_gib": "memory"}
    return [
        f"{names[row['of']]}, {'gradient cache' if row['is_cached'] else 'plain'}, "
        f"{row['sizes'][0]} to {row['sizes'][-1]} pairs: {as_text(row)} ({commits(row)})"
        for row in rows
        if row.get("kind") == "law"
    ]


def profile_table(rows: list[Row], history: list[Row]) -> list[Row]:
    """What takes longest, beside a step of the same commit."""
    row = find(rows, ("profile",))
    if row is None or row["status"] != "ok":
        return [{"kernel": cell(row, str), "calls a step": "-", "ms a step": "-", "share": "-"}]
    step = _step([r for r in history if commit_of(r) == commit_of(row)], row["pairs"])
    is_known = step is not None and step["status"] == "ok"
    busy = f"{_percent(row['device_ms'] / step['step_ms'])} of a step" if is_known else NOT_RUN
    whole = {
        "kernel": f"all, commit {commits(row)}",
        "calls a step": "-",
        "ms a step": f"{row['device_ms']:.2f}",
    }
    return [whole | {"share": busy}] + [
        {
            "kernel": f"`{line['kernel'][:70].replace('|', ' ')}`",
            "calls a step": f"{line['calls']:.0f}",
            "ms a step": f"{line['ms']:.2f}",
            "share": _percent(line["share"]),
        }
        for line in row["profile"]
    ]


def _largest(rows: list[Row]) -> Cell:
    fitted = [
        row
        for row in rows
        if row.get("kind") in ("batch", "scaling") and row["status"] == "ok" and row["micro"] == 0
    ]
    row = max(fitted, key=lambda row: row["pairs"], default=None)
    return (NOT_RUN if row is None else f"{row['pairs']:,}"), commits(row)


def _step_rate(rows: list[Row], pairs: int) -> Cell:
    row = _step(rows, pairs)

    def rate(row: Row) -> str:
        cached = f" (gradient cache, {row['micro']} at a time)" if row["micro"] else ""
        return f"{row['pairs_per_s']:,.0f}{cached}"

    return cell(row, rate), commits(row)


def _utilisation(rows: list[Row]) -> Cell:
    row = _step(rows, PAIRS[0])
    return cell(row, lambda r: _percent(r.get("utilisation"))), commits(row)


def _fed(rows: list[Row]) -> Cell:
    row = find(rows, ("reading",), variant=next(iter(FEEDS)), pairs=PAIRS[0])

    def rate(row: Row) -> str:
        return f"{row['pairs_per_s']:,.0f} ({row['step_ms'] / row['held_step_ms']:.2f}x held)"

    return cell(row, rate), commits(row)


def _gain(rows: list[Row], history: list[Row], name: str) -> Cell:
    line = _variant_line(history, name, find(rows, ("variant",), variant=name))
    value = str(line["times ours"])
    return f"{value}x" if value[0].isdigit() else str(line["step, ms"]), line["commit"]


MEASURES: tuple[tuple[str, str, Callable[[list[Row], list[Row]], Cell]], ...] = (
    ("whole step, pairs/s, B = 256", "1,500 (aim 2,500)", lambda rows, _: _step_rate(rows, 256)),
    ("whole step, utilisation, B = 256", "35 % (aim 50 %)", lambda rows, _: _utilisation(rows)),
    ("whole step, pairs/s, B = 1,024", "-", lambda rows, _: _step_rate(rows, 1024)),
    (
        "whole step fed by DALI from shards, pairs/s, B = 256",
        "-",
        lambda rows, _: _fed(rows),
    ),
    (
        "whole step, largest batch without the gradient cache",
        "-",
        lambda rows, _: _largest(rows),
    ),
    (
        "whole step with our operators against their tiled torch form",
        "-",
        lambda rows, history: _gain(rows, history, "operators in torch, tiled"),
    ),
    (
        "whole step with our operators against one flat product",
        "-",
        lambda rows, history: _gain(rows, history, "operators in torch, one flat product"),
    ),
)


def measures(rows: list[Row], history: list[Row]) -> list[Row]:
    """One row a line: what is wanted, what was measured, and of which commit."""
    made = [(name, wanted, *compute(rows, history)) for name, wanted, compute in MEASURES]
    return [
        {"measure": name, "wanted": wanted, "measured": text, "commit": commit}
        for name, wanted, text, commit in made
    ]
