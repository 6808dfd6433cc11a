"""What the pages say of the step on a GPU, computed from rows of bench_step.py.

A cell is a figure, the status of a row that has none, or "not run"; never a number from memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.step_law import as_text
from benchmarks.step_reading import FEEDS
from benchmarks.step_timing import PARTS
from benchmarks.step_variants import ENGINES, OURS, VARIANTS

Row = dict[str, Any]
NOT_RUN = "not run"
PAIRS = (256, 1024)


def of_newest_gpu(rows: list[Row]) -> list[Row]:
    """Rows measured on the card that was used last; of equal cases the latest row."""
    on_gpu = [row for row in rows if row["environment"].get("gpu")]
    if not on_gpu:
        return []
    card = on_gpu[-1]["environment"]["gpu"]
    names = ("kind", "variant", "pairs", "micro", "of", "is_cached", "op", "provider")
    names += ("batch", "tokens", "patches", "dim", "pooling", "fill", "learned")
    latest: dict[str, Row] = {}
    for row in on_gpu:
        # a run that came to no result does not hide one that did
        key = repr([row.get(name) for name in names])
        is_better = row.get("status", "ok") == "ok" or key not in latest
        if row["environment"]["gpu"] == card and is_better:
            latest.pop(key, None)
            latest[key] = row
    return list(latest.values())


def find(rows: list[Row], kinds: tuple[str, ...], **where: Any) -> Row | None:
    """The row of a case, one with a figure before one without."""
    found = [
        row
        for row in rows
        if row.get("kind") in kinds and all(row.get(k) == v for k, v in where.items())
    ]
    return next((row for row in found if row["status"] == "ok"), found[0] if found else None)


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
    return find(rows, ("batch", "scaling"), variant=OURS, pairs=pairs)


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
                }
            )
    return table


def with_parts(rows: list[Row]) -> list[Row]:
    """Rows that hold the time of each part, smaller batches first."""
    made = [row for row in rows if row.get("kind") == "parts" and row["status"] == "ok"]
    return sorted(made, key=lambda row: row["pairs"])


def parts_table(rows: list[Row]) -> list[Row]:
    """Milliseconds of each part, a column a batch."""
    table: list[Row] = [{"part": part} for part in PARTS]
    for pairs in PAIRS:
        row = find(rows, ("parts",), pairs=pairs)
        for line in table:
            part = line["part"]
            line[f"{pairs:,} pairs, ms"] = cell(row, lambda r, p=part: f"{r['parts_ms'][p]:.2f}")
    return table


def variant_table(rows: list[Row]) -> list[Row]:
    """Each way of computing the step, and how many times longer it takes than ours."""
    table = []
    made = [row for row in rows if row.get("kind") == "variant"]
    for name in (*VARIANTS, *ENGINES):
        tried = sorted((r for r in made if r["variant"] == name), key=lambda r: r["pairs"])
        for row in tried or [None]:
            table.append(_variant_line(rows, name, row))
    return table


def _variant_line(rows: list[Row], name: str, row: Row | None) -> Row:
    ours = row and find(rows, ("variant", "batch", "scaling"), variant=OURS, pairs=row["pairs"])
    is_known = ours is not None and ours["status"] == "ok"

    def times_ours(row: Row) -> str:
        return f"{row['step_ms'] / ours['step_ms']:.2f}" if ours and is_known else NOT_RUN

    return {
        "way": name,
        "pairs": "-" if row is None else f"{row['pairs']:,}",
        "step, ms": cell(row, lambda r: f"{r['step_ms']:.1f}"),
        "times ours": _more(row, times_ours),
        "peak memory, GiB": _more(row, lambda r: f"{r.get('peak_gib', 0):.1f}"),
        "graph breaks": _more(row, lambda r: str(r.get("graph_breaks", "-"))),
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
        }
        for row in made
    ] or [{"pairs": "64 to 8,192", "micro-batch": "-", "time a pair, ms": NOT_RUN}]


def law_lines(rows: list[Row]) -> list[str]:
    names = {"step_ms": "time", "peak_gib": "memory"}
    return [
        f"{names[row['of']]}, {'gradient cache' if row['is_cached'] else 'plain'}, "
        f"{row['pairs'][0]} to {row['pairs'][-1]} pairs: {as_text(row)}"
        for row in rows
        if row.get("kind") == "law"
    ]


def profile_table(rows: list[Row]) -> list[Row]:
    row = find(rows, ("profile",))
    if row is None or row["status"] != "ok":
        return [{"kernel": cell(row, str), "calls a step": "-", "ms a step": "-", "share": "-"}]
    step = _step(rows, row["pairs"])
    is_known = step is not None and step["status"] == "ok"
    busy = f"{_percent(row['device_ms'] / step['step_ms'])} of a step" if is_known else NOT_RUN
    whole = {"kernel": "all", "calls a step": "-", "ms a step": f"{row['device_ms']:.2f}"}
    return [whole | {"share": busy}] + [
        {
            "kernel": f"`{line['kernel'][:70].replace('|', ' ')}`",
            "calls a step": f"{line['calls']:.0f}",
            "ms a step": f"{line['ms']:.2f}",
            "share": _percent(line["share"]),
        }
        for line in row["profile"]
    ]


def _largest(rows: list[Row]) -> str:
    fitted = [
        row["pairs"]
        for row in rows
        if row.get("kind") in ("batch", "scaling") and row["status"] == "ok" and row["micro"] == 0
    ]
    return f"{max(fitted):,}" if fitted else NOT_RUN


def _gain(rows: list[Row], name: str) -> str:
    line = _variant_line(rows, name, find(rows, ("variant",), variant=name))
    value = str(line["times ours"])
    return f"{value}x" if value[0].isdigit() else str(line["step, ms"])


MEASURES: tuple[tuple[str, str, Callable[[list[Row]], str]], ...] = (
    (
        "whole step, pairs/s, B = 256",
        "1,500 (aim 2,500)",
        lambda rows: cell(_step(rows, 256), lambda r: f"{r['pairs_per_s']:,.0f}"),
    ),
    (
        "whole step, utilisation, B = 256",
        "35 % (aim 50 %)",
        lambda rows: cell(_step(rows, 256), lambda r: _percent(r.get("utilisation"))),
    ),
    (
        "whole step, pairs/s, B = 1,024",
        "-",
        lambda rows: cell(_step(rows, 1024), lambda r: f"{r['pairs_per_s']:,.0f}"),
    ),
    (
        "whole step fed by DALI from shards, pairs/s, B = 256",
        "-",
        lambda rows: cell(
            find(rows, ("reading",), variant=next(iter(FEEDS)), pairs=256),
            lambda r: f"{r['pairs_per_s']:,.0f} ({r['step_ms'] / r['held_step_ms']:.2f}x held)",
        ),
    ),
    ("whole step, largest batch without the gradient cache", "-", _largest),
    (
        "whole step with our operators against their tiled torch form",
        "-",
        lambda rows: _gain(rows, "operators in torch, tiled"),
    ),
    (
        "whole step with our operators against one flat product",
        "-",
        lambda rows: _gain(rows, "operators in torch, one flat product"),
    ),
)


def measures(rows: list[Row]) -> list[Row]:
    """One row a line: what is wanted and what was measured."""
    return [
        {"measure": name, "wanted": wanted, "measured": compute(rows)}
        for name, wanted, compute in MEASURES
    ]
