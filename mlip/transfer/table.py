"""Scores in words for terminals and pages, and a trained task's results as lines of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

NAMES = {
    "auroc": "AUROC",
    "auprc": "AUPRC",
    "f1": "F1 (threshold of val)",
    "sensitivity": "sensitivity (threshold of val)",
    "specificity": "specificity (threshold of val)",
    "accuracy": "accuracy",
    "ece": "ECE",
    "ece_calibrated": "ECE, if calibrated",
    "published": "Dice, published form (empty = 1)",
    "dice": "Dice, published form (empty = 1)",
    "dice_positive": "Dice, images with truth only",
    "positive_only": "Dice, images with truth only",
    "pooled": "Dice, all pixels pooled",
    "strict": "mAP, strict (every image)",
    "compat": "mAP, published form",
    "recall@1": "recall@1",
    "recall@5": "recall@5",
    "recall@10": "recall@10",
    "hit": "pointing",
    "miou": "mIoU of the map",
    "froc": "FROC, mean at 1/8 to 8 false an image",
}


def rows_of(scores: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(name, Estimate with seeds) of a task's summary scores, the headline first."""
    if "macro" in scores:
        first = scores["headline"]
        for key in sorted(scores["macro"], key=lambda k: (k != first, k)):
            prefix = "macro " if key not in ("accuracy", "ece", "ece_calibrated") else ""
            yield prefix + NAMES[key], scores["macro"][key]
    elif "dice" in scores:
        for key in ("published", "positive_only", "pooled"):
            yield NAMES[key], scores["dice"][key]
    else:
        for key in ("strict", "compat"):
            yield NAMES[key], scores[key]
        yield NAMES["froc"], scores["froc"]["mean"]
        for rate in ("0.5", "1", "2"):
            yield f"boxes found at {rate} false an image", scores["froc"]["rates"][rate]


def headline_of(scores: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    return next(iter(rows_of(scores)))


def seeds_text(results: Mapping[str, Any]) -> str:
    count = len(results["run"]["seeds"])
    return "1 seed" if count == 1 else f"{count} seeds"


def number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.3f}"


def interval_text(estimate: Mapping[str, Any]) -> str:
    """value [low, high], n/a with its reason, the spread of the seeds, classes left out."""
    if estimate["value"] is None:
        return f"n/a ({estimate['reason']})"
    text = number(estimate["value"])
    if estimate["low"] is not None:
        text += f" [{estimate['low']:.3f}, {estimate['high']:.3f}]"
    if estimate.get("seed_sd") is not None:
        text += f", seeds +- {estimate['seed_sd']:.3f}"
    if left_out := classes_text(estimate):
        text += f", {left_out}"
    return text


def apart_text(difference: Mapping[str, Any]) -> str:
    """A difference with its sign and interval, or why it has none."""
    if difference["value"] is None:
        return "n/a"
    text = f"{difference['value']:+.3f}"
    if difference["reason"]:
        text += f" ({difference['reason']})"
    if difference["low"] is not None:
        text += f" [{difference['low']:+.3f}, {difference['high']:+.3f}]"
    return text


def possible_text(precision: Mapping[str, Any], k: int) -> str:
    """' of 0.29 possible' where classes of fewer than k rows hold even a perfect order below 1."""
    best = precision["best"][f"precision@{k}"]
    exists = precision[f"precision@{k}"]["value"] is not None
    return f" of {best:.2f} possible" if exists and best < 0.995 else ""


def classes_text(estimate: Mapping[str, Any], noun: str = "classes") -> str:
    """Over how many classes a mean is, "" where all count: means of others do not compare."""
    count, asked = estimate.get("classes"), estimate.get("classes_asked")
    return "" if count == asked or not count else f"over {count} of {asked} {noun}"


def table_lines(results: Mapping[str, Any]) -> list[str]:
    task, test = results["task"], results["data"]["splits"]["test"]
    lines = [
        f"{task['name']}, encoder {task['encoder']}, start {task['start']}; "
        f"{seeds_text(results)}; test: {test['images']} images of "
        f"{test['patients']} patients; 95 % intervals over patients"
    ]
    seen = results["data"].get("trained_on")
    if told := seen_text(seen, test["images"], test["patients"]):
        lines.append(told)
    for fraction in results["fractions"]:
        fits = fraction["fits"]
        images = sorted({fit["rows"] for fit in fits})
        shown = f"{images[0]}" if len(images) == 1 else f"{images[0]} to {images[-1]}"
        lines.append(f"{fraction['percent']:g} % of the training patients ({shown} images)")
        for name, estimate in rows_of(fraction["scores"]):
            lines.append(f"  {name:38s} {interval_text(estimate)}")
    # of the most labels alone: three fractions of every group are no lines that anybody reads
    return lines + subgroup_lines(results["fractions"][-1]["scores"].get("subgroups", ()))


def seen_text(found: Mapping[str, Any] | None, images: int, patients: int) -> str:
    """One sentence for terminal and page; "" of results that say nothing of it.

    images, patients  that were scored
    """
    if found is None:
        return ""
    if not found["manifests"]:
        why = found["unknown"]
        return f"whether it was trained on these patients is not known: {why}" if why else ""
    seen, alone = found["patients"], found["patients_by_id_alone"]
    by = f"compared by {', '.join(found['compared'])}"
    text = f"none of these patients found in training ({by})"
    if seen:
        text = (
            f"TRAINED ON: the model has been trained on films of {seen:,} of these {patients:,} "
            f"patients, {found['films']:,} of these {images:,} images among them ({by}): the "
            "scores are not of patients that it has never seen"
        )
    if alike := found.get("films_by_picture"):  # not in results of earlier versions
        text += (
            f"; SAME PICTURE: {alike:,} more of these images look like films in training, though "
            f"no id and no file says so, of {found['patients_by_picture']:,} more patients"
        )
    if alone:
        text += (
            f"; {alone:,} patients have the id of a patient in training, in a table that has no "
            "film in common: where both number the same patients, they are trained on too"
        )
    if found["unknown"]:
        text += f"; of the rest of its training nothing is known: {found['unknown']}"
    return text


def subgroup_lines(
    found: Sequence[Mapping[str, Any]], of: str = "", score: str = "AUROC"
) -> list[str]:
    """Each group's first score and how it differs from all other rows, for a terminal.

    of     what was asked, where it is not the findings of the images
    score  what a head's score is
    """
    lines = []
    for table in found:
        small = table["small_groups"]
        left_out = []
        if small["groups"]:
            left_out.append(
                f"{small['images']} images of {small['groups']} groups of too few patients"
            )
        if table["not_stated"]:
            left_out.append(f"{table['not_stated']} images do not state it")
        said = f" ({'; '.join(left_out)})" if left_out else ""
        lines.append(f"{of}by {table['column']}{said}")
        for group in table["groups"]:
            key = next(iter(group["macro"]), None)
            if key is None:
                lines.append(f"  {group['name']:24s} nothing to score")
                continue
            own, apart = group["macro"][key], apart_text(group["difference"][key])
            name = NAMES.get(key, f"{score}, {key}")
            lines.append(
                f"  {group['name']:24s} {name} {interval_text(own)}, minus the others' {apart} "
                f"({group['images']} images of {group['patients']} patients)"
            )
    return lines
