"""Zero-shot classification: a finding is scored by what is said of it, never by a trained head.

Each finding has positive and negative wordings. Its score on an image is the mean similarity with
the positive wordings minus the mean similarity with the negative ones, so that a finding merely
being named does not count. Three similarities are reported: the global heads' cosine, the
token-knowledge-patch score, and both together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlip.dataloading.progress import Progress
from mlip.transfer.array import Array
from mlip.transfer.measures.auroc import auroc_of, measured_auroc
from mlip.transfer.measures.interval import (
    Estimate,
    Measured,
    estimate,
    mean_estimate,
    not_available,
)
from mlip.transfer.measures.means import over_findings
from mlip.transfer.measures.operating_point import (
    BY_GROUP,
    MEANT,
    RATES,
    UNDEFINED,
    choose_threshold,
    rates,
)
from mlip.transfer.measures.subgroups import Measure, Measures, has_both

NONE_HAS_BOTH = "no finding has both classes"


@dataclass(frozen=True)
class Prompts:
    """The wordings of one finding."""

    finding: str  # key of the labels
    name: str  # for people
    positive: tuple[str, ...]
    negative: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.positive or not self.negative:
            raise ValueError(
                f"prompts of {self.finding!r}: expected at least one positive and one negative "
                f"wording, got {len(self.positive)} and {len(self.negative)}"
            )


def prompt_texts(prompts: Sequence[Prompts]) -> list[str]:
    """All wordings in the order finding_scores expects: per finding positives, then negatives."""
    return [text for p in prompts for text in (*p.positive, *p.negative)]


def finding_scores(similarity: Array, prompts: Sequence[Prompts]) -> Array:
    """Similarities [images, wordings] -> positive minus negative means [images, findings]."""
    columns, start = [], 0
    for p in prompts:
        middle = start + len(p.positive)
        end = middle + len(p.negative)
        columns.append(
            similarity[:, start:middle].mean(axis=1) - similarity[:, middle:end].mean(axis=1)
        )
        start = end
    if start != similarity.shape[1]:
        raise ValueError(f"expected {start} wordings, got {similarity.shape[1]} columns")
    return np.stack(columns, axis=1)


def combine(
    global_similarity: Array, local_similarity: Array, global_scale: float, local_scale: float
) -> Array:
    """The sum of the two losses' logits: each learned scale says how far its score can be trusted.

    Source:  ours. Nothing is fitted on the evaluated images (z-scoring over them, as GLoRIA does,
             makes a score depend on who else is in the test set).
    """
    return global_scale * global_similarity + local_scale * local_similarity


def evaluate_zero_shot(
    scores: Mapping[str, Array],
    labels: Array,
    prompts: Sequence[Prompts],
    weights: Array,
) -> dict[str, Any]:
    """AUROC per finding and head, macro and worst, with patient-level intervals.

    Shapes:  scores {head: [images, findings]}; labels [images, findings], 1, 0, or -1 where the
             row says nothing about the finding (left out of that finding); weights [R, images]
    Returns: {"findings": [{finding, name, positives, n, <head>: Estimate, ...}],
             "macro": {head: Estimate with "classes" of "classes_asked"},
             "worst": {head: Estimate with "finding"}}
             A finding without both classes is value None with the reason, and leaves the macro.
    """
    table: list[dict[str, Any]] = []
    kept: dict[str, list[Measured | None]] = {head: [] for head in scores}
    told = Progress("findings scored, with their intervals")
    for f, p in enumerate(prompts):
        told(f, len(prompts))
        known = labels[:, f] >= 0
        truth = labels[known, f] > 0
        row: dict[str, Any] = {
            "finding": p.finding,
            "name": p.name,
            "positives": int(truth.sum()),
            "n": int(known.sum()),
            "chance": 0.5,
        }
        for head, values in scores.items():
            area = measured_auroc(values[known, f], truth, weights[:, known])
            row[head] = auroc_of(area, truth)
            kept[head].append(area)
        table.append(row)
    return {
        "findings": table,
        # one resample of patients serves all findings, so their errors stay correlated in the mean
        "macro": {head: over_findings(areas, NONE_HAS_BOTH) for head, areas in kept.items()},
        "worst": {head: _worst(table, head) for head in scores},
        "wordings": {
            p.finding: {"positive": list(p.positive), "negative": list(p.negative)} for p in prompts
        },
    }


def _worst(table: list[dict[str, Any]], head: str) -> dict[str, Any]:
    defined = [row for row in table if row[head]["value"] is not None]
    if not defined:
        return {**not_available(NONE_HAS_BOTH), "finding": None}
    lowest = min(defined, key=lambda row: row[head]["value"])
    return {**lowest[head], "finding": lowest["finding"]}


Thresholds = Mapping[str, Sequence[float | None]]  # of each head and finding


def choose_thresholds(val_scores: Mapping[str, Array], val_labels: Array, rule: str) -> Thresholds:
    """A threshold of each head and finding by evaluate.threshold_rule; None where val cannot tell.

    Shapes:  val_scores {head: [images, findings]}, val_labels alike, -1 = not said
    """
    known = val_labels >= 0
    return {
        head: [
            choose_threshold(values[known[:, f], f], val_labels[known[:, f], f] > 0, rule)
            for f in range(val_labels.shape[1])
        ]
        for head, values in val_scores.items()
    }


def at_thresholds(
    scores: Mapping[str, Array], labels: Array, thresholds: Thresholds, weights: Array
) -> dict[str, Any]:
    """RATES of each finding and head at its threshold, with intervals.

    Shapes:  scores {head: [images, findings]}, labels alike with -1 = not said; weights [R, images]
    Returns: {"findings": [{head: {"threshold", rate: Estimate, ...}}], "macro": {head: {rate of
             MEANT: Estimate}}}; a rate that val or test cannot give is value None with the reason
    """
    table: list[dict[str, Any]] = [{} for _ in range(labels.shape[1])]
    macro: dict[str, dict[str, dict[str, Any]]] = {}
    told = Progress("heads scored at their thresholds")
    for done, (head, values) in enumerate(scores.items()):
        told(done, len(scores))
        kept: dict[str, list[Measured | None]] = {name: [None] * len(table) for name in MEANT}
        for f, row in enumerate(table):
            known, cut = labels[:, f] >= 0, thresholds[head][f]
            row[head] = {"threshold": cut}
            if cut is None:
                reason = "val does not carry the finding in both kinds of rows"
                row[head] |= {name: not_available(reason, int(known.sum())) for name in RATES}
                continue
            found = rates(values[known, f] >= cut, labels[known, f] > 0, weights[:, known])
            for name, rate in found.items():
                is_there = bool(np.isfinite(rate.value))
                row[head][name] = (
                    estimate(*rate) if is_there else not_available(UNDEFINED[name], rate.n)
                )
                if is_there and name in kept:
                    kept[name][f] = rate
        macro[head] = {
            name: over_findings(of_findings, "no finding has a threshold")
            for name, of_findings in kept.items()
        }
    return {"findings": table, "macro": macro}


def zero_shot_measures(
    scores: Mapping[str, Array],
    labels: Array,
    findings: Sequence[str],
    thresholds: Thresholds,
    weights: Array,
    patients: Array,
) -> Measure:
    """What some of the images score, for subgroup_scores: AUROC of each head, and sensitivity and
    specificity at the thresholds that serve all images ("global_sensitivity").

    Shapes:  as at_thresholds; patients [images]. thresholds may be empty
    """

    def measure(inside: Array) -> Measures:
        classes: dict[str, dict[str, Measured]] = {}
        counts = {}
        for f, finding in enumerate(findings):
            rows = inside & (labels[:, f] >= 0)
            truth, of = labels[rows, f] > 0, weights[:, rows]
            counts[finding] = (len(truth), int(truth.sum()))
            classes[finding] = found = {}
            if not has_both(truth, patients[rows]):
                continue
            for head, values in scores.items():
                area = measured_auroc(values[rows, f], truth, of)
                assert area is not None
                found[head] = area
            for head, cuts in thresholds.items():
                cut = cuts[f]
                if cut is not None:
                    called = scores[head][rows, f] >= cut
                    for name, rate in rates(called, truth, of, BY_GROUP).items():
                        found[f"{head}_{name}"] = rate
        return Measures(classes, counts)

    return measure


def exclusive_accuracy(
    scores: Mapping[str, Array], labels: Array, weights: Array
) -> dict[str, dict[str, Estimate]]:
    """Share of images whose one finding scores highest, as CheXpert 5x200 is read.

    "plain" compares scores as they are. "z_normalised" first takes each finding's mean and spread
    over the evaluated images out (GLoRIA's habit): it then depends on who else is in the test set.
    Rows without exactly one finding are left out.
    """
    one = (labels > 0).sum(axis=1) == 1
    truth = (labels[one] > 0).argmax(axis=1)
    found: dict[str, dict[str, Estimate]] = {}
    for head, values in scores.items():
        chosen = values[one]
        spread = chosen.std(axis=0) if len(chosen) else np.ones(values.shape[1])
        normal = (chosen - chosen.mean(axis=0)) / np.where(spread > 0, spread, 1.0)
        found[head] = {
            name: mean_estimate((shown.argmax(axis=1) == truth).astype(np.float64), weights[:, one])
            for name, shown in (("plain", chosen), ("z_normalised", normal))
        }
    return found
