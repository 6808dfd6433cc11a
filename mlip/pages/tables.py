"""What the report's tables and sentences hold, from the results of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from markupsafe import Markup

from mlip.pages.charts import (
    BLUE,
    GREEN,
    INK,
    MUTED,
    ORANGE,
    Mark,
    legend,
    scale_axis,
    scale_marks,
)
from mlip.pages.subgroups import subgroup_context
from mlip.transfer.measures.operating_point import MEANT
from mlip.transfer.table import classes_text, possible_text

HEAD_MARKS = {
    "global": Mark(None, colour=ORANGE, shape="ring", label="global head"),
    "local": Mark(None, colour=BLUE, shape="dot", label="local score"),
    "combined": Mark(None, colour=GREEN, shape="square", label="combined"),
}
DIRECTIONS = {"image_to_text": "image to report", "text_to_image": "report to image"}
GROUNDING_PX = 132  # of the scale that stands beside nine columns in a page of 1000 px
QUARTERS = (0, 0.25, 0.5, 0.75, 1)
ENOUGH = 20  # phrases behind a ratio that the headline may quote
SCORES = {"global": "Global head", "local": "Local score", "combined": "Combined"}
KIND_TITLES = {
    "keyword": "By name (\u201cpleural effusion\u201d)",
    "sentence": "By a sentence with its side (\u201cthere is a left pleural effusion\u201d)",
    "phrase": "By the words of its own report",
}

SENTENCE_WITHOUT_SIDE = "By a sentence (\u201cthere is pneumonia\u201d)"


def _mark(head: str, estimate: Mapping[str, Any] | None) -> Mark:
    told = estimate or {}
    value, low, high = (told.get(key) for key in ("value", "low", "high"))
    return replace(HEAD_MARKS[head], value=value, low=low, high=high)


def _with_range(estimate: Mapping[str, Any]) -> str:
    if estimate.get("low") is None:
        return f"{estimate['value']:.2f}"
    return f"{estimate['value']:.2f} ({estimate['low']:.2f} to {estimate['high']:.2f})"


def headline(results: Mapping[str, Any]) -> list[Markup]:
    """Three sentences a reader outside the field can check against the tables."""
    told = (_ranking_told(results), _retrieval_told(results), _pointing_told(results))
    return [line for line in told if line is not None] or [
        Markup("Nothing could be scored on this split; the tables below say why.")
    ]


def _ranking_told(results: Mapping[str, Any]) -> Markup | None:
    head = "global"  # always: the better one of two, chosen by this very score, would flatter
    macro = (results.get("zero_shot") or {}).get("macro", {}).get(head) or {}
    if macro.get("value") is None:
        return None
    worst = results["zero_shot"]["worst"][head]
    return Markup(
        "Without a single label, the {} ranks a study with a finding above one without it "
        "in <b>{:.0f} of 100 pairs</b> (mean AUROC {}{}; a coin gets 50). "
        "Worst: {}, {:.2f}."
    ).format(
        SCORES[head].lower(),
        100 * macro["value"],
        _with_range(macro),
        f" {over}" if (over := classes_text(macro, "findings")) else "",
        _finding_name(results, worst.get("finding")).lower(),
        worst["value"],
    )


def _retrieval_told(results: Mapping[str, Any]) -> Markup | None:
    retrieval = results.get("retrieval") or {}
    chosen = _global_retrieval(retrieval)
    # every order has the right one among the first 10 of ten
    if not chosen or retrieval["chance"]["recall@10"] >= 1.0:
        return None
    return Markup(
        "Shown an image, it finds the right report among the first 10 of {} in "
        "<b>{:.0f} %</b> of cases; shown a report, the right image in <b>{:.0f} %</b> "
        "(chance {:.1f} %)."
    ).format(
        retrieval["pool"],
        100 * chosen["image_to_text"]["recall@10"]["value"],
        100 * chosen["text_to_image"]["recall@10"]["value"],
        100 * retrieval["chance"]["recall@10"],
    )


def _pointing_told(results: Mapping[str, Any]) -> Markup | None:
    keyword = (results.get("grounding") or {}).get("keyword")
    if not keyword or keyword["all"]["hit"]["value"] is None:
        return None
    row, compared = keyword["all"], Markup("")
    times = row["over_swapped"]
    # a ratio from a handful of images would say more than it knows
    if times["n"] >= ENOUGH and times["value"] is not None:
        compared = Markup(
            ", <b>{:.1f} times</b> as often as the same words on an image without it"
        ).format(times["value"])
    return Markup(
        "The name of a finding points into its true box in <b>{:.0f} %</b> of cases "
        "(chance {:.0f} %){}."
    ).format(100 * row["hit"]["value"], 100 * row["area"], compared)


def _finding_name(results: Mapping[str, Any], finding: str | None) -> str:
    for row in (results.get("zero_shot") or {}).get("findings", []):
        if row["finding"] == finding:
            return str(row["name"])
    return str(finding)


def _global_retrieval(retrieval: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The global head's recall: the score that a search index of vectors would have."""
    return (retrieval.get("scores") or {}).get("global")


def _card(
    label: str,
    estimate: Mapping[str, Any] | None,
    *,
    low: float,
    high: float,
    chance: float | None,
    digits: int = 2,
    suffix: str = "",
    chance_label: str = "chance",
) -> dict[str, Any]:
    if not estimate or estimate.get("value") is None:
        reason = (estimate or {}).get("reason") or ""
        return {"label": label, "value": "", "range": reason, "scale": ""}
    notes = []
    if estimate.get("low") is not None:
        notes.append(f"{estimate['low']:.{digits}f} to {estimate['high']:.{digits}f}")
    elif estimate.get("reason"):
        notes.append(f"no interval: {estimate['reason']}")
    if estimate["n"] < ENOUGH:
        notes.append(f"n = {estimate['n']}")
    if chance is not None:
        notes.append(f"{chance_label} {chance:.{digits}f}")
    marks = [Mark(estimate["value"], estimate.get("low"), estimate.get("high"), BLUE, "dot", label)]
    if chance is not None:
        marks.insert(0, Mark(chance, colour=MUTED, shape="tick", label=chance_label))
    return {
        "label": label,
        "value": f"{estimate['value']:.{digits}f}{suffix}",
        "range": "; ".join(notes),
        "scale": scale_marks([marks], low=low, high=high, width=220, grid=(low, high)),
    }


def cards(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The four numbers on top, each on its scale with its chance level."""
    macro = (results.get("zero_shot") or {}).get("macro", {})
    retrieval = results.get("retrieval") or {}
    chosen = _global_retrieval(retrieval) or {}
    keyword = (results.get("grounding") or {}).get("keyword", {}).get("all", {})
    times = keyword.get("over_swapped")
    top = max(4.0, ((times or {}).get("high") or 0.0))
    chance, pool = (retrieval.get("chance") or {}).get("recall@10"), retrieval.get("pool")
    return [
        _card("Zero-shot AUROC, local score", macro.get("local"), low=0.5, high=1.0, chance=0.5),
        _card("Zero-shot AUROC, global head", macro.get("global"), low=0.5, high=1.0, chance=0.5),
        _card(
            f"Report among the first 10{f' of {pool}' if pool else ''}",
            (chosen.get("image_to_text") or {}).get("recall@10"),
            low=0.0,
            high=1.0,
            chance=chance,
        ),
        _card(
            "Pointing, over the same words on a swapped image",
            times,
            low=0.0,
            high=top,
            chance=1.0,
            digits=1,
            suffix="\u00d7",
            chance_label="no better",
        ),
    ]


def zero_shot_context(results: Mapping[str, Any]) -> dict[str, Any] | None:
    found = results.get("zero_shot")
    if not found or not found.get("findings"):
        return None
    heads = [h for h in HEAD_MARKS if h in found["macro"]]
    rows = found["findings"]
    values = [r[h]["low"] for r in rows for h in heads if r[h].get("low") is not None]
    low = 0.5 if not values or min(values) > 0.45 else 0.0
    ticks = [low + (1.0 - low) * i / 5 for i in range(6)]

    def drawing(row: Mapping[str, Any]) -> Markup:
        marks = [[_mark(h, row.get(h))] for h in heads]
        return scale_marks(marks, low=low, high=1.0, grid=ticks)

    return {
        "rows": [{**r, "drawing": drawing(r)} for r in rows],
        "macro": found["macro"],
        # a finding has both classes for every head, or for none
        "macro_over": classes_text(found["macro"][heads[0]], "findings") if heads else "",
        "macro_drawing": drawing(found["macro"]),
        "worst": [
            (
                SCORES[h].lower(),
                {**found["worst"][h], "name": _finding_name(results, found["worst"][h]["finding"])},
            )
            for h in heads
            if found["worst"][h]["value"] is not None
        ],
        "legend": legend([HEAD_MARKS[h] for h in heads]),
        "axis": scale_axis(low=low, ticks=ticks),
        "wordings": [
            {
                "name": _finding_name(results, f),
                "positive": w["positive"][0],
                "negative": w["negative"][0],
                "count": len(w["positive"]),
            }
            for f, w in found["wordings"].items()
        ],
        "left_out": found.get("labels_without_concept") or [],
        "at_thresholds": _threshold_context(found),
        "exclusive": found.get("exclusive"),
    }


def _threshold_context(found: Mapping[str, Any]) -> dict[str, Any] | None:
    """Yes-or-no scores of the combined score, and the mean of each head; None without thresholds.

    One head in the table: three with five rates each are no table that anybody reads.
    """
    told = found.get("at_thresholds") or {}
    if "findings" not in told:
        return None
    names = {row["finding"]: row["name"] for row in found["findings"]}
    rows = [(names[finding], row["combined"]) for finding, row in told["findings"].items()]
    means = told["macro"]["combined"]
    # of a finding in every row there is a sensitivity and no specificity
    over = {name: classes_text(means[name], "findings") for name in MEANT}
    each = [f"{name} {text}" for name, text in over.items() if text]
    shown = each if len(set(over.values())) > 1 else [over["f1"]]
    return {"rule": told["rule"], "rows": rows, "macro": told["macro"], "over": "; ".join(shown)}


def retrieval_context(results: Mapping[str, Any]) -> dict[str, Any] | None:
    found = results.get("retrieval")
    if not found or not found.get("scores"):
        return None
    return {
        **found,
        "rows": _retrieval_rows(found),
        "references": _references(found),
        "has_oracle": bool(found.get("oracle")),
        "whole_rows": [
            {"direction": DIRECTIONS[d], **row}
            for d, row in (found.get("whole") or {}).get("scores", {}).items()
        ],
        "class_rows": [
            {
                "direction": DIRECTIONS[d],
                "cuts": [(k, row[f"precision@{k}"], possible_text(row, k)) for k in (5, 10, 100)],
                "chance": row["chance"],
            }
            for d, row in (found.get("by_class") or {}).items()
            if d in DIRECTIONS and "reason" not in row
        ],
        "axis": scale_axis(low=0.0, ticks=(0.0, 0.5, 1.0)),
        "by_group": subgroup_context(
            found.get("subgroups") or [],
            {head: f"Recall@10, {title.lower()}" for head, title in SCORES.items()},
            "global",
            "directions",
        ),
    }


def _retrieval_rows(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row a score and direction, drawn between chance and the oracle."""
    chance = Mark(found["chance"]["recall@10"], colour=MUTED, shape="tick", label="chance")
    oracle = found.get("oracle") or {}
    rows = []
    for score, both in found["scores"].items():
        for direction, title in DIRECTIONS.items():
            row = both[direction]
            marks = [chance, _mark(score, row["recall@10"])]
            if direction in oracle:
                ceiling = oracle[direction]["recall@10"]["value"]
                marks.append(Mark(ceiling, colour=INK, shape="diamond", label="oracle"))
            drawing = scale_marks([marks], low=0.0, high=1.0, grid=QUARTERS)
            rows.append({**row, "score": SCORES[score], "direction": title, "drawing": drawing})
    return rows


def _references(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of what no model scores: the oracle, where there is one, and chance."""
    rows = [
        {"name": "Oracle", "direction": DIRECTIONS[d], "digits": 2, **values}
        for d, values in (found.get("oracle") or {}).items()
        if d in DIRECTIONS
    ]
    rows.append(
        {
            "name": "Chance",
            "direction": "either",
            "digits": 3,
            **{key: {"value": value, "low": None} for key, value in found["chance"].items()},
            "median_rank": {"value": (found["pool"] + 1) / 2, "low": None},
        }
    )
    return rows


def grounding_context(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    found = results.get("grounding") or {}
    tables = []
    area = Mark(None, colour=MUTED, shape="tick", label="area chance")
    pixel = Mark(None, colour=INK, shape="diamond", label="fixed pixel by side")
    signs = [
        Mark(None, colour=BLUE, shape="dot", label="hit rate"),
        *(area, pixel),
        Mark(None, colour=ORANGE, shape="ring", label="swapped image"),
    ]
    for kind, title in KIND_TITLES.items():
        if kind not in found:
            continue
        if kind == "sentence" and not results.get("data", {}).get("is_phantom"):
            title = SENTENCE_WITHOUT_SIDE
        table = found[kind]
        total = {"name": "All phrases", "is_total": True, **table["all"]}
        rows = []
        for row in [*table["findings"], total]:
            hit, swapped = row["hit"], row["swapped"]
            lanes = [
                [replace(area, value=row["area"]), replace(pixel, value=row["prior_with_side"])],
                [
                    Mark(
                        swapped["value"], swapped["low"], swapped["high"], ORANGE, "ring", "swapped"
                    ),
                    Mark(hit["value"], hit["low"], hit["high"], BLUE, "dot", "hit rate"),
                ],
            ]
            drawing = scale_marks(lanes, low=0.0, high=1.0, width=GROUNDING_PX, grid=QUARTERS)
            rows.append({**row, "drawing": drawing})
        tables.append(
            {
                **table,
                "title": title,
                "rows": rows,
                "by_group": subgroup_context(
                    table.get("subgroups") or [], {"hit": "Hit rate"}, "hit"
                ),
                "mask_rows": [row for row in rows if row.get("mask")],
                "legend": legend(signs),
                "axis": scale_axis(low=0.0, ticks=(0.0, 0.5, 1.0), width=GROUNDING_PX),
            }
        )
    return tables
