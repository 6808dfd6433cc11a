"""Two models on the same images: how much better one scores, with an interval of the difference.

Two intervals side by side do not say it: both models err on the same patients. Here one draw of
patients serves both, so what is hard for both falls out of the difference.

Source:  paired bootstrap over patients (Efron and Tibshirani 1993, chapter 16); ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlip.transfer.array import Array
from mlip.transfer.measures.auroc import measured_auroc
from mlip.transfer.measures.interval import Measured, measured_mean, patient_resamples
from mlip.transfer.measures.means import less, mean_of_fits, mean_over, over_seeds
from mlip.transfer.measures.predictions import UNKNOWN, Predictions, PredictionsError, Series
from mlip.transfer.measures.subgroups import FEWEST_OF_EACH, enough, has_both

SCHEMA = 1
KIND = "comparison"
SIDES = ("a", "b", "difference")
ALIKE = "no patient on which they differ"  # why a difference of 0 has no interval
UNEVEN = "no finding that every fit learned"  # why a mean over findings is over none
TOO_FEW = f"fewer than {FEWEST_OF_EACH} patients with or without it"


@dataclass(frozen=True)
class _Unit:
    """Fits of both sides that stand against each other, and the patients that they are of."""

    a: tuple[Series, ...]
    b: tuple[Series, ...]
    pair: int

    @property
    def fits(self) -> set[tuple[int, str, int | None]]:
        """(pair, side, seed) of each."""
        return {(self.pair, name, s.seed) for name in ("a", "b") for s in getattr(self, name)}


def compare(
    own: Sequence[Predictions],
    others: Sequence[Predictions],
    methods: tuple[str, str] | None = None,
    *,
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    """The first minus the second side, for every method that both have, or the two asked for.

    own, others  one evaluation or several (pre-trainings of other seeds), pairs in their order
    methods      of the first and of the second side; None = each with the one of its name
    Returns: {"schema", "kind", "pairs", "split", "precision": {"a", "b": what each side was
             computed in}, "images", "patients", "methods": [{"a", "b",
             "findings": [{"finding", "measure", "n", "positives", "a", "b", "difference"}], "mean":
             [{"measure", "classes", "classes_asked", "a", "b", "difference"}]}], "not_compared"},
             of Estimates with "seeds", the fits' own values; a difference of two that never
             disagree has no interval, with that reason
    Raises:  PredictionsError for sides that are not of the same images, or share nothing
    """
    pairs = list(zip(own, others, strict=True)) if len(own) == len(others) else []
    if not pairs:
        raise PredictionsError(
            f"{len(own)} evaluations against {len(others)}: expected as many on both sides, in "
            "pairs"
        )
    for a, b in pairs:
        _require_same_images(a, b)
    chosen = _methods(pairs) if methods is None else [methods]
    weights = _Weights(pairs, resamples, seed)
    tables = [_table(pairs, weights, *names) for names in chosen]
    tables = [table for table in tables if table["findings"]]
    if not tables:
        raise PredictionsError(
            f"no finding is scored on both sides: the first has {_has(own)}; the second "
            f"{_has(others)}; --method names one of each"
        )
    return {
        "schema": SCHEMA,
        "kind": KIND,
        "pairs": [{"a": a.facts.get("name"), "b": b.facts.get("name")} for a, b in pairs],
        "split": pairs[0][0].facts.get("split"),
        "precision": {"a": _precisions(own), "b": _precisions(others)},
        "images": weights.images,
        "patients": weights.patients,
        "methods": tables,
        "not_compared": _left_out(pairs) if methods is None else [],
    }


def _precisions(sides: Sequence[Predictions]) -> list[str]:
    """What the scores of a side were computed in; nothing of files of earlier versions."""
    return sorted({side.facts["precision"] for side in sides if "precision" in side.facts})


def _require_same_images(a: Predictions, b: Predictions) -> None:
    names = f"{a.facts.get('name')} and {b.facts.get('name')}"
    for fact in ("manifest", "split"):
        if a.facts.get(fact) != b.facts.get(fact):
            raise PredictionsError(
                f"{names} are of another {fact}: rows of one mean nothing in the other; evaluate "
                "both on the same"
            )
    if a.patients.keys().isdisjoint(b.patients):
        raise PredictionsError(f"{names} have no image in common")


class _Weights:
    """Draws of patients by manifest: one draw serves all fits on it, other manifests have theirs.

    Of two manifests patients are taken for different ones.
    """

    def __init__(
        self, pairs: Sequence[tuple[Predictions, Predictions]], resamples: int, seed: int
    ) -> None:
        known: dict[Any, dict[int, int]] = {}
        for a, b in pairs:
            patient_of = known.setdefault(a.facts.get("manifest"), {})
            patient_of.update((r, p) for r, p in a.patients.items() if r in b.patients)
        self.images = sum(map(len, known.values()))
        self.patients = sum(len(set(patient_of.values())) for patient_of in known.values())
        drawn: dict[Any, tuple[Array, Array, Array]] = {}  # rows, patients, weights
        for place, (manifest, patient_of) in enumerate(known.items()):
            rows = np.array(sorted(patient_of))
            patients = np.array([patient_of[row] for row in rows.tolist()])
            weights = patient_resamples(patients, resamples, seed + place)
            drawn[manifest] = (rows, patients, weights)
        self._manifests = [a.facts.get("manifest") for a, _ in pairs]
        self._of = [drawn[manifest] for manifest in self._manifests]

    def manifest(self, pair: int) -> Any:
        return self._manifests[pair]

    def of(self, pair: int, rows: Array) -> tuple[Array, Array]:
        """(patients [n], weights [R, n]) of these rows."""
        every, patients, weights = self._of[pair]
        at = np.searchsorted(every, rows)
        return patients[at], weights[:, at]


def _methods(pairs: Sequence[tuple[Predictions, Predictions]]) -> list[tuple[str, str]]:
    """Those that every evaluation has, in the order of the first."""
    sides = [side for pair in pairs for side in pair]
    shared = set.intersection(*({s.method for s in side.series} for side in sides))
    return [(m, m) for m in dict.fromkeys(s.method for s in sides[0].series) if m in shared]


def _table(
    pairs: Sequence[tuple[Predictions, Predictions]], weights: _Weights, first: str, second: str
) -> dict[str, Any]:
    """Every finding that all evaluations score by these methods, and their mean by measure."""
    sides = [
        {s.key for s in side.series if s.method == method}
        for pair in pairs
        for side, method in zip(pair, (first, second), strict=True)
    ]
    shared = set.intersection(*sides)
    order = [s.key for s in pairs[0][0].series if s.method == first and s.key in shared]
    found = {key: _measured(_units(pairs, key, first, second), weights) for key in order}
    lines = []
    for (finding, measure), units in found.items():
        n, positives = units.counts
        lines.append(
            {
                "finding": finding,
                "measure": measure,
                "n": n,
                "positives": positives,
                **{name: _told(units.each, name, n) for name in SIDES},
            }
        )
    return {"a": first, "b": second, "findings": lines, "mean": _mean(found)}


def _units(
    pairs: Sequence[tuple[Predictions, Predictions]], key: tuple[str, str], first: str, second: str
) -> list[_Unit]:
    """Fits in pairs of equal seeds where both sides have the same; else all of a side as one."""
    units = []
    for place, (a, b) in enumerate(pairs):
        own = {s.seed: s for s in a.series if s.method == first and s.key == key}
        others = {s.seed: s for s in b.series if s.method == second and s.key == key}
        if own.keys() == others.keys():
            units += [_Unit((own[k],), (others[k],), place) for k in own]
        else:
            units.append(_Unit(tuple(own.values()), tuple(others.values()), place))
    return units


@dataclass(frozen=True)
class _Measures:
    each: list[dict[str, Measured | None]]  # of every unit: "a", "b", "difference"
    counts: tuple[int, int]  # rows, and those that carry it, of all manifests
    fits: set[tuple[int, str, int | None]]  # of all units


def _measured(units: Sequence[_Unit], weights: _Weights) -> _Measures:
    each: list[dict[str, Measured | None]] = []
    counts: dict[Any, tuple[int, int]] = {}
    for unit in units:
        rows, truth = _common(unit)
        patients, of = weights.of(unit.pair, rows)
        # fits on one manifest are of the same images
        counts[weights.manifest(unit.pair)] = (len(rows), int((truth == 1).sum()))
        measure = unit.a[0].measure
        is_told = has_both(truth == 1, patients) if measure == "auroc" else enough(patients)
        sides: list[Measured | None] = [None, None]
        if is_told:
            sides = [
                mean_of_fits([_score(s, rows, truth, of) for s in side])
                for side in (unit.a, unit.b)
            ]
        own, others = sides
        each.append({"a": own, "b": others, "difference": less(own, others)})
    joined = [sum(column) for column in zip(*counts.values(), strict=True)]
    fits = {fit for unit in units for fit in unit.fits}
    return _Measures(each, (joined[0], joined[1]), fits)


def _common(unit: _Unit) -> tuple[Array, Array]:
    """(rows of which every fit says something and the truth is known, their truth)"""
    fits = [*unit.a, *unit.b]
    asks_truth = fits[0].measure == "auroc"
    known = [s.rows[s.truth != UNKNOWN] if asks_truth else s.rows for s in fits]
    rows = known[0]
    for other in known[1:]:
        rows = np.intersect1d(rows, other)
    truths = [_at(s.rows, s.truth, rows) for s in fits]
    if asks_truth and any((truth != truths[0]).any() for truth in truths):
        count = max(int((truth != truths[0]).sum()) for truth in truths)
        raise PredictionsError(
            f"finding {fits[0].finding!r}: the two sides say otherwise of {count} images whether "
            "they have it: evaluate both with the same settings of labels"
        )
    return rows, truths[0]


def _at(rows: Array, values: Array, wanted: Array) -> Array:
    order = np.argsort(rows, kind="stable")
    return np.asarray(values[order[np.searchsorted(rows, wanted, sorter=order)]])


def _score(series: Series, rows: Array, truth: Array, weights: Array) -> Measured | None:
    values = _at(series.rows, series.scores, rows)
    if series.measure != "auroc":
        return measured_mean(values, weights)
    return measured_auroc(values, truth == 1, weights)


def _mean(found: Mapping[tuple[str, str], _Measures]) -> list[dict[str, Any]]:
    """Of each measure the mean over the findings that every fit has it of."""
    means = []
    for measure in dict.fromkeys(key[1] for key in found):
        asked = [units for key, units in found.items() if key[1] == measure]
        every = {fit for units in asked for fit in units.fits}
        # a fit whose training rows could not teach a finding says nothing of it
        learned = [units for units in asked if units.fits == every]
        kept = [units for units in learned if all(None not in unit.values() for unit in units.each)]
        rows = max((units.counts[0] for units in kept), default=0)
        fits = [
            {name: _over_findings(of_fit, name) for name in SIDES}
            for of_fit in zip(*(units.each for units in kept), strict=True)
        ]
        reason = TOO_FEW if learned else UNEVEN
        means.append(
            {
                "measure": measure,
                "classes": len(kept),
                "classes_asked": len(asked),
                **{name: _told(fits, name, rows, reason) for name in SIDES},
            }
        )
    return means


def _told(
    fits: Sequence[Mapping[str, Measured | None]], name: str, rows: int, reason: str = TOO_FEW
) -> dict[str, Any]:
    """The mean over fits; rows are of all manifests, of which each fit knows its own.

    reason  why there is none
    """
    found = over_seeds([fit[name] for fit in fits], reason)
    if found["value"] is None:
        return found
    if name == "difference" and found["value"] == found["low"] == found["high"] == 0.0:
        # an interval without width would say that no other patient can tell the two apart
        return {**found, "n": rows, "low": None, "high": None, "reason": ALIKE}
    return {**found, "n": rows}


def _over_findings(units: Sequence[Mapping[str, Measured | None]], name: str) -> Measured:
    measured = [m for unit in units if (m := unit[name]) is not None]
    return mean_over(measured, max(m.n for m in measured))


def _left_out(pairs: Sequence[tuple[Predictions, Predictions]]) -> list[str]:
    """Methods and findings that not every evaluation has."""
    sides = [{(s.method, s.finding) for s in side.series} for pair in pairs for side in pair]
    every, shared = set.union(*sides), set.intersection(*sides)
    lost = {m for m, _ in every} - {m for m, _ in shared}
    single = sorted({finding for m, finding in every - shared if m not in lost})
    return sorted(f"method {method}" for method in lost) + [f"finding {f}" for f in single]


def is_comparison(path: Path) -> bool:
    """Whether it is a file of what compare gives, as JSON."""
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        return f'"kind": "{KIND}"'.encode() in stream.read(100)


def _has(sides: Sequence[Predictions]) -> str:
    return ", ".join(dict.fromkeys(s.method for side in sides for s in side.series)) or "none"
