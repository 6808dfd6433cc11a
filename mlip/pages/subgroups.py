"""The page's tables of scores by group, for a run and for a trained task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mlip.pages.charts import BLUE, MUTED, Mark, scale_axis, scale_marks
from mlip.transfer.table import classes_text

MOST_SHOWN = 8  # differences of single findings that the page names
WIDTH_PX = 132  # of the scale beside eight columns in a page of 1000 px
STEP = 0.1  # of the scale's ends


def subgroup_context(
    found: Sequence[Mapping[str, Any]],
    titles: Mapping[str, str],
    headline: str,
    classes: str = "findings",
) -> dict[str, Any] | None:
    """What templates/subgroups.html shows of mlip.transfer.measures.subgroups.subgroup_scores.

    titles    score -> its column's heading; scores that no group has are left out
    headline  the score whose difference from all others is drawn
    classes   what the means are over
    Returns: None where no subgroups were asked for
    """
    if not found:
        return None
    groups = [group for table in found for group in table["groups"]]
    shown = [key for key in titles if any(key in group["macro"] for group in groups)]
    ends = [
        abs(end)
        for group in groups
        for estimate in (group["difference"].get(headline) or {},)
        for end in (estimate.get("value"), estimate.get("low"), estimate.get("high"))
        if end is not None
    ]
    reach = min(1.0, STEP * (1 + int(max(ends, default=0.0) / STEP)))
    return {
        "columns": [titles[key] for key in shown],
        "headline": titles[headline],
        "classes": classes,
        "axis": scale_axis(low=-reach, high=reach, ticks=(-reach, 0.0, reach), width=WIDTH_PX),
        "tables": [_table(table, shown, headline, reach) for table in found],
        **_single_findings(found, headline),
    }


def _table(
    table: Mapping[str, Any], shown: Sequence[str], headline: str, reach: float
) -> dict[str, Any]:
    rows = []
    for group in table["groups"]:
        estimate = group["difference"].get(headline) or {"value": None, "reason": ""}
        marks = [Mark(0.0, colour=MUTED, shape="tick", label="no difference")]
        if estimate["value"] is not None:
            marks.append(
                Mark(estimate["value"], estimate["low"], estimate["high"], BLUE, "dot", headline)
            )
        rows.append(
            {
                "name": group["name"],
                "images": group["images"],
                "patients": group["patients"],
                "scores": [
                    (told, classes_text(told or {}))  # a mean over some findings alone says so
                    for told in (*(group["macro"].get(key) for key in shown), estimate)
                ],
                "drawing": scale_marks(
                    [marks], low=-reach, high=reach, width=WIDTH_PX, grid=(-reach, 0.0, reach)
                ),
            }
        )
    return {
        "column": table["column"],
        "rows": rows,
        "not_stated": table["not_stated"],
        "small": table["small_groups"],
    }


def _single_findings(found: Sequence[Mapping[str, Any]], headline: str) -> dict[str, Any]:
    """How many findings differ between a group and the others, and the largest differences."""
    compared, apart = 0, []
    for table in found:
        groups = table["groups"]
        # of two groups that share all rows, one difference is the other's with its sign turned
        is_pair = len(groups) == 2 and not table["small_groups"]["groups"]
        for group in groups[:1] if is_pair else groups:
            for row in group["classes"]:
                estimate = row["difference"].get(headline) or {"value": None}
                if estimate["value"] is None or estimate["low"] is None:
                    continue
                compared += 1
                if estimate["low"] > 0.0 or estimate["high"] < 0.0:
                    name = f"{row['class'].replace('_', ' ')}, {table['column']} {group['name']}"
                    apart.append((name, estimate))
    apart.sort(key=lambda entry: -abs(entry[1]["value"]))
    return {
        "compared": compared,
        "apart": apart[:MOST_SHOWN],
        "apart_count": len(apart),
        "by_chance": 0.05 * compared,
    }
