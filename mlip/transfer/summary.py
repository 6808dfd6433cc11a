"""The results of an evaluation as lines for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from mlip.dataloading.ledger import listed
from mlip.transfer.table import classes_text, possible_text, seen_text, subgroup_lines
from mlip.transfer.trained_heads import untrained_text

RATE_TITLES = {
    "f1": "F1 at val thresholds",
    "sensitivity": "sensitivity",
    "specificity": "specificity",
}
HEADS = ("global", "local", "combined")


def _text(estimate: Mapping[str, Any] | None, digits: int = 2) -> str:
    if not estimate or estimate.get("value") is None:
        return "n/a"
    value = f"{estimate['value']:.{digits}f}"
    if estimate.get("low") is None:
        return value
    return f"{value} ({estimate['low']:.{digits}f}-{estimate['high']:.{digits}f})"


def summary_lines(results: Mapping[str, Any]) -> list[str]:
    """Every headline number with its interval and what it is to be compared with."""
    data = results["data"]
    lines = [f"{data['images']} images, {data['reports']} reports, {data['patients']} patients"]
    if data["rows_in_split"] > data["rows_asked"]:
        lines[0] += f", drawn from {data['rows_in_split']} rows (evaluate.max_studies)"
    if bad := data.get("unreadable"):
        lines.append(f"left out, cannot be read: {listed(bad)}")
    if told := seen_text(data.get("trained_on"), data["images"], data["patients"]):
        lines.append(told)
    if told := untrained_text(results["run"]):
        lines.append(told)
    lines += _zero_shot_lines(results["zero_shot"])
    lines += _retrieval_lines(results["retrieval"])
    lines += _grounding_lines(results["grounding"])
    return lines


def _zero_shot_lines(zero_shot: Mapping[str, Any]) -> list[str]:
    if "reason" in zero_shot:
        return [f"zero-shot   n/a: {zero_shot['reason']}"]

    def of_heads(name: str, estimates: Iterable[Mapping[str, Any] | None]) -> str:
        return f"{name:<26}" + "".join(f"{_text(estimate):<20}" for estimate in estimates)

    lines = [f"{'zero-shot AUROC':<26}" + "".join(f"{h:<20}" for h in HEADS)]
    lines += [of_heads(f"  {r['name']:<23} ", map(r.get, HEADS)) for r in zero_shot["findings"]]
    macro = zero_shot["macro"]
    lines.append(
        of_heads("  mean", map(macro.get, HEADS)) + classes_text(macro["global"], "findings")
    )
    if means := (zero_shot.get("at_thresholds") or {}).get("macro"):
        for rate, title in RATE_TITLES.items():
            lines.append(of_heads(title, (means[head][rate] for head in HEADS)))
    if of := zero_shot.get("exclusive"):
        for name in ("plain", "z_normalised"):
            lines.append(of_heads(f"accuracy, {name}", (of[head][name] for head in HEADS)))
    if lacking := zero_shot.get("labels_without_concept"):
        lines.append(f"not scored, no concept: {', '.join(lacking)}")
    return lines + subgroup_lines(zero_shot.get("subgroups", ()))


def _retrieval_lines(retrieval: Mapping[str, Any]) -> list[str]:
    if not retrieval["scores"]:
        return ["retrieval   n/a: fewer than two reports"]
    chance = retrieval["chance"]["recall@10"]
    lines = [f"recall@10 of {retrieval['pool']} (chance {chance:.3f})"]
    for head, both in retrieval["scores"].items():
        shown = "  ".join(
            f"{direction.replace('_', ' ')} {_text(both[direction]['recall@10'])}"
            for direction in both
        )
        lines.append(f"  {head:<24}{shown}")
    for direction, row in (retrieval.get("by_class") or {}).items():
        if direction == "reason" or "reason" in row:
            continue
        shown = "  ".join(
            f"@{k} {_text(row[f'precision@{k}'])}{possible_text(row, k)}" for k in (5, 10, 100)
        )
        name = f"class precision {direction.replace('_', ' ')}"
        lines.append(f"{name}: {shown}  chance {row['chance']:.3f}")
    return lines + subgroup_lines(retrieval.get("subgroups", ()), "retrieval ", "recall@10")


def _grounding_lines(grounding: Mapping[str, Any]) -> list[str]:
    lines = []
    if "reason" in grounding:
        lines.append(f"grounding   n/a: {grounding['reason']}")
    for kind, table in grounding.items():
        if kind == "reason":
            continue
        row = table["all"]
        lines.append(
            f"pointing by {kind:<14}{_text(row['hit'])}  area {row['area']:.2f}  swapped "
            f"{_text(row['swapped'])}  over swapped {_text(row['over_swapped'], 1)}  "
            f"{table['findings_at_twice_area']} of {table['num_findings']} findings at 2x area"
        )
        mean = table["over_findings"]
        lines.append(
            f"  mean over findings    {_text(mean['hit'])}  CNR {_text(mean['cnr'])}  mIoU "
            f"{_text(mean['miou'])}"
        )
        lines += subgroup_lines(table.get("subgroups", ()), f"pointing by {kind} ")
    return lines


def mean_scores(results: Mapping[str, Any]) -> dict[str, float]:
    """The means of `summary_lines` by name; none of a single finding, whose name is a table's, and
    none that is a control: beside other runs' curves nothing would say so."""
    found: dict[str, Mapping[str, Any]] = {}
    zero_shot, retrieval, grounding = (
        results[part] for part in ("zero_shot", "retrieval", "grounding")
    )
    local = not untrained_text(results["run"])
    for head in HEADS if local else ("global",):
        if "macro" in zero_shot:
            found[f"AUROC {head}"] = zero_shot["macro"][head]
        for direction, row in retrieval["scores"].get(head, {}).items():
            found[f"recall@10 {direction.replace('_', ' ')} {head}"] = row["recall@10"]
    for kind, table in grounding.items() if local else ():
        if kind != "reason":
            found[f"pointing by {kind}"] = table["all"]["hit"]
    return {name: one["value"] for name, one in found.items() if one.get("value") is not None}
