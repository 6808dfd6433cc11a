"""The Indiana University reports and the yardstick that bench_linker.py scores the linker with.

The reports (CC BY-NC-ND) are read where they lie and never printed or copied.
"""

from __future__ import annotations

import hashlib
import re
import tarfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import yaml

from mlip.knowledge.concepts import ConceptTable

REPORTS = Path(__file__).resolve().parents[2] / "shared/data/text/NLMCXR_reports.tgz"
MAPPING = Path(__file__).with_name("linker_mesh.yaml")
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
