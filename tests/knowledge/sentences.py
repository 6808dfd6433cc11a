"""Sentences with the states that a reader gave their findings, held against those of the linker.

Of "No effusion. | pleural_effusion=A" the letter is P present, A absent, U uncertain or - not
mentioned, of the concept's first mention.
"""

from __future__ import annotations

from mlip.knowledge.linker import default_linker, link

LETTER = {"present": "P", "absent": "A", "uncertain": "U"}


def check_states(lines: str) -> None:
    known = default_linker().table.index.keys()
    for line in filter(None, map(str.strip, lines.splitlines())):
        text, _, labels = line.rpartition(" | ")
        wanted = dict(label.split("=") for label in labels.split())
        assert wanted and wanted.keys() <= known, line
        found: dict[str, str] = {}
        for mention in link(text):
            found.setdefault(mention.concept_id, LETTER[mention.state])
        assert {name: found.get(name, "-") for name in wanted} == wanted, text
