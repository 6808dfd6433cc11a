"""Score the linker against the MeSH indexing of the Indiana University reports, and its speed.

    python benchmarks/bench_linker.py dev               # half of the reports: look, read, tune
    python benchmarks/bench_linker.py test --out FILE   # the other half: scored once
    python benchmarks/bench_linker.py speed [--forms 500000]

The reports (CC BY-NC-ND) are read from --reports and never printed. A report belongs to a half by
a hash of its id. Uncertain mentions count as not asserted. negspacy is compared where installed.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import platform
import re
import tarfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from mlip.knowledge.concepts import ConceptTable, load_concepts
from mlip.knowledge.linker import Linker, Mention

REPORTS = Path(__file__).resolve().parents[2] / "shared/data/text/NLMCXR_reports.tgz"
MAPPING = Path(__file__).with_name("linker_mesh.yaml")
BOOTSTRAP = 1000
_SENTENCE_END = re.compile(r"(?<=[.?!;])\s+")


@dataclass(frozen=True)
class Report:
    id: str
    text: str
    headings: tuple[str, ...]  # MeSH "major", lower case

    @property
    def is_test(self) -> bool:
        return hashlib.sha256(self.id.encode()).digest()[0] % 2 == 1


@dataclass(frozen=True)
class Finding:
    name: str
    yardstick: bool
    mesh: tuple[tuple[str, str], ...]  # (heading, qualifier or "")
    concepts: frozenset[str]

    def is_indexed(self, headings: Iterable[str]) -> bool:
        for heading in headings:
            head, *qualifiers = [part.strip() for part in heading.split("/")]
            for wanted, qualifier in self.mesh:
                if head == wanted and (not qualifier or qualifier in qualifiers):
                    return True
        return False


def read_reports(path: Path = REPORTS) -> list[Report]:
    """Indexed reports with findings or impression, in order of their id."""
    reports = []
    with tarfile.open(path) as archive:
        for member in archive:
            stream = archive.extractfile(member) if member.name.endswith(".xml") else None
            if stream is None:
                continue
            root = ElementTree.fromstring(stream.read())
            uid = root.find("uId")
            assert uid is not None
            sections = {a.get("Label"): (a.text or "").strip() for a in root.iter("AbstractText")}
            text = "\n\n".join(
                f"{label}: {sections[label]}"
                for label in ("FINDINGS", "IMPRESSION")
                if sections.get(label)
            )
            headings = tuple(
                (m.text or "").strip().lower()
                for mesh in root.iter("MeSH")
                for m in mesh
                if m.tag == "major"
            )
            if text and headings and "no indexing" not in headings:
                reports.append(Report(uid.get("id", ""), text, headings))
    return sorted(reports, key=lambda r: (len(r.id), r.id))


def read_findings(table: ConceptTable, path: Path = MAPPING) -> list[Finding]:
    findings = []
    for name, row in yaml.safe_load(path.read_text(encoding="utf-8"))["findings"].items():
        mesh = []
        for heading in row["mesh"]:
            head, _, qualifier = heading.lower().partition("/")
            mesh.append((head, qualifier))
        below = {i for c in row["concepts"] for i in (c, *table.descendants(c))}
        below -= {i for c in row.get("without", []) for i in (c, *table.descendants(c))}
        findings.append(Finding(name, row.get("yardstick", False), tuple(mesh), frozenset(below)))
    return findings


def sentences(text: str) -> list[tuple[int, int, str]]:
    """(start, end, normalised words) of each sentence, for telling seen from unseen ones."""
    spans, start = [], 0
    for match in [*_SENTENCE_END.finditer(text), None]:
        end = match.start() if match else len(text)
        words = " ".join(re.findall(r"[a-z0-9]+", text[start:end].lower()))
        if words:
            spans.append((start, end, words))
        start = match.end() if match else end
    return spans


def counts(gold: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """[reports, 3] true positives, false positives, false negatives."""
    return np.stack(
        [(gold & predicted).sum(1), (~gold & predicted).sum(1), (gold & ~predicted).sum(1)], axis=1
    )


def f1(tp: float, fp: float, fn: float) -> float:
    return 2 * tp / max(2 * tp + fp + fn, 1)


def with_interval(rows: np.ndarray, value: Callable[..., float], seed: int = 1) -> dict[str, Any]:
    """A figure over rows [reports, k] with its 95 % bootstrap interval over reports."""
    rng = np.random.default_rng(seed)
    draws = [value(*rows[rng.integers(0, len(rows), len(rows))].sum(0)) for _ in range(BOOTSTRAP)]
    low, high = np.percentile(draws, [2.5, 97.5])
    return {
        "value": round(float(value(*rows.sum(0))), 4),
        "low": round(float(low), 4),
        "high": round(float(high), 4),
    }


def score(reports: list[Report], linker: Linker, findings: list[Finding], dev: list[Report]) -> Any:
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
    rival = negspacy_states(reports, linked)
    if rival is not None:
        theirs = np.array([asserted(m, findings) for m in rival])
        pair = np.hstack(
            [counts(gold[:, top], predicted[:, top]), counts(gold[:, top], theirs[:, top])]
        )
        result["negspacy_f1_top14"] = with_interval(counts(gold[:, top], theirs[:, top]), f1)
        result["gain_over_negspacy"] = with_interval(
            pair, lambda a, b, c, d, e, f: f1(a, b, c) - f1(d, e, f)
        )
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
        tp, fp, fn = counts(gold[:, [i]], predicted[:, [i]]).sum(0)
        per_finding[finding.name] = {
            "positives": int(tp + fn),
            "precision": with_interval(
                counts(gold[:, [i]], predicted[:, [i]]), lambda a, b, c: a / max(a + b, 1)
            ),
            "recall": round(float(tp / max(tp + fn, 1)), 4),
            "f1": round(f1(tp, fp, fn), 4),
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
    result["false_positives_pneumothorax_consolidation"] = int(wrong[:, pair_columns].sum())
    result["same_without_negation"] = int((~gold & ignored)[:, pair_columns].sum())
    normal = np.array([r.headings == ("normal",) for r in reports])
    yardstick = [i for i, f in enumerate(findings) if f.yardstick]
    hit = predicted[normal][:, yardstick].any(1)
    hit_all = predicted[normal].any(1)
    result["normal_reports"] = int(normal.sum())
    result["normal_with_finding"] = with_interval(
        np.stack([hit, np.ones_like(hit)], 1).astype(int), lambda a, n: a / max(n, 1)
    )
    result["normal_with_any_of_all"] = round(float(hit_all.mean()), 4)
    return result


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


def negspacy_states(reports: list[Report], linked: list[list[Mention]]) -> Any:
    """The same spans with negspacy's state; None where negspacy is not installed."""
    try:
        import spacy
        from negspacy.negation import Negex  # noqa: F401
        from spacy.tokens import Span
        from spacy.util import filter_spans
    except ImportError:
        return None
    language = spacy.blank("en")
    language.add_pipe("sentencizer")
    language.add_pipe("negex", config={"chunk_prefix": ["no"]})
    tagger = language.get_pipe("sentencizer")
    negex = language.get_pipe("negex")
    result = []
    for report, mentions in zip(reports, linked, strict=True):
        doc = tagger(language.make_doc(report.text))
        spans = []
        for mention in mentions:
            span = doc.char_span(
                mention.start, mention.end, label=mention.concept_id, alignment_mode="expand"
            )
            if isinstance(span, Span):
                spans.append(span)
        out = []
        # nested spans cannot stand in doc.ents together: each gets its turn
        rest = spans
        while rest:
            chosen = filter_spans(rest)
            doc.set_ents(chosen)
            doc = negex(doc)
            out += [
                Mention(e.label_, e.start_char, e.end_char, "absent" if e._.negex else "present")
                for e in doc.ents
            ]
            kept = {id(span) for span in chosen}
            rest = [span for span in rest if id(span) not in kept]
        result.append(out)
    return result


def speed(reports: list[Report], linker: Linker, repeats: int = 5) -> dict[str, Any]:
    """Reports a second of one core by process time; best and median of the repeats."""
    texts = [report.text for report in reports]
    rates = []
    for _ in range(repeats):
        start = time.process_time()
        for text in texts:
            linker.link(text)
        rates.append(len(texts) / (time.process_time() - start))
    return {
        "reports": len(texts),
        "mean_characters": round(sum(map(len, texts)) / len(texts), 1),
        "best_per_s": round(max(rates)),
        "median_per_s": round(sorted(rates)[len(rates) // 2]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("half", choices=("dev", "test", "speed"))
    parser.add_argument("--reports", type=Path, default=REPORTS)
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    parser.add_argument("--forms", type=int, default=0, help="speed with this many made-up terms")
    arguments = parser.parse_args()
    table = load_concepts(None)
    reports = read_reports(arguments.reports)
    dev = [r for r in reports if not r.is_test]
    start = time.process_time()
    linker = Linker(table)
    result: dict[str, Any] = {
        "lexicon": {"concepts": len(table), "fingerprint": table.fingerprint},
        "startup_s": round(time.process_time() - start, 3),
        "machine": {"python": platform.python_version(), "processor": platform.machine()},
    }
    if arguments.half == "speed":
        if arguments.forms:
            linker = Linker(padded(table, arguments.forms))
            result["made_up_forms"] = arguments.forms
        result["speed"] = speed(reports, linker)
    else:
        chosen = dev if arguments.half == "dev" else [r for r in reports if r.is_test]
        result["half"] = arguments.half
        result["score"] = score(chosen, linker, read_findings(table), dev)
    text = json.dumps(result, indent=1)
    if arguments.out:
        arguments.out.write_text(text + "\n", encoding="utf-8")
    print(text)


def padded(table: ConceptTable, forms: int) -> ConceptTable:
    """The table with made-up terms of two to four words beside it, the size of a UMLS subset."""
    from mlip.knowledge.concepts import Concept

    rng = np.random.default_rng(1)
    words = ["".join(p) for p in itertools.product(_SYLLABLES, repeat=3)]
    common = ["lung", "chest", "left", "right", "acute", "disease", "heart", "of", "the", "pleural"]
    sizes = rng.integers(1, 4, forms)
    picks = rng.integers(0, len(words), (forms, 3))
    extra = []
    for row in range(forms):
        chosen = [words[i] for i in picks[row, : sizes[row]]]
        chosen.insert(row % (len(chosen) + 1), common[row % len(common)])
        extra.append(Concept(id=f"x{row}", name=" ".join(chosen), category="made_up"))
    return ConceptTable([*table, *extra])


_SYLLABLES = [a + b for a in "bcdfghklmnprstv" for b in "aeiou"][:60]


if __name__ == "__main__":
    main()
