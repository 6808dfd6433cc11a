"""State of mentions on the project's own sentences: the labels, and how many are met.

Labels were written by hand before the rules (tests/knowledge/state_sentences.txt). A sentence
belongs to the sealed half by a hash of its text.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from mlip.knowledge.concepts import ConceptTable
from mlip.knowledge.linker import Linker

SENTENCES = Path(__file__).resolve().parents[1] / "tests/knowledge/state_sentences.txt"
LETTER = {"present": "P", "absent": "A", "uncertain": "U"}


def read_sentences(path: Path = SENTENCES) -> list[tuple[str, list[tuple[str, str]], bool]]:
    """(text, [(concept, letters)], sealed) of each sentence."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            continue
        text, _, labels = line.rpartition(" | ")
        pairs = [(name, states) for name, _, states in (x.partition("=") for x in labels.split())]
        rows.append((text, pairs, hashlib.sha256(text.encode()).digest()[0] % 2 == 1))
    return rows


def outcomes(linker: Linker, table: ConceptTable, sealed: bool) -> np.ndarray:
    """[sentences, 4]: met and labelled over three states, met and labelled where P or A."""
    rows = []
    for text, labels, is_sealed in read_sentences():
        if is_sealed != sealed:
            continue
        mentions = linker.link(text)
        row = [0, 0, 0, 0]
        for concept, expected in labels:
            family = {concept} | table.descendants(concept)
            found = [LETTER[m.state] for m in mentions if m.concept_id in family]
            for position, letter in enumerate(expected):
                # one label speaks of the first mention; "PA" of the first and the last
                state = (found[-1] if position else found[0]) if found else "-"
                row[0] += state == letter
                row[1] += 1
                if letter in "PA":
                    row[2] += state == letter
                    row[3] += 1
        rows.append(row)
    return np.array(rows)
