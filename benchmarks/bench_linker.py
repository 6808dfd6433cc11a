"""Score the linker against the MeSH indexing of the Indiana University reports, and its speed.

    python benchmarks/bench_linker.py dev               # half of the reports: look, read, tune
    python benchmarks/bench_linker.py test --out FILE   # the other half: scored once
    python benchmarks/bench_linker.py states            # own sentences, the sealed half apart
    python benchmarks/bench_linker.py labels            # what `mlip label` says of the other half
    python benchmarks/bench_linker.py read              # the same against reports read by hand
    python benchmarks/bench_linker.py speed [--forms 500000]

The reports (CC BY-NC-ND) are read from --reports and never printed. A report belongs to a half by
a hash of its id. Uncertain mentions count as not asserted. The indexing has both of alternatives
("scar or atelectasis"), which the linker leaves uncertain: without that rule its scores stand under
alternatives_stated. negspacy is compared where installed (negspacy_baseline.py). Intervals are 95 %
bootstrap intervals over reports, sentences or, for the speed, forty-eight parts of the reports.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.harness import environment
from benchmarks.intervals import share, with_interval
from benchmarks.linker_labels import label_scores
from benchmarks.linker_read import read_scores
from benchmarks.linker_reports import (
    REPORTS,
    Finding,
    Report,
    read_findings,
    read_reports,
    sentences,
)
from benchmarks.linker_speed import padded, speed, startup
from benchmarks.linker_states import outcomes
from benchmarks.negspacy_baseline import name_and_version, negspacy_states
from mlip.knowledge.concept_files import load_concepts
from mlip.knowledge.concepts import ConceptTable
from mlip.knowledge.cues import cues_of
from mlip.knowledge.linker import Linker, Mention


def counts(gold: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """[reports, 3] true positives, false positives, false negatives."""
    return np.stack(
        [(gold & predicted).sum(1), (~gold & predicted).sum(1), (gold & ~predicted).sum(1)], axis=1
    )


def f1(tp: float, fp: float, fn: float) -> float:
    return 2 * tp / max(2 * tp + fp + fn, 1)


def score(
    reports: list[Report],
    linker: Linker,
    findings: list[Finding],
    dev: list[Report],
    with_rival: bool = True,
) -> Any:
    linked = [linker.link(report.text) for report in reports]
    gold = np.array([[f.is_indexed(r.headings) for f in findings] for r in reports])
    predicted = np.array([asserted(m, findings) for m in linked])
    dev_gold = np.array([[f.is_indexed(r.headings) for f in findings] for r in dev])
    order = [i for i in np.argsort(-dev_gold.sum(0), kind="stable") if findings[i].yardstick]
    top = order[:14]
    frequent = list(np.argsort(-dev_gold.sum(0), kind="stable")[:14])
    result: dict[str, Any] = {
        "reports": len(reports),
        "top14": [findings[i].name for i in top],
        "micro_f1_top14": with_interval(counts(gold[:, top], predicted[:, top]), f1),
        "micro_f1_top14_of_all": with_interval(
            counts(gold[:, frequent], predicted[:, frequent]), f1
        ),
        "micro_f1_all": with_interval(counts(gold, predicted), f1),
    }
    ignored = np.array([asserted(m, findings, states=None) for m in linked])
    result["no_negation_f1_top14"] = with_interval(counts(gold[:, top], ignored[:, top]), f1)
    if with_rival:
        result.update(rivals(reports, linked, findings, gold, predicted, top))
    seen_in = Counter(w for report in dev for w in {w for _, _, w in sentences(report.text)})
    # inside the dev half itself, unseen = in no other report
    least = 2 if reports == dev else 1
    seen = {words for words, n in seen_in.items() if n >= least}
    unseen = np.array(
        [only_unseen(r, m, findings, seen) for r, m in zip(reports, linked, strict=True)]
    )
    result["micro_f1_top14_unseen_sentences"] = with_interval(
        counts((gold & unseen)[:, top], (predicted & unseen)[:, top]), f1
    )
    per_finding = {}
    for i, finding in enumerate(findings):
        rows = counts(gold[:, [i]], predicted[:, [i]])
        tp, fp, fn = rows.sum(0)
        per_finding[finding.name] = {
            "positives": int(tp + fn),
            "precision": with_interval(rows, lambda a, b, c: a / max(a + b, 1)),
            "recall": with_interval(rows, lambda a, b, c: a / max(a + c, 1)),
            "f1": with_interval(rows, f1),
            "false_positives": int(fp),
            "false_negatives": int(fn),
        }
    result["per_finding"] = per_finding
    misses = [
        (report.id, findings[i].name, *cause(report, mentions, findings[i], bool(gold[row, i])))
        for row, (report, mentions) in enumerate(zip(reports, linked, strict=True))
        for i in range(len(findings))
        if gold[row, i] != predicted[row, i]
    ]
    names = {findings[i].name for i in top}
    result["miss_causes_top14"] = dict(Counter(m[3] for m in misses if m[1] in names).most_common())
    result["misses"] = (
        misses  # (report, finding, kind, cause): identifiers of a public set, no text
    )
    column = {f.name: i for i, f in enumerate(findings)}
    pair_columns = [column["pneumothorax"], column["consolidation"]]
    wrong = ~gold & predicted
    result["false_positives_pneumothorax_consolidation"] = with_interval(
        wrong[:, pair_columns].sum(1, keepdims=True), float
    )
    result["same_without_negation"] = with_interval(
        (~gold & ignored)[:, pair_columns].sum(1, keepdims=True), float
    )
    normal = np.array([r.headings == ("normal",) for r in reports])
    yardstick = [i for i, f in enumerate(findings) if f.yardstick]
    kinds = ("finding", "disease")
    said = [
        any(m.state == "present" and linker.table[m.concept_id].semantic_type in kinds for m in ms)
        for ms in linked
    ]
    result["normal_reports"] = int(normal.sum())
    for name, hit in (
        ("normal_with_finding", predicted[normal][:, yardstick].any(1)),
        ("normal_with_any_of_all", predicted[normal].any(1)),
        ("normal_with_any_of_the_lexicon", np.array(said)[normal]),
    ):
        result[name] = with_interval(np.stack([hit, np.ones_like(hit)], 1).astype(int), share)
    return result


def alternatives_stated(table: ConceptTable) -> Linker:
    """The linker without the rule for alternatives, which the indexing takes for stated."""
    cues = {kind: forms for kind, forms in cues_of(table).items() if kind != "choice"}
    return Linker(ConceptTable(table, cues=cues))


def rivals(
    reports: list[Report],
    linked: list[list[Mention]],
    findings: list[Finding],
    gold: np.ndarray,
    predicted: np.ndarray,
    top: list[int],
) -> dict[str, Any]:
    """negspacy on the same spans, as it comes and with negators inside a span in its favour."""
    result: dict[str, Any] = {}
    ours = counts(gold[:, top], predicted[:, top])
    for name, inside in (("negspacy", False), ("negspacy_inside", True)):
        judged = negspacy_states([r.text for r in reports], linked, inside=inside)
        if judged is None:
            return {}
        theirs = np.array([asserted(m, findings) for m in judged])
        rows = counts(gold[:, top], theirs[:, top])
        result[f"{name}_f1_top14"] = with_interval(rows, f1)
        result[f"gain_over_{name}"] = with_interval(
            np.hstack([ours, rows]), lambda a, b, c, d, e, f: f1(a, b, c) - f1(d, e, f)
        )
    return {"rival": name_and_version(), **result}


def cause(
    report: Report, mentions: list[Mention], finding: Finding, indexed: bool
) -> tuple[str, str]:
    """(kind, cause) of a miss, told from mentions and headings alone."""
    if not indexed:
        known = report.headings == ("normal",)
        return "false positive", "stated, indexed as normal" if known else "stated, not indexed"
    states = {m.state for m in mentions if m.concept_id in finding.concepts}
    if "uncertain" in states:
        return "false negative", "hedged in the report, indexed as a finding"
    if states:
        return "false negative", "only denied mentions found"
    if "xxxx" in report.text.lower():
        return "false negative", "no term found, words of the report are redacted"
    return "false negative", "no term found"


def asserted(
    mentions: list[Mention], findings: list[Finding], states: tuple[str, ...] | None = ("present",)
) -> list[bool]:
    ids = {m.concept_id for m in mentions if states is None or m.state in states}
    return [bool(f.concepts & ids) for f in findings]


def only_unseen(
    report: Report, mentions: list[Mention], findings: list[Finding], seen: set[str]
) -> list[bool]:
    """Per finding: none of its mentions, of any state, stands in a sentence of the dev half.

    A finding without any mention counts as unseen where the report has an unseen sentence at all.
    """
    spans = sentences(report.text)
    new = [(start, end) for start, end, words in spans if words not in seen]
    result = []
    for finding in findings:
        own = [m for m in mentions if m.concept_id in finding.concepts]
        inside = [any(s <= m.start < e for s, e in new) for m in own]
        result.append(all(inside) if own else bool(new))
    return result


def states(linker: Linker, table: ConceptTable) -> dict[str, Any]:
    """Accuracy of the states of own sentences, both halves."""
    result: dict[str, Any] = {}
    for name, sealed in (("open", False), ("sealed", True)):
        rows = outcomes(linker, table, sealed)
        result[name] = {
            "sentences": len(rows),
            "mentions": int(rows[:, 1].sum()),
            "three_states": with_interval(rows[:, :2], share),
            "present_or_absent_mentions": int(rows[:, 3].sum()),
            "present_or_absent": with_interval(rows[:, 2:], share),
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("half", choices=("dev", "test", "states", "labels", "read", "speed"))
    parser.add_argument("--reports", type=Path, default=REPORTS)
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    parser.add_argument("--forms", type=int, default=0, help="speed with this many made-up terms")
    arguments = parser.parse_args()
    table = load_concepts(None)
    reports = read_reports(arguments.reports)
    dev = [r for r in reports if not r.is_test]
    linker = Linker(table)
    result: dict[str, Any] = {
        "lexicon": {"concepts": len(table), "fingerprint": table.fingerprint},
        "startup_s": startup(),
        "environment": environment("cpu"),
    }
    if arguments.half == "speed":
        if arguments.forms:
            wide = padded(table, arguments.forms)
            start = time.process_time()
            linker = Linker(wide)
            result["made_up_forms"] = arguments.forms
            result["build_s"] = round(time.process_time() - start, 1)
        result["speed"] = speed(reports, linker)
    elif arguments.half == "states":
        result["states"] = states(linker, table)
    elif arguments.half == "labels":
        sealed = [r for r in reports if r.is_test]
        result["labels"] = label_scores(sealed, linker, read_findings(table))
    elif arguments.half == "read":
        result["read"] = read_scores(reports, linker)
    else:
        chosen = dev if arguments.half == "dev" else [r for r in reports if r.is_test]
        result["half"] = arguments.half
        findings = read_findings(table)
        result["score"] = score(chosen, linker, findings, dev)
        as_indexed = score(chosen, alternatives_stated(table), findings, dev)
        result["alternatives_stated"] = {
            name: as_indexed[name]
            for name in as_indexed
            if name.startswith("micro_f1") or "negspacy" in name
        }
    text = json.dumps(result, indent=1)
    if arguments.out:
        arguments.out.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
