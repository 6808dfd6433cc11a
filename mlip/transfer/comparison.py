"""The comparison of two models, as `mlip compare` shows it on a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlip.transfer.table import NAMES, apart_text, number


def comparison_lines(found: Mapping[str, Any]) -> list[str]:
    """One text a line, of what `measures.compare.compare` found."""
    pairs = found["pairs"]
    names = [" ".join(str(pair[side]) for pair in pairs) for side in ("a", "b")]
    lines = [
        f"{names[0]} minus {names[1]}, split {found['split']}: {found['images']} images of "
        f"{found['patients']} patients that both scored; 95 % intervals of the difference over "
        "patients"
    ]
    of_a, of_b = (" and ".join(found["precision"][side]) for side in ("a", "b"))
    if of_a and of_b and of_a != of_b:
        lines.append(
            f"the first was computed in {of_a}, the second in {of_b}: some of the difference may "
            "be of rounding alone"
        )
    for table in found["methods"]:
        lines += _method_lines(table)
    if found["not_compared"]:
        lines.append(f"not on both sides: {', '.join(found['not_compared'])}")
    return lines


def _method_lines(table: Mapping[str, Any]) -> list[str]:
    a, b = table["a"], table["b"]
    lines = [a if a == b else f"{a} minus {b}"]
    for mean in table["mean"]:
        if mean["classes_asked"] > 1:
            what = "directions" if mean["measure"].startswith("recall@") else "findings"
            told = f"mean of {mean['classes']} {what}, {NAMES[mean['measure']]}"
            lines.append(_line(told, mean))
    for row in table["findings"]:
        finding, measure = row["finding"], row["measure"]
        lines.append(_line(finding if measure == "auroc" else f"{finding}, {NAMES[measure]}", row))
    apart = [
        row["difference"]
        for row in table["findings"]
        if row["measure"] == "auroc" and row["difference"]["low"] is not None
    ]
    if len(apart) > 1:
        away = sum(d["low"] > 0 or d["high"] < 0 for d in apart)
        lines.append(
            f"  {away} of {len(apart)} intervals of single findings leave 0 (one in twenty "
            "does by chance alone)"
        )
    return lines


def _line(name: str, row: Mapping[str, Any]) -> str:
    difference = row["difference"]
    if difference["value"] is None:
        return f"  {name:34s} n/a ({difference['reason']})"
    spread = difference.get("seed_sd")
    text = f"{number(row['a']['value'])} and {number(row['b']['value'])}: "
    return f"  {name:34s} {text}{apart_text(difference)}" + (
        "" if spread is None else f", fits +- {spread:.3f}"
    )
