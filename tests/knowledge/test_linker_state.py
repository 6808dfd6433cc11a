"""State of mentions on own sentences in report style, the second half of them scored once.

Oracle: labels written by hand before the rules (state_sentences.txt). A sentence belongs to the
sealed half by a hash of its text; docs/knowledge.md holds the figures of the first scoring.
"""

import hashlib
from pathlib import Path

import pytest

from mlip.knowledge.concepts import ConceptTable, load_concepts
from mlip.knowledge.linker import Linker

LETTER = {"present": "P", "absent": "A", "uncertain": "U"}


def read_sentences() -> list[tuple[str, list[tuple[str, str]], bool]]:
    rows = []
    lines = Path(__file__).with_name("state_sentences.txt").read_text(encoding="utf-8")
    for line in lines.splitlines():
        if line.startswith("#"):
            continue
        text, _, labels = line.rpartition(" | ")
        pairs = [tuple(label.split("=")) for label in labels.split()]
        sealed = hashlib.sha256(text.encode()).digest()[0] % 2 == 1
        rows.append((text, [(concept, states) for concept, states in pairs], sealed))
    return rows


def compare(linker: Linker, table: ConceptTable, sealed: bool) -> list[tuple[str, str, str, str]]:
    """(sentence, concept, expected letter, found letter or -) for each labelled mention."""
    results = []
    for text, labels, is_sealed in read_sentences():
        if is_sealed != sealed:
            continue
        mentions = linker.link(text)
        for concept, expected in labels:
            family = {concept} | table.descendants(concept)
            found = [LETTER[m.state] for m in mentions if m.concept_id in family]
            for position, letter in enumerate(expected):
                # one label speaks of the first mention; "PA" of the first and the last
                state = (found[-1] if position else found[0]) if found else "-"
                results.append((text, concept, letter, state))
    return results


def accuracies(results: list[tuple[str, str, str, str]]) -> tuple[float, float]:
    """(three states, present or absent where the label is one of the two)."""
    three = sum(expected == found for _, _, expected, found in results) / len(results)
    sure = [(e, f) for _, _, e, f in results if e in "PA"]
    return three, sum(e == f for e, f in sure) / len(sure)


@pytest.fixture(scope="module")
def table() -> ConceptTable:
    return load_concepts(None)


def test_there_are_enough_own_sentences():
    rows = read_sentences()
    assert len(rows) >= 300
    assert len({text for text, _, _ in rows}) == len(rows)


@pytest.mark.parametrize("sealed", [False, True], ids=["open", "sealed"])
def test_states_of_own_sentences_reach_the_gate(table, sealed):
    three, two = accuracies(compare(Linker(table), table, sealed))
    assert three >= 0.92
    assert two >= 0.97
