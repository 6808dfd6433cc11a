"""Yes or no: a threshold chosen on val, and how often its answers are right on test.

Rates that a reader of images asks for (sensitivity, specificity, predictive values), with their
form under many resamples at once. A share of nothing is NaN, never 0 or 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mlip.settings.transfer import threshold_rule
from mlip.transfer.array import Array
from mlip.transfer.measures.interval import (
    Measured,
    bounded,
    marks_of_patients,
    require_finite_scores,
    weighted_sum,
)

RATES = ("f1", "sensitivity", "specificity", "ppv", "npv")
# of these a mean over findings is told; what predictive values say hangs on how common a finding is
MEANT = ("f1", "sensitivity", "specificity")
# of a group of patients: the others move with how common a finding is in it
BY_GROUP = ("sensitivity", "specificity")
UNDEFINED = {
    "f1": "no row carries it",
    "sensitivity": "no row carries it",
    "specificity": "every row carries it",
    "ppv": "no row is called positive",
    "npv": "every row is called positive",
}


def choose_threshold(scores: Array, labels: Array, rule: str) -> float | None:
    """The score at or above which a row is called positive; None where val cannot tell.

    rule  evaluate.threshold_rule: "f1" and "youden" (sensitivity + specificity - 1) take the best
          of all thresholds, of equal ones the highest, which calls the fewest positive;
          "sensitivity=S" the highest that calls at least S of the positives, "specificity=S" the
          lowest that leaves at least S of the negatives alone
    Shapes:  scores, labels [n], of val
    Raises:  ValueError on a score that is not finite.
    """
    require_finite_scores(scores)
    name, share = threshold_rule(rule)
    labels = labels.astype(bool)
    positives, negatives = int(labels.sum()), int((~labels).sum())
    needed = {"f1": positives, "sensitivity": positives, "specificity": negatives}
    if not needed.get(name, min(positives, negatives)):
        return None
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    ends = np.flatnonzero(np.r_[ranked[1:] != ranked[:-1], True])
    hits = np.cumsum(labels[order])[ends]
    false = ends + 1 - hits
    if name == "f1":
        return float(ranked[ends[int(np.argmax(2.0 * hits / (ends + 1 + positives)))]])
    # shares compared as counts: 0.9 of 10 is 9, whatever 9 / 10 is in binary
    if name == "youden":
        return float(ranked[ends[int(np.argmax(hits * negatives - false * positives))]])
    if name == "sensitivity":
        return float(ranked[ends[int(np.argmax(hits >= share * positives - 1e-9))]])
    kept = np.flatnonzero(negatives - false >= share * negatives - 1e-9)
    # the highest score of val is a negative's: only a threshold above all of them is left
    return float(ranked[ends[kept[-1]]] if len(kept) else np.nextafter(ranked[0], np.inf))


def weighted_rates(called: Array, labels: Array, weights: Array) -> dict[str, Array]:
    """RATES under each row of weights [R, N] -> [R] each; NaN where there is nothing to share.

    Shapes:  called, labels [N] bool
    """
    called, labels = called.astype(bool), labels.astype(bool)
    # counts are whole numbers, so what is told by differences is exact; weights are read once
    each = np.stack([called & labels, called, labels], axis=1)
    (hits, yes, positive), total = weighted_sum(each, weights).T, weights.sum(axis=1)
    no, negative = total - yes, total - positive
    silent = no - (positive - hits)
    with np.errstate(invalid="ignore", divide="ignore"):
        return {
            "f1": np.where(positive > 0, 2.0 * hits / (yes + positive), np.nan),
            "sensitivity": hits / positive,
            "specificity": silent / negative,
            "ppv": hits / yes,
            "npv": silent / no,
        }


def rates(
    called: Array, labels: Array, weights: Array, names: Sequence[str] = RATES
) -> dict[str, Measured]:
    """Each of these RATES with its resamples and the number of rows that it is a share of."""
    labels, called = labels.astype(bool), called.astype(bool)
    value = weighted_rates(called, labels, np.ones((1, len(labels))))
    under = weighted_rates(called, labels, weights)
    of = {
        "f1": labels,  # what is neither called nor there is in no F1
        "sensitivity": labels,
        "specificity": ~labels,
        "ppv": called,
        "npv": ~called,
    }
    marks = marks_of_patients(weights)
    found = {
        name: bounded(float(value[name][0]), under[name], int(of[name].sum()), marks[:, of[name]])
        for name in names
    }
    return {
        name: one._replace(n=len(labels)) if name == "f1" else one for name, one in found.items()
    }
