"""A run's page: one self-contained HTML file that says what was learned and how sure that is.

write_report puts it together; the drawings live in charts.py, the pictures in pictures.py, the
tables in tables.py, the page in templates/ (page.py). Nothing on the page loads anything: it opens
on a machine without a network.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mlip.pages.corpus import knowledge_context, ledger_context
from mlip.pages.examples import example_context
from mlip.pages.page import dotted, render_page, write_page
from mlip.pages.subgroups import subgroup_context
from mlip.pages.tables import (
    cards,
    grounding_context,
    headline,
    retrieval_context,
    zero_shot_context,
)
from mlip.pages.training import held_out_charts, read_log, training_charts
from mlip.settings import config as configuration
from mlip.transfer.results_file import PAGE
from mlip.transfer.table import seen_text
from mlip.transfer.trained_heads import untrained_text

logger = logging.getLogger("mlip")
# AUROC of each head, and at the thresholds that serve all images
SUBGROUP_SCORES = {
    "global": "AUROC, global head",
    "local": "AUROC, local score",
    "combined": "AUROC, combined",
    "combined_sensitivity": "Sensitivity",
    "combined_specificity": "Specificity",
}
SECTIONS = (
    ("zero-shot", "Zero-shot", "zero_shot"),
    ("subgroups", "Subgroups", "subgroups"),
    ("retrieval", "Retrieval", "retrieval"),
    ("grounding", "Grounding", "grounding"),
    ("maps", "Where words point", "maps"),
    ("examples", "Examples", "found_texts"),
    ("training", "Training", "charts"),
    ("ledger", "Ledger", "ledger"),
    ("knowledge", "Knowledge", "knowledge"),
    ("settings", "Settings", "settings"),
    ("provenance", "Provenance", "provenance"),
)


def write_report(run_dir: str | Path, results: Mapping[str, Any]) -> Path:
    """The page of a run, written as run_dir/report.html; its path.

    results  what evaluate_run gave (its "examples" become the pictures)
    Raises:  ValueError if results are not those of evaluate_run.
    """
    if "config" not in results or "run" not in results:
        raise ValueError(
            "results: expected what evaluate_run returns (with 'run' and 'config'), "
            f"got the keys {sorted(results)}"
        )
    return write_page(Path(run_dir) / PAGE, render(Path(run_dir), results))


def _read_log(path: Path) -> list[dict[str, float]]:
    try:
        return read_log(path)
    except OSError as error:
        logger.warning("%s: cannot be read, the page goes without: %s", path, error.strerror)
        return []


def _read_ledger(path: Path) -> dict[str, Any] | None:
    """The bar of a run's rows, from its ledger.json; a damaged one costs the bar, not the page."""
    if not path.is_file():
        return None
    try:
        return ledger_context(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        logger.warning("%s: is no ledger of a run, the page goes without: %r", path, error)
        return None


def render(run_dir: Path, results: Mapping[str, Any]) -> str:
    """The page as text, with the run's logs and ledger.json where they are there."""
    log, ledger = _read_log(run_dir / "log.jsonl"), _read_ledger(run_dir / "ledger.json")
    looks, charts = _read_log(run_dir / "validation.jsonl"), training_charts(log)
    is_phantom = bool(results.get("data", {}).get("is_phantom"))
    context: dict[str, Any] = {
        "title": results["run"].get("name") or run_dir.name,
        "meta": _meta(results, is_phantom),
        "headline": headline(results),
        "cards": cards(results),
        "is_phantom": is_phantom,
        "zero_shot": zero_shot_context(results),
        "subgroups": subgroup_context(
            (results.get("zero_shot") or {}).get("subgroups") or [], SUBGROUP_SCORES, "global"
        ),
        "retrieval": retrieval_context(results),
        "grounding": grounding_context(results),
        "charts": [*charts[:1], *held_out_charts(looks), *charts[1:]],  # beside the losses
        "ledger": ledger,
        "knowledge": knowledge_context(results),
        "settings": _settings(results["config"]),
        "provenance": _provenance(results),
        **example_context(results),
    }
    context["sections"] = [(anchor, title) for anchor, title, key in SECTIONS if context.get(key)]
    return render_page("report.html", context)


def _meta(results: Mapping[str, Any], is_phantom: bool) -> list[str]:
    data, run = results.get("data", {}), results["run"]
    parts = ["generated phantom studies" if is_phantom else "real radiographs"]
    if data.get("images"):
        asked = data.get("rows_asked", data["images"])
        lost = asked - data["images"]
        parts.append(
            f"{data['images']:,}{f' of {asked:,}' if lost else ''} {run.get('split', '')} images "
            f"of {data.get('patients', 0):,} patients"
        )
        if data.get("rows_in_split", 0) > asked:
            parts.append(f"a random draw of {data['rows_in_split']:,} (evaluate.max_studies)")
        if lost:
            why = ", ".join(f"{r} {n}" for r, n in sorted(data.get("unreadable", {}).items()))
            told = f" ({why})" if why else ""
            parts.append(f"{lost:,} could not be read{told} and are in no score")
        if seen := seen_text(data.get("trained_on"), data["images"], data.get("patients", 0)):
            parts.append(seen)
    if untrained := untrained_text(run):
        parts.append(untrained)
    if run.get("step"):
        best = ", the best on val" if run.get("is_best_on_val") else ""
        parts.append(f"{run['step']:,} steps{best}")
    if run.get("pairs_seen"):
        parts.append(f"{run['pairs_seen']:,} pairs seen")
    if run.get("seed") is not None:
        parts.append(f"seed {run['seed']}")
    parts.append(datetime.now(UTC).strftime("%d %B %Y, %H:%M UTC"))
    return parts


def _settings(saved: Mapping[str, Any]) -> list[dict[str, Any]]:
    default = dotted(configuration.to_dict(configuration.Config()))
    groups: dict[str, list[dict[str, Any]]] = {}
    for key, value in dotted(saved).items():
        section, _, rest = key.partition(".")
        changed = key not in default or default[key] != value
        groups.setdefault(section, []).append(
            {"key": rest or section, "value": _shown(value), "changed": changed}
        )
    return [{"name": name, "lines": lines} for name, lines in groups.items()]


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(_shown(v) for v in value)
    if isinstance(value, float):
        return f"{value:g}"
    return str(value) if value not in ({}, "") else "empty"


def _provenance(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in results.get("fingerprints", {}).items():
        rows.append((key.replace("_", " "), str(value)))
    for key, value in results.get("versions", {}).items():
        rows.append((key, str(value)))
    run = results["run"]
    for key in ("checkpoint", "commit", "device", "precision", "evaluation_seconds"):
        if run.get(key) is not None:
            rows.append((key.replace("_", " "), str(run[key])))
    return rows
