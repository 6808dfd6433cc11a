"""CheXpert's labels as `mlip label` gives them, against the MeSH indexing of the same reports.

Findings of linker_mesh.yaml that mean the label; labels without one there are not scored.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.intervals import share, with_interval
from benchmarks.linker_reports import Finding, Report
from mlip.knowledge.linker import Linker
from mlip.knowledge.report_labels import ReportLabels

MEANT = {
    "Atelectasis": ("atelectasis",),
    "Cardiomegaly": ("cardiomegaly",),
    "Consolidation": ("consolidation",),
    "Edema": ("edema",),  # the heading of congestion is among its own
    "Fracture": ("fracture",),
    "Lung Lesion": ("nodule", "mass"),
    "Lung Opacity": ("opacity",),
    "Pleural Effusion": ("effusion",),
    "Pneumonia": ("pneumonia",),
    "Pneumothorax": ("pneumothorax",),
    "Support Devices": ("device",),
}


def label_scores(
    reports: list[Report], linker: Linker, findings: list[Finding]
) -> dict[str, dict[str, Any]]:
    """Precision and recall of "present", of each label and over all, with intervals over reports;
    and of "No Finding" against the heading "normal"."""
    labels = ReportLabels(linker, (*MEANT, "No Finding"))
    said = [labels.states(report.text) for report in reports]
    by_name = {finding.name: finding for finding in findings}
    truth, found = {}, {}
    for label, names in MEANT.items():
        truth[label] = np.array(
            [any(by_name[name].is_indexed(report.headings) for name in names) for report in reports]
        )
    truth["No Finding"] = np.array(["normal" in report.headings for report in reports])
    for label in truth:
        found[label] = np.array([states.get(label) == "present" for states in said])
    return {
        "all": _rates([truth[label] for label in MEANT], [found[label] for label in MEANT]),
        **{label: _rates([truth[label]], [found[label]]) for label in truth},
    }


def _rates(truth: list[np.ndarray], found: list[np.ndarray]) -> dict[str, Any]:
    is_there, is_said = np.stack(truth, axis=1), np.stack(found, axis=1)
    right = (is_there & is_said).sum(axis=1)
    return {
        "positives": int(is_there.sum()),
        "precision": with_interval(np.stack([right, is_said.sum(axis=1)], axis=1), share),
        "recall": with_interval(np.stack([right, is_there.sum(axis=1)], axis=1), share),
    }
