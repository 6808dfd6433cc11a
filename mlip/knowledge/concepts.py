"""Concepts of chest radiography and the table that holds them.

What does not live here: how they are read (concept_files.py, ontologies.py, umls.py), how text is
matched (linker.py).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

CHEXPERT = "chexpert"  # the vocabulary whose codes in a lexicon are CheXpert's labels
RELATIONS = ("located_in", "suggests", "device_at", "part_of")


class LexiconError(ValueError):
    """A concept file that cannot be used; the message names file, concept and remedy."""


@dataclass(frozen=True, kw_only=True, slots=True)  # slots: a full UMLS is a million of them
class Concept:
    """One thing a report can mention.

    `apart`: terms written apart, each a tuple of slots, each slot the alternative words of it:
    (("heart",), ("enlarged", "large")) finds "the heart is mildly enlarged".
    `excludes`: longer phrases in which a synonym does not mean this concept.
    `mappings`: vocabulary ("umls", "hpo", "radlex", "chexpert", "medklip", ...) -> its codes.
    """

    id: str
    name: str
    synonyms: tuple[str, ...] = ()
    definition: str = ""
    semantic_type: str = "finding"
    category: str = "other"
    parents: tuple[str, ...] = ()
    relations: tuple[tuple[str, str], ...] = ()  # (relation, concept id)
    mappings: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    apart: tuple[tuple[tuple[str, ...], ...], ...] = ()
    excludes: tuple[str, ...] = ()
    source: str = "mlip"  # lexicon or ontology this row came from
    licensed: tuple[str, ...] = ()  # forms and definition that a licensed source added

    @property
    def surface_forms(self) -> tuple[str, ...]:
        """Name and synonyms, lower case, without repeats."""
        return tuple(dict.fromkeys(s.lower() for s in (self.name, *self.synonyms)))

    def as_json(self) -> dict[str, Any]:
        """One line of a built table: every field that is not empty."""
        row = {f.name: getattr(self, f.name) for f in fields(self)}
        row["mappings"] = dict(sorted(self.mappings.items()))
        return {k: v for k, v in row.items() if v not in ((), {}, "", None)}


class ConceptTable:
    """Concepts in a fixed order: the row of `.index` is the row of every vector table.

    cues: kind of cue (events.KINDS) -> words that assert or deny in the language of the concepts;
    None = the project's English ones.
    """

    def __init__(
        self,
        concepts: Iterable[Concept],
        provenance: Mapping[str, Any] | None = None,
        cues: Mapping[str, tuple[str, ...]] | None = None,
    ) -> None:
        self.concepts = tuple(concepts)
        self.provenance = dict(provenance or {})
        self.cues = cues
        self.index: dict[str, int] = {}
        for row, concept in enumerate(self.concepts):
            if concept.id in self.index:
                raise LexiconError(
                    f"concept id {concept.id!r} occurs twice (sources "
                    f"{self.concepts[self.index[concept.id]].source} and {concept.source}); "
                    "merge the two or rename one"
                )
            self.index[concept.id] = row

    def __len__(self) -> int:
        return len(self.concepts)

    def __iter__(self) -> Iterator[Concept]:
        return iter(self.concepts)

    def __contains__(self, concept_id: object) -> bool:
        return concept_id in self.index

    def __getitem__(self, concept_id: str) -> Concept:
        try:
            return self.concepts[self.index[concept_id]]
        except KeyError:
            raise KeyError(f"no concept {concept_id!r} in a table of {len(self)}") from None

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of every field of every concept in order, and of own cues: keys caches."""
        digest = hashlib.sha256()
        for concept in self.concepts:
            digest.update(json.dumps(concept.as_json(), sort_keys=True).encode())
            digest.update(b"\n")
        if self.cues is not None:
            digest.update(json.dumps(self.cues, sort_keys=True).encode())
        return digest.hexdigest()

    @cached_property
    def categories(self) -> tuple[str, ...]:
        """Category names in order of first use: the meaning of categories.category_index."""
        return tuple(dict.fromkeys(concept.category for concept in self.concepts))

    def ancestors(self, concept_id: str) -> frozenset[str]:
        """Every concept reached over is-a, without the concept itself."""
        seen, waiting = {concept_id}, [concept_id]
        while waiting:
            ways = {parent for parent in self[waiting.pop()].parents if parent in self.index}
            waiting.extend(ways - seen)
            seen |= ways
        return frozenset(seen - {concept_id})

    def descendants(self, concept_id: str) -> frozenset[str]:
        """Every concept that is-a this one over any number of steps, without itself."""
        below = (c.id for c in self.concepts if concept_id in self.ancestors(c.id))
        return frozenset(below)
