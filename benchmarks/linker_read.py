"""What `mlip label` says of reports that were read by hand: found, denied and doubted apart.

MeSH indexing knows what is there, not what a report denies. 150 reports of the development half and
100 of the test half, drawn by a seed, were read, and of each of CheXpert's labels was written down
whether the text states (P), denies (A) or doubts (U) it or says nothing, before the linker saw the
report (linker_read.csv: ids and letters, no text). How they were read: docs/knowledge.md.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.intervals import share, with_interval
from benchmarks.linker_reports import Report
from mlip.knowledge.linker import Linker
from mlip.knowledge.report_labels import ReportLabels

READ = Path(__file__).with_name("linker_read.csv")
DRAWS = {"dev": (150, 28), "test": (100, 29)}  # reports, seed
STATES = {"present": "P", "absent": "A", "uncertain": "U"}
NO_FINDING, DEVICES = "No Finding", "Support Devices"


def drawn(reports: list[Report], half: str) -> list[Report]:
    """The reports of a half that were read, in order of their id."""
    own = [report for report in reports if report.is_test == (half == "test")]
    count, seed = DRAWS[half]
    rows = np.random.default_rng(seed).choice(len(own), count, replace=False)
    return [own[row] for row in sorted(rows)]


def read_letters(path: Path = READ) -> tuple[tuple[str, ...], dict[str, tuple[str, ...]]]:
    """(labels, report id -> a letter for each or "").

    "No Finding" follows from the others as in CheXpert: stated where none but devices is stated or
    doubted, else denied.
    """
    with path.open(encoding="utf-8", newline="") as stream:
        header, *rows = csv.reader(stream)
    labels = tuple(header[1:])
    letters = {}
    for identifier, *row in rows:
        counted = [x for label, x in zip(labels, row, strict=True) if label != DEVICES]
        none = "A" if {"P", "U"} & set(counted) else "P"
        letters[identifier] = (*row, none)
    return (*labels, NO_FINDING), letters


def read_scores(reports: list[Report], linker: Linker) -> dict[str, Any]:
    """Of each half precision and recall of each state over all labels but "No Finding", and of
    what is stated and denied label by label; intervals over reports."""
    labels, letters = read_letters()
    asked = ReportLabels(linker, labels)
    result: dict[str, Any] = {}
    for half in DRAWS:
        chosen = [report for report in drawn(reports, half) if report.id in letters]
        if not chosen:
            continue
        truth = np.array([letters[report.id] for report in chosen])
        said = [asked.states(report.text) for report in chosen]
        found = np.array([[STATES.get(s.get(label, ""), "") for label in labels] for s in said])
        real = [i for i, label in enumerate(labels) if label != NO_FINDING]
        result[half] = {
            "reports": len(chosen),
            "all": {
                state: _rates(truth[:, real] == letter, found[:, real] == letter)
                for state, letter in STATES.items()
            },
            "labels": {
                label: {
                    state: _rates(truth[:, [i]] == letter, found[:, [i]] == letter)
                    for state, letter in (("present", "P"), ("absent", "A"))
                }
                for i, label in enumerate(labels)
            },
        }
    return result


def _rates(truth: np.ndarray, found: np.ndarray) -> dict[str, Any]:
    """truth, found [reports, labels] bool."""
    right = (truth & found).sum(axis=1)
    return {
        "read": int(truth.sum()),
        "said": int(found.sum()),
        "right": int(right.sum()),
        "precision": with_interval(np.stack([right, found.sum(axis=1)], axis=1), share),
        "recall": with_interval(np.stack([right, truth.sum(axis=1)], axis=1), share),
    }


def page_table(result: dict[str, Any]) -> str:
    """The table of docs/knowledge.md; rates of less than ten cases are left out."""
    lines = ["| read by hand | stated: n | precision | recall | denied: n | precision | recall |"]
    lines.append("|---" * 7 + "|")
    for half, name in (("test", "test half"), ("dev", "development half")):
        scores = result[half]
        row = [f"{name}, {scores['reports']} reports"]
        for state in ("present", "absent"):
            rates = scores["all"][state]
            row += [str(rates["read"]), _cell(rates["precision"]), _cell(rates["recall"])]
        lines.append(f"| {' | '.join(row)} |")
    for label, by_state in result["test"]["labels"].items():
        if all(rates["read"] < 10 for rates in by_state.values()):
            continue
        row = [f"test half, {label}"]
        for state in ("present", "absent"):
            rates = by_state[state]
            enough = (rates["said"] >= 10, rates["read"] >= 10)
            kinds = ("precision", "recall")
            row.append(str(rates["read"]))
            row += [
                f"{rates[kind]['value']:.2f}" if many else "-"
                for kind, many in zip(kinds, enough, strict=True)
            ]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def _cell(rate: dict[str, float]) -> str:
    return f"{rate['value']:.3f} ({rate['low']:.3f} to {rate['high']:.3f})"
