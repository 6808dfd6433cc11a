"""Curves of a run from its logs: one small chart per logged number, in readable groups."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlip.pages.charts import (
    BLUE,
    GREEN,
    MUTED,
    ORANGE,
    line_chart,
    powers_of_ten,
    running_window,
    smoothed,
)

TERMS = {
    "total": "Total loss",
    "global_contrastive": "Global contrastive",
    "local_alignment": "Token-knowledge-patch",
    "category": "Category",
    "matching": "Image-text matching",
    "swapping": "Text swapping",
    "divergence": "Divergence regulariser",
}
NAMES = {
    **TERMS,
    "grad_norm": "Gradient norm",
    "logit": "Logit scale, global",
    "logit_local": "Logit scale, local",
    "lr": "Learning rate",
    "pairs_per_s": "Pairs per second",
    "data_wait_s": "Waiting for data (s)",
    "memory_gib": "Memory (GiB)",
}
HIDDEN = {"step", "time", "epoch"}
NOT_DRAWN = {*HIDDEN, "pairs", "weights", "best_step"}  # of validation.jsonl
MOST_POINTS = 400  # a chart 300 px wide shows no more
MOST_ROWS = 8 * MOST_POINTS  # read of a log: a million steps as objects would be 4 GiB


def read_log(path: Path) -> list[dict[str, float]]:
    """Numeric entries of a JSON-lines log with a step, nested keys joined by '/'.

    A line cut off by a kill is passed over: it is the last one, and its step is logged again. Where
    the steps go back, a run went on from there or began anew: what was logged of later steps before
    is not of this run. Of a long log every second, fourth or eighth step and so on, MOST_ROWS rows
    at most.
    """
    if not path.is_file():
        return []
    kept: list[dict[str, float]] = []
    every = 1
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if not isinstance(entry, dict) or not isinstance(entry.get("step"), int):
                continue
            while kept and kept[-1]["step"] >= entry["step"]:
                kept.pop()
            if entry["step"] % every == 0:
                kept.append(_numbers(entry))
            if len(kept) > MOST_ROWS:
                every *= 2
                kept = [row for row in kept if row["step"] % every == 0]
    return kept


def _numbers(entry: Mapping[str, Any], path: str = "") -> dict[str, float]:
    flat: dict[str, float] = {}
    for key, value in entry.items():
        if isinstance(value, Mapping):
            flat.update(_numbers(value, f"{path}{key}/"))
        elif isinstance(value, int | float) and not isinstance(value, bool):
            flat[f"{path}{key}"] = float(value)
    return flat


def training_charts(log: Sequence[Mapping[str, float]]) -> list[dict[str, Any]]:
    """[{"title", "charts": [{"title", "last", "drawing"}]}], empty groups left out."""
    keys = [k for k in dict.fromkeys(k for row in log for k in row) if k not in HIDDEN]
    groups: dict[str, list[dict[str, Any]]] = {"Loss": [], "Optimisation": [], "Machine": []}
    order = list(TERMS)
    keys.sort(key=lambda k: order.index(_leaf(k)) if _leaf(k) in TERMS else len(order))
    for key in keys:
        group = _group(key)
        colour = {"Loss": BLUE, "Optimisation": ORANGE, "Machine": GREEN}[group]
        if key == "total":
            colour = MUTED
        is_smoothed = _leaf(key) != "lr"
        groups[group] += _chart(log, key, _title(key), colour=colour, is_smoothed=is_smoothed)
    return [{"title": title, "charts": charts} for title, charts in groups.items() if charts]


def held_out_charts(looks: Sequence[Mapping[str, float]]) -> list[dict[str, Any]]:
    """The same of a run's validation.jsonl: val at each checkpoint, and which is the best."""
    charts: list[dict[str, Any]] = []
    for key in (k for k in dict.fromkeys(k for row in looks for k in row) if k not in NOT_DRAWN):
        title = "Contrastive loss" if key == "total" else _title(key)
        charts += _chart(looks, key, title, colour=BLUE, is_smoothed=False)
    if not charts:
        return []
    best = looks[-1].get("best_step")
    chosen = "none is the best yet" if best is None else f"the best: that of step {best:,.0f}"
    return [{"title": f"On val, at each checkpoint ({chosen})", "charts": charts}]


def _chart(
    rows: Sequence[Mapping[str, float]], key: str, title: str, *, colour: str, is_smoothed: bool
) -> list[dict[str, Any]]:
    """One number's curve; none where there are fewer than two points."""
    steps = [row["step"] for row in rows if key in row]
    values = [row[key] for row in rows if key in row]
    stride = -(-len(steps) // MOST_POINTS)
    steps, values = steps[::stride], values[::stride]
    if len(steps) < 2 or not any(math.isfinite(v) for v in values):
        return []
    last = smoothed(values, running_window(len(values)))[-1] if is_smoothed else values[-1]
    drawing = line_chart(steps, values, colour=colour, is_smoothed=is_smoothed)
    return [{"title": title, "last": _number(last), "drawing": drawing}]


def _leaf(key: str) -> str:
    return key.rsplit("/", 1)[-1]


def _group(key: str) -> str:
    leaf = _leaf(key)
    if leaf in TERMS or key.startswith("terms"):
        return "Loss"
    if leaf.endswith(("_s", "_gib")):
        return "Machine"
    return "Optimisation"


def _title(key: str) -> str:
    leaf = _leaf(key)
    return NAMES.get(leaf) or leaf.replace("_", " ").capitalize()


def _number(value: float) -> str:
    if not math.isfinite(value):
        return ""
    if value != 0 and abs(value) < 1e-3:
        return powers_of_ten(value)
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
