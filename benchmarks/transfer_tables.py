"""Tables of benchmarks/bench_transfer.py: results of cells in, markdown and a JSON tree out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlip.transfer.measures.compare import compare
from mlip.transfer.measures.predictions import FILE, load_predictions
from mlip.transfer.table import NAMES, apart_text, interval_text, rows_of

METHODS = {
    "mlip": "full MLIP",
    "no_knowledge": "MLIP without knowledge",
    "mgca": "MGCA family: in-pair tokens, plain prototypes",
    "clip": "global contrast only (CLIP)",
    "imagenet": "ImageNet weights",
    "random": "random weights",
}
CASE_REPORTS = "case_reports"
SHOWN = {
    "phantom_classification": ("macro AUROC",),
    "nih_pneumonia_classification": ("macro AUROC",),
    "segmentation": ("Dice, images with truth only", "Dice, all pixels pooled"),
    "detection": ("mAP, strict (every image)",),
}
# of a run's own results: what it scores without any label
WITHOUT_LABELS = {
    "zero-shot macro-AUROC, global head": ("zero_shot", "macro", "global"),
    "zero-shot macro-AUROC, local score": ("zero_shot", "macro", "local"),
    "recall@10 of 256, image to text": ("retrieval", "scores", "global", "image_to_text")
    + ("recall@10",),
    "pointing by name, hit rate": ("grounding", "keyword", "all", "hit"),
}


def shown_scores(task: str, fraction: dict[str, Any]) -> dict[str, Mapping[str, Any]]:
    """name -> Estimate with seeds, of those that the table shows."""
    kind = task if task in SHOWN else task.rsplit("_", 1)[-1]
    scores = dict(rows_of(fraction["scores"]))
    wanted = [name for name in SHOWN[kind] if name in scores] or list(scores)[:1]
    return {name: scores[name] for name in wanted}


def as_markdown(
    found: dict[str, Any],
    known: dict[str, Any],
    methods: tuple[str, ...],
    seeds: tuple[int, ...],
) -> str:
    """A table a task: methods down, label fractions across; what each cell rests on below."""
    titles = {m: METHODS[m] for m in methods}
    lines = [
        f"Seeds {', '.join(map(str, seeds))}, each its own pre-training, label draw and new "
        "weights; mean, 95 % interval over test patients, +- between seeds. Frozen encoders.",
        "",
    ]
    for task, by_method in found.items():
        if task == CASE_REPORTS:
            lines += _case_reports(by_method, titles)
            continue
        first = next(iter(by_method.values()))[0]
        percents = [f["percent"] for f in first["fractions"]]
        test, of = first["data"]["splits"]["test"], first["fractions"][0]["fits"]
        lines += [
            f"**{task}**, {test['images']} test images of {test['patients']} patients, "
            f"{first['data']['splits']['train']['images']} training images "
            f"({of[0]['rows']} at {percents[0]:g} %)",
            "",
            "| method | score | " + " | ".join(f"{p:g} % of labels" for p in percents) + " |",
            "|---|---|" + "---|" * len(percents),
        ]
        for method, title in titles.items():
            if method not in by_method:
                lines.append(f"| {title} | | " + " | ".join(["not run"] * len(percents)) + " |")
                continue
            (result,) = by_method[method]
            each = [shown_scores(task, f) for f in result["fractions"]]
            for name in each[0]:
                cells_of = " | ".join(interval_text(scores[name]) for scores in each)
                lines.append(f"| {title} | {name} | {cells_of} |")
        lines += ["", *_verdicts(task, by_method, titles), "", *_groups(by_method, titles)]
    if known:
        lines += _label_free(known, titles)
    return "\n".join(lines) + "\n"


def _verdicts(task: str, by_method: dict[str, Any], titles: dict[str, str]) -> list[str]:
    """Each method against random weights and against plain contrast: the difference, and in how
    many seeds it is higher."""
    lines = []
    for base, name in (("random", "random weights"), ("clip", "plain contrast")):
        for method in titles:
            if method in ("random", base) or method not in by_method or base not in by_method:
                continue
            (result,), (other,) = by_method[method], by_method[base]
            for own, rest in zip(result["fractions"], other["fractions"], strict=True):
                told = _difference(result, other, own["percent"]) or _unpaired(task, own, rest)
                lines.append(f"- {method}, {own['percent']:g} %, against {name}: {told}")
    seconds = [f"{m} {r[0]['cell']['processor_s']:.0f} s" for m, r in by_method.items()]
    return [*lines, f"- processor time: {', '.join(seconds)}"]


def _difference(result: dict[str, Any], other: dict[str, Any], percent: float) -> str | None:
    """Paired over patients; None where a cell kept no scores of its images (boxes, older cells)."""
    folders: list[Path] = [r["folder"] for r in (result, other) if "folder" in r]
    if len(folders) < 2 or not all((folder / FILE).is_file() for folder in folders):
        return None
    own, rest = (load_predictions(folder) for folder in folders)
    method = f"{percent:g} %"
    found = compare([own], [rest], (method, method), resamples=2000, seed=0)["methods"][0]["mean"][
        0
    ]
    each = found["difference"]["seeds"]
    won = sum(value is not None and value > 0 for value in each)
    return (
        f"{NAMES.get(found['measure'], found['measure'])} {apart_text(found['difference'])}, "
        f"higher in {won} of {len(each)} seeds"
    )


def _unpaired(task: str, own: dict[str, Any], rest: dict[str, Any]) -> str:
    """Whether the two intervals are apart, which says less."""
    (name, a), b = next(iter(shown_scores(task, own).items())), shown_scores(task, rest)
    c = b[name]
    if a["low"] is None or c["low"] is None:
        return "n/a"
    apart = "above" if a["low"] > c["high"] else "below" if a["high"] < c["low"] else None
    pairs = zip(a["seeds"], c["seeds"], strict=True)
    won = sum(x is not None and y is not None and x > y for x, y in pairs)
    return (
        f"{name} {a['value'] - c['value']:+.3f}, "
        f"{f'{apart}, intervals apart' if apart else 'intervals overlap'}; "
        f"higher in {won} of {len(a['seeds'])} seeds"
    )


def _groups(by_method: dict[str, Any], titles: dict[str, str]) -> list[str]:
    """By subgroup, all labels: AUROC of each method, and its difference from all other rows."""
    subgroups = {m: r[0]["fractions"][-1]["scores"].get("subgroups") for m, r in by_method.items()}
    shown = [m for m in titles if subgroups.get(m)]
    if not shown:
        return []
    lines = [
        "by group, AUROC, and minus that of all other rows: "
        f"{by_method[shown[0]][0]['fractions'][-1]['percent']:g} % of labels",
        "",
        "| group | images (patients) | " + " | ".join(titles[m] for m in shown) + " |",
        "|---|---|" + "---|" * len(shown),
    ]
    for t, table in enumerate(subgroups[shown[0]]):
        for g, group in enumerate(table["groups"]):
            each = [subgroups[m][t]["groups"][g] for m in shown]
            lines.append(
                f"| {table['column']}: {group['name']} | {group['images']} ({group['patients']}) | "
                + " | ".join(
                    f"{interval_text(e['macro']['auroc'])}, {apart_text(e['difference']['auroc'])}"
                    for e in each
                )
                + " |"
            )
    return [*lines, ""]


def _case_reports(by_method: dict[str, Any], titles: dict[str, str]) -> list[str]:
    lines = [
        f"**{CASE_REPORTS}**: retrieval among the test reports of real cases, global head, "
        "a line a seed",
        "",
        "| method | seed | recall@10, image to text | text to image | chance | reports |",
        "|---|---|---|---|---|---|",
    ]
    for method, results in by_method.items():
        for result in results:
            whole = result["retrieval"]["whole"]
            both = [
                interval_text(whole["scores"][way]["recall@10"])
                for way in ("image_to_text", "text_to_image")
            ]
            lines.append(
                f"| {titles[method]} | {result['run']['seed']} | {both[0]} | {both[1]} | "
                f"{whole['chance']['recall@10']:.3f} | {whole['n']} |"
            )
    return [*lines, ""]


def _label_free(known: dict[str, Any], titles: dict[str, str]) -> list[str]:
    """Zero-shot, retrieval and pointing of the runs themselves: mean over seeds, least to most."""
    shown = [m for m in titles if known.get(m)]
    if not shown:
        return ["**without labels**: not run", ""]
    lines = [
        "**without labels**, each run on its own test patients: mean (least to most over seeds)",
        "",
        "| score | " + " | ".join(titles[m] for m in shown) + " |",
        "|---|" + "---|" * len(shown),
    ]
    for name in WITHOUT_LABELS:
        cells_of = []
        for method in shown:
            values = [e["value"] for e in known[method][name] if e and e["value"] is not None]
            mean = sum(values) / len(values) if values else None
            cells_of.append(
                "n/a" if mean is None else f"{mean:.3f} ({min(values):.3f} to {max(values):.3f})"
            )
        lines.append(f"| {name} | " + " | ".join(cells_of) + " |")
    return [*lines, ""]


def summary(found: dict[str, Any], known: dict[str, Any], seeds: tuple[int, ...]) -> dict[str, Any]:
    """Every score of every cell, with what it depends on."""
    return {
        "seeds": list(seeds),
        "without_labels": known,
        "tasks": {
            task: {method: [_of_cell(r) for r in results] for method, results in by_method.items()}
            for task, by_method in found.items()
        },
    }


def _of_cell(result: dict[str, Any]) -> dict[str, Any]:
    kept = {key: result[key] for key in ("run", "fingerprints", "versions", "cell")}
    if "fractions" not in result:
        return {**kept, "retrieval": result["retrieval"]["whole"]}
    subgroups = result["fractions"][-1]["scores"].get("subgroups")
    return {
        **kept,
        "data": result["data"],
        **({"subgroups": subgroups} if subgroups else {}),
        "fractions": {f"{f['percent']:g}": dict(rows_of(f["scores"])) for f in result["fractions"]},
    }
