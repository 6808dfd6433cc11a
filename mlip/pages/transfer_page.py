"""The page of a trained task: scores by fraction, curves, confusion, worst cases, fits.

One self-contained HTML file beside results.json; the page lives in templates/transfer.html.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from markupsafe import Markup

from mlip.pages.charts import (
    INK,
    MUTED,
    PALETTE,
    RULE,
    Mark,
    line_chart,
    scale_axis,
    scale_marks,
)
from mlip.pages.page import dotted, render_page, write_page
from mlip.pages.pictures import UNSEEN, decode_png, picture_uri
from mlip.pages.subgroups import subgroup_context
from mlip.transfer.results_file import PAGE
from mlip.transfer.table import classes_text, headline_of, rows_of, seeds_text, seen_text

SUBGROUP_SCORES = {
    "auroc": "AUROC",
    "accuracy": "Accuracy",
    "sensitivity": "Sensitivity",
    "specificity": "Specificity",
    "published": "Dice, published form",
    "positive_only": "Dice, images with truth",
    "pooled": "Dice, pixels pooled",
    "strict": "mAP, strict",
}
DASHES = ("none", "8 3", "2 2", "9 3 2 3", "14 4", "5 2 2 2 2 2")  # px, a line and its gap
STARTS = {
    "checkpoint": "pre-trained checkpoint",
    "imagenet": "ImageNet weights",
    "random": "random weights",
}


def write_transfer_page(folder: Path, results: Mapping[str, Any]) -> Path:
    """folder/report.html of what mlip.transfer.fits.protocol.transfer_run gave."""
    return write_page(folder / PAGE, render_transfer(results))


def render_transfer(results: Mapping[str, Any]) -> str:
    task, last = results["task"], results["fractions"][-1]
    test = results["data"]["splits"]["test"]
    by_group = last["scores"]["headline"].rpartition(".")[2]
    if task["name"] == "classification":
        by_group = "auroc"  # accuracy moves with how common a class is in a group
    context = {
        "title": results["run"]["name"],
        "meta": _meta(results),
        "cards": [_card(f) for f in results["fractions"][-4:]],
        "axis": scale_axis(low=0.0, ticks=(0.0, 0.5, 1.0)),
        "fractions": [_fraction(f) for f in results["fractions"]],
        "task": task,
        "last_percent": f"{last['percent']:g}",
        "classes": last["scores"].get("classes", []),
        "class_tables": _class_tables(
            last["scores"], results["config"]["evaluate"]["threshold_rule"]
        ),
        "subgroups": subgroup_context(
            last["scores"].get("subgroups") or [],
            SUBGROUP_SCORES,
            by_group,
        ),
        "curves": _curves(last["scores"]),
        "confusions": _confusions(last["scores"], task["classes"]),
        "pictures": [_picture(p) for p in results.get("pictures", ())],
        "published_cut": f"{results['config']['transfer']['compat_score_cut']:g}",
        "outlined": task["name"] != "classification",
        "fits": [_fit(f["percent"], fit) for f in results["fractions"] for fit in f["fits"]],
        "charts": [
            (
                f"seed {fit['seed']}",
                line_chart(range(1, fit["epochs"] + 1), fit["val_loss"], over="epoch"),
            )
            for fit in last["fits"]
            if fit["epochs"] > 1  # a logistic probe is one fit, not a curve
        ],
        "splits": results["data"]["splits"],
        "unreadable": results["data"]["unreadable"],
        "trained_on": seen_text(
            results["data"].get("trained_on"), test["images"], test["patients"]
        ),
        "unused": {k: n for k, n in results["data"].get("unused", {}).items() if n},
        "settings": [
            (key, _shown(value)) for key, value in dotted(results["config"]["transfer"]).items()
        ],
        "provenance": _provenance(results),
    }
    return render_page("transfer.html", context)


def _meta(results: Mapping[str, Any]) -> list[str]:
    task, test = results["task"], results["data"]["splits"]["test"]
    return [
        f"{task['name']}, encoder {task['encoder']}",
        f"start: {STARTS[task['start']]}",
        f"{test['images']:,} test images of {test['patients']:,} patients",
        seeds_text(results),
        datetime.now(UTC).strftime("%d %B %Y, %H:%M UTC"),
    ]


def _card(fraction: Mapping[str, Any]) -> dict[str, Any]:
    name, estimate = headline_of(fraction["scores"])
    value, beside = None, estimate["reason"]
    if estimate["value"] is not None:
        value, beside = f"{estimate['value']:.3f}", ""
        if estimate["low"] is not None:
            beside = f"{estimate['low']:.3f} to {estimate['high']:.3f}"
    return {
        "label": f"{name}, {fraction['percent']:g}\N{NO-BREAK SPACE}% of the labels",
        "value": value,
        "range": beside,
        "scale": _drawing(estimate),
    }


def _fraction(fraction: Mapping[str, Any]) -> dict[str, Any]:
    rows = sorted({fit["rows"] for fit in fraction["fits"]})
    return {
        "percent": f"{fraction['percent']:g}",
        "images": f"{rows[0]:,}" if len(rows) == 1 else f"{rows[0]:,} to {rows[-1]:,}",
        "rows": [
            {
                "name": name,
                "score": estimate,
                "drawing": _drawing(estimate),
                "classes": classes_text(estimate),
            }
            for name, estimate in rows_of(fraction["scores"])
        ],
    }


def _drawing(estimate: Mapping[str, Any]) -> Markup:
    seeds = [Mark(v, colour=MUTED, shape="tick", label="seed") for v in estimate.get("seeds", ())]
    whole = Mark(estimate["value"], estimate["low"], estimate["high"], label="mean over seeds")
    return scale_marks([[*seeds, whole]], low=0.0, high=1.0, grid=(0.5,))


def _class_tables(
    scores: Mapping[str, Any], rule: str
) -> list[tuple[str, list[tuple[str, Markup]]]]:
    """(heading, [(key, title)]) of the tables by class."""
    if not scores.get("classes"):
        return []
    ranked = {
        "auroc": "AUROC",
        "auprc": "AUPRC",
        "ece": "ECE",
        "ece_calibrated": "ECE, if calibrated",
        "strict": "AP, strict",
    }
    called = {
        "sensitivity": "Sensitivity",
        "specificity": "Specificity",
        "ppv": "Positive<br>predictive value",
        "npv": "Negative<br>predictive value",
        "f1": "F1",
        "accuracy": "Accuracy",
    }
    tables = [("By class", ranked), (f"Yes or no, at the threshold of val ({rule})", called)]
    shown = [
        (heading, [(k, Markup(title)) for k, title in titles.items() if k in scores["classes"][0]])
        for heading, titles in tables
    ]
    return [(heading, columns) for heading, columns in shown if columns]


def _curves(scores: Mapping[str, Any]) -> list[tuple[str, Markup]]:
    found = [(c["class"], c["curve"]) for c in scores.get("classes", ()) if "curve" in c]
    if not found:
        return []
    names = [name for name, _ in found]
    roc = [(c["false_positive_rate"], c["true_positive_rate"]) for _, c in found]
    precision = [(c["recall"], c["precision"]) for _, c in found]
    return [
        (
            "ROC: sensitivity, false positives",
            unit_chart(roc, names, "false positive rate", "sensitivity", diagonal=True),
        ),
        (
            "Precision against recall",
            unit_chart(precision, names, "recall", "precision"),
        ),
    ]


def unit_chart(
    curves: Sequence[tuple[Sequence[float], Sequence[float]]],
    names: Sequence[str],
    x_name: str,
    y_name: str,
    *,
    diagonal: bool = False,
) -> Markup:
    """Curves on the unit square; `diagonal` marks what guessing gives."""
    side, left, top = 300, 38.0, 8.0
    span = side - left - 12.0

    def at(x: float, y: float) -> str:
        return f"{left + x * span:.1f},{top + (1.0 - y) * span:.1f}"

    height = int(top + span + 34)
    parts = [
        f'<svg class="chart" viewBox="0 0 {side} {height}" width="{side}" height="{height}" '
        f'role="img" aria-label="{y_name} over {x_name}, {len(names)} curve{"s"[: len(names) > 1]} '
        'between 0 and 1; the table above has their areas">'
    ]
    for tick in (0.0, 0.5, 1.0):
        x, y = at(tick, tick).split(",")
        parts.append(
            f'<line x1="{left}" x2="{left + span}" y1="{y}" y2="{y}" stroke="{RULE}"/>'
            f'<line x1="{x}" x2="{x}" y1="{top}" y2="{top + span}" stroke="{RULE}"/>'
            f'<text x="{left - 6}" y="{float(y) + 3.5:.1f}" text-anchor="end" class="axis">'
            f"{tick:g}</text>"
            f'<text x="{x}" y="{top + span + 14}" text-anchor="middle" class="axis">{tick:g}</text>'
        )
    if diagonal:
        parts.append(
            f'<polyline points="{at(0, 0)} {at(1, 1)}" fill="none" stroke="{MUTED}" '
            'stroke-dasharray="3 3"/>'
        )
    for i, ((xs, ys), name) in enumerate(zip(curves, names, strict=True)):
        points = " ".join(at(x, y) for x, y in zip(xs, ys, strict=True))
        parts.append(
            Markup('<polyline points="{}" fill="none" {}>').format(points, _line(i))
            + Markup("<title>{}</title></polyline>").format(name)
        )
    parts.append(
        Markup(
            '<text x="{}" y="{}" text-anchor="middle" class="axis">{}</text>'
            '<text x="11" y="{}" text-anchor="middle" class="axis" '
            'transform="rotate(-90 11 {})">{}</text></svg>'
        ).format(
            f"{left + span / 2:.1f}",
            f"{top + span + 29:.1f}",
            x_name,
            *(f"{top + span / 2:.1f}",) * 2,
            y_name,
        )
    )
    key = Markup("").join(
        Markup(
            '<span class="key"><svg width="30" height="6" aria-hidden="true">'
            '<line x1="0" x2="30" y1="3" y2="3" {}/></svg>{}</span>'
        ).format(_line(i), name.replace("_", " "))
        for i, name in enumerate(names)
    )
    return Markup("".join(parts)) + Markup('<p class="legend">') + key + Markup("</p>")


def _line(i: int) -> Markup:
    """How curve and key number i are drawn: each of the first 36 has a pair of colour and dash of
    its own, and of the first six no two share either."""
    turn, colour = divmod(i, len(PALETTE))
    return Markup('stroke="{}" stroke-width="2" stroke-dasharray="{}"').format(
        PALETTE[colour], DASHES[(colour + turn) % len(DASHES)]
    )


def _confusions(scores: Mapping[str, Any], classes: Sequence[str]) -> list[dict[str, Any]]:
    """Tables of counts: one for classes that exclude each other, else one a class."""
    if scores.get("confusion"):
        return [_confusion("All classes", scores["confusion"], list(classes))]
    return [
        _confusion(c["class"], c["confusion"], ["no", "yes"])
        for c in scores.get("classes", ())
        if c.get("confusion")
    ]


def _confusion(title: str, counts: Sequence[Sequence[int]], names: list[str]) -> dict[str, Any]:
    rows = []
    for name, row in zip(names, counts, strict=True):
        total = max(1, sum(row))
        cells = [(n, f"background: rgba(0,114,178,{0.55 * n / total:.2f})") for n in row]
        rows.append({"name": name, "cells": cells})
    return {"title": title, "names": names, "rows": rows}


def _picture(entry: Mapping[str, Any]) -> dict[str, Any]:
    image = decode_png(entry["image"])
    outlined = [
        name
        for kind, name in (("truth", "truth"), ("predicted", "prediction"))
        if entry[f"{kind}_lines"] or entry[f"{kind}_boxes"]
    ]
    return {
        "uri": picture_uri(image),
        "alt": f"Radiograph, outlined: {' and '.join(outlined)}" if outlined else "Radiograph",
        "caption": entry["caption"],
        "study": entry["study"],
        "layer": _layer(entry),
    }


def _layer(entry: Mapping[str, Any]) -> Markup:
    """Truth in blue, prediction dashed in orange, on a unit square."""
    parts = []
    for kind, colour, dash in (("truth", "#56d4ff", ""), ("predicted", "#ffb000", "4 3")):
        for under in (True, False):
            style = (
                f'stroke="{INK if under else colour}" stroke-width="{3.4 if under else 1.8}" '
                f'stroke-opacity="{0.55 if under else 1}" stroke-dasharray="{dash}"'
            )
            for line in entry[f"{kind}_lines"]:
                points = " ".join(f"{x:.4f},{y:.4f}" for x, y in line)
                parts.append(f'<polygon points="{points}" {style}/>')
            for x0, y0, x1, y1 in entry[f"{kind}_boxes"]:
                size = f'x="{x0}" y="{y0}" width="{x1 - x0:.4f}" height="{y1 - y0:.4f}"'
                parts.append(f"<rect {size} {style}/>")
    return Markup(f'<svg class="layer" viewBox="0 0 1 1" {UNSEEN}>{"".join(parts)}</svg>')


def _fit(percent: float, fit: Mapping[str, Any]) -> dict[str, Any]:
    best = fit["best_epoch"]
    return {
        "percent": f"{percent:g}",
        "seed": fit["seed"],
        "rows": fit["rows"],
        "patients": fit["patients"],
        "epochs": f"{best} of {fit['epochs']}",
        "steps": fit["steps"],
        "val_loss": fit["val_loss"][best - 1] if best else None,
    }


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "none" if value in (None, {}) else str(value)


def _provenance(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    found = [*results["fingerprints"].items(), *results["versions"].items()]
    found += [
        (key, results["run"][key])
        for key in (
            *("checkpoint", "step", "pairs_seen", "seeds", "commit"),
            *("device", "precision", "seconds"),
        )
        if results["run"].get(key) is not None
    ]
    return [(key.replace("_", " "), _shown(value)) for key, value in found]
