"""What a classifier's logits are worth: per class, macro, with intervals over patients.

A score that cannot be computed is None with the reason: a class without both kinds of test rows,
or one that the training draw showed in one kind only (its constant output would read as 0.5).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mlip.dataloading.progress import Progress
from mlip.transfer.array import Array
from mlip.transfer.measures.auroc import auroc, measured_auroc
from mlip.transfer.measures.interval import Measured, bounded, marks_of_patients, measured_mean
from mlip.transfer.measures.means import mean_of_fits, mean_over, over_seeds
from mlip.transfer.measures.operating_point import (
    BY_GROUP,
    MEANT,
    RATES,
    UNDEFINED,
    choose_threshold,
    rates,
)
from mlip.transfer.measures.scores import (
    average_precision,
    calibration_error,
    confusion,
    curve,
    weighted_average_precision,
)
from mlip.transfer.measures.subgroups import Measure, Measures, has_both

IGNORED = -1  # a target that is not known
KEYS = ("auroc", "auprc", *RATES, "accuracy", "ece", "ece_calibrated")
Prediction = dict[str, Array]  # "val" and "test" logits [n, classes], "learnt" [classes] bool


def label_scores(
    predictions: Sequence[Prediction],
    targets: Array,
    val_targets: Array,
    weights: Array,
    classes: Sequence[str],
    rule: str,
) -> dict[str, Any]:
    """Independent labels, one prediction a seed.

    Shapes:  targets [test, classes], val_targets [val, classes] of 1, 0, IGNORED; weights [R, test]
    Returns: {"classes": [{class, n, positives, auroc, auprc, RATES, accuracy, ece,
               ece_calibrated, threshold_logits, ...}],
             "macro": {auroc, auprc, MEANT}, "headline": "auroc"}; RATES and accuracy at the
             threshold that val chose by `rule`; a macro score says over how many classes it is
    """
    table: list[dict[str, Any]] = []
    cuts = _thresholds(predictions, val_targets, rule)
    kept: dict[str, list[list[Measured]]] = {key: [] for key in ("auroc", "auprc", *MEANT)}
    told = Progress("classes scored, with their intervals")
    for k, name in enumerate(classes):
        told(k, len(classes))
        known = targets[:, k] != IGNORED
        truth, w = targets[known, k] == 1, weights[:, known]
        row: dict[str, Any] = {"class": name, "n": len(truth), "positives": int(truth.sum())}
        thresholds = [of_seed[k] for of_seed in cuts]
        logits = [p["test"][known, k].astype(np.float64) for p in predictions]
        fits = [
            _binary(logit, truth, w, threshold) if p["learnt"][k] else {}
            for p, logit, threshold in zip(predictions, logits, thresholds, strict=True)
        ]
        reason = _reason(truth, predictions, k)
        for key in KEYS:
            values = [fit.get(key) for fit in fits]
            defined = [v for v in values if v is not None]
            is_scored = len(defined) == len(values)
            # a rate of nothing, as the positive predictive value where no row is called positive
            row[key] = over_seeds(values, UNDEFINED.get(key, reason) if is_scored else reason)
            if key in kept and is_scored:
                kept[key].append(defined)
        row["threshold_logits"] = thresholds
        if predictions[0]["learnt"][k]:
            row |= _drawn(logits[0], truth, thresholds[0])
        table.append(row)
    return {
        "classes": table,
        "macro": {
            key: _macro(values, len(targets), [row[key]["reason"] for row in table])
            for key, values in kept.items()
        },
        "headline": "auroc",
    }


def _drawn(logit: Array, truth: Array, threshold: float | None) -> dict[str, Any]:
    """The curves of one fit, and its confusion; {} where test shows one kind of rows."""
    if truth.all() or not truth.any():
        return {}
    drawn: dict[str, Any] = {"curve": curve(logit, truth)}
    if threshold is not None:
        called = (logit >= threshold).astype(int)
        drawn["confusion"] = confusion(called, truth.astype(int), 2)
    return drawn


def _thresholds(
    predictions: Sequence[Prediction], val_targets: Array, rule: str
) -> list[list[float | None]]:
    """Of each seed and class, on val's rows that say something of the class."""
    known = val_targets != IGNORED
    return [
        [
            choose_threshold(
                p["val"][known[:, k], k].astype(np.float64), val_targets[known[:, k], k] == 1, rule
            )
            for k in range(val_targets.shape[1])
        ]
        for p in predictions
    ]


def label_measures(
    predictions: Sequence[Prediction],
    targets: Array,
    val_targets: Array,
    weights: Array,
    classes: Sequence[str],
    rule: str,
    patients: Array,
) -> Measure:
    """What some of the test rows score over the seeds' fits, for subgroup_scores: AUROC, and
    sensitivity and specificity at the thresholds that serve all rows.

    AUPRC and predictive values are left out: they move with how common a finding is in a group.
    Shapes:  as label_scores; patients [test]
    """
    cuts = _thresholds(predictions, val_targets, rule)

    def measure(inside: Array) -> Measures:
        found: dict[str, dict[str, Measured]] = {}
        counts = {}
        for k, name in enumerate(classes):
            rows = inside & (targets[:, k] != IGNORED)
            truth, of = targets[rows, k] == 1, weights[:, rows]
            counts[name] = (len(truth), int(truth.sum()))
            found[name] = {}
            if not has_both(truth, patients[rows]):
                continue
            each: list[dict[str, Measured]] = []
            for p, own in zip(predictions, cuts, strict=True):
                if not p["learnt"][k]:
                    continue
                logit, cut = p["test"][rows, k].astype(np.float64), own[k]
                area = measured_auroc(logit, truth, of)
                assert area is not None
                told = {} if cut is None else rates(logit >= cut, truth, of, BY_GROUP)
                each.append({**told, "auroc": area})
            for key in ("auroc", *BY_GROUP):
                joined = mean_of_fits([fit.get(key) for fit in each])
                if joined is not None:
                    found[name][key] = joined
        return Measures(found, counts)

    return measure


def exclusive_measures(
    predictions: Sequence[Prediction],
    targets: Array,
    weights: Array,
    classes: Sequence[str],
    patients: Array,
) -> Measure:
    """What some of the test rows score over the seeds' fits: accuracy, and AUROC of each class.

    Of two classes the second stands for both: the AUROC of one against the other is one number.
    """
    shown = list(enumerate(classes))[-1:] if len(classes) == 2 else list(enumerate(classes))
    truth = targets.argmax(axis=1)
    probabilities = [softmax(p["test"].astype(np.float64)) for p in predictions]

    def measure(inside: Array) -> Measures:
        of = weights[:, inside]
        found: dict[str, dict[str, Measured]] = {}
        counts = {}
        for k, name in shown:
            is_true = truth[inside] == k
            counts[name] = (len(is_true), int(is_true.sum()))
            found[name] = {}
            if not has_both(is_true, patients[inside]):
                continue
            areas: list[Measured | None] = []
            for p, probability in zip(predictions, probabilities, strict=True):
                if p["learnt"][k]:
                    areas.append(measured_auroc(probability[inside, k], is_true, of))
            joined = mean_of_fits(areas)
            if joined is not None:
                found[name]["auroc"] = joined
        right = [(p[inside].argmax(axis=1) == truth[inside]).astype(float) for p in probabilities]
        accuracy = mean_of_fits([measured_mean(r, of) for r in right if len(r)])
        return Measures(found, counts, {} if accuracy is None else {"accuracy": accuracy})

    return measure


def _reason(truth: Array, predictions: Sequence[Prediction], k: int) -> str:
    if truth.all() or not truth.any():
        return f"{int(truth.sum())} of {len(truth)} test rows carry the class"
    if not any(p["learnt"][k] for p in predictions):
        return "the training draw shows the class in one kind of rows only"
    return "val shows the class in one kind of rows only: there is no threshold"


def exclusive_scores(
    predictions: Sequence[Prediction], targets: Array, weights: Array, classes: Sequence[str]
) -> dict[str, Any]:
    """One class is true of each row: accuracy of the best class, AUROC of each against the rest."""
    truth, n = targets.argmax(axis=1), len(targets)
    found: dict[str, list[Measured | None]] = {"accuracy": [], "ece": [], "ece_calibrated": []}
    areas: list[list[Measured | None]] = [[] for _ in classes]
    for p in predictions:
        probability = softmax(p["test"].astype(np.float64))
        right = (probability.argmax(axis=1) == truth).astype(np.float64)
        confidence = probability.max(axis=1)
        found["accuracy"].append(measured_mean(right, weights))
        for key, measured in _calibration(confidence, right, weights).items():
            found[key].append(measured)
        for k in range(len(classes)):
            own = measured_auroc(probability[:, k], truth == k, weights)
            areas[k].append(own if p["learnt"][k] else None)
    first = softmax(predictions[0]["test"].astype(np.float64))
    table: list[dict[str, Any]] = []
    for k, name in enumerate(classes):
        is_true = truth == k
        row: dict[str, Any] = {
            "class": name,
            "n": n,
            "positives": int(is_true.sum()),
            "auroc": over_seeds(areas[k], _reason(is_true, predictions, k)),
        }
        if is_true.any() and not is_true.all():
            row["curve"] = curve(first[:, k], is_true)
        table.append(row)
    defined = [[m for m in ms if m is not None] for ms in areas if None not in ms]
    return {
        "classes": table,
        "macro": {
            **{key: over_seeds(values) for key, values in found.items()},
            "auroc": _macro(defined, n, [row["auroc"]["reason"] for row in table]),
        },
        "confusion": confusion(first.argmax(axis=1), truth, len(classes)),
        "headline": "accuracy",
    }


def macro_auroc(logits: Array, targets: Array) -> float | None:
    """Mean AUROC over the classes that have both kinds of rows; None where none has."""
    values = []
    for k in range(targets.shape[1]):
        known = targets[:, k] != IGNORED
        value = auroc(logits[known, k], targets[known, k] == 1)
        if value is not None:
            values.append(value)
    return float(np.mean(values)) if values else None


def _binary(
    logit: Array, truth: Array, weights: Array, threshold: float | None
) -> dict[str, Measured | None]:
    """One class and one fit; a score without its ingredients is None."""
    n = len(truth)
    if truth.all() or not truth.any():
        return {}
    area, precision = measured_auroc(logit, truth, weights), average_precision(logit, truth)
    assert area is not None and precision is not None
    of_precision = weighted_average_precision(logit, truth, weights)
    probability = 1.0 / (1.0 + np.exp(-np.clip(logit, -500, 500)))  # exp overflows past 709
    found: dict[str, Measured | None] = {
        "auroc": area,
        "auprc": bounded(precision, of_precision, n, marks_of_patients(weights)[:, truth]),
        **_calibration(probability, truth, weights),
    }
    if threshold is not None:
        called = logit >= threshold
        right = (called == truth).astype(np.float64)
        found["accuracy"] = measured_mean(right, weights)
        found |= rates(called, truth, weights)
    return found


def _calibration(confidence: Array, right: Array, weights: Array) -> dict[str, Measured]:
    """The error and that of a calibrated model, both without an interval."""
    none = np.full(len(weights), np.nan)
    error, by_chance = calibration_error(confidence, right)
    return {
        "ece": Measured(error, none, len(right)),
        "ece_calibrated": Measured(by_chance, none, len(right)),
    }


def _macro(values: list[list[Measured]], n: int, reasons: Sequence[str | None]) -> dict[str, Any]:
    """Mean over classes for each seed, then over seeds; values [class][seed].

    reasons  why each class of the table has no score, None where it has one
    Returns: over_seeds with "classes" (how many count: those with a score for every seed) of
             "classes_asked"
    """
    counted = {"classes": len(values), "classes_asked": len(reasons)}
    if not values:
        first = next((reason for reason in reasons if reason), "not all seeds have a score")
        reason = first if len(reasons) == 1 else f"no class has it; the first: {first}"
        return {**over_seeds([], reason), **counted}
    seeds = [mean_over(of_seed, n) for of_seed in zip(*values, strict=True)]
    return {**over_seeds(seeds), **counted}


def softmax(logits: Array) -> Array:
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)
