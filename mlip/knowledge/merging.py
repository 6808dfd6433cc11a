"""Several concept tables -> one, by shared codes; and what of it may be handed on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mlip.knowledge.concepts import Concept, ConceptTable

LICENSED_SOURCES = frozenset({"umls"})
_SHARED_CODES = ("umls", "hpo", "doid", "radlex")


def merge(base: ConceptTable, *others: ConceptTable) -> ConceptTable:
    """One table: concepts that share a code become one, the rest is appended in order.

    The base keeps its ids, names and surface forms; another's synonym that it owns is dropped. Cues
    are the base's.
    Licensed forms are remembered (Concept.licensed) so that open_part can take them out again.
    """
    concepts = {concept.id: concept for concept in base}
    by_code: dict[tuple[str, str], str] = {}
    owned: set[str] = set()

    def remember(concept: Concept, target: str) -> None:
        for vocabulary in _SHARED_CODES:
            for code in concept.mappings.get(vocabulary, ()):
                by_code.setdefault((vocabulary, code), target)

    for concept in base:
        owned.update(concept.surface_forms)
        remember(concept, concept.id)
    for other in others:
        renamed: dict[str, str] = {}  # their id -> ours, where the two differ
        for concept in other:
            for vocabulary in _SHARED_CODES:
                for code in concept.mappings.get(vocabulary, ()):
                    host = by_code.get((vocabulary, code))
                    if host is not None and concept.id not in renamed:
                        renamed[concept.id] = host
        for concept in other:
            target = renamed.get(concept.id, concept.id)
            fresh = tuple(s for s in (concept.name, *concept.synonyms) if s.lower() not in owned)
            if other is not others[-1]:  # nothing comes that could take them
                owned.update(s.lower() for s in fresh)
                remember(concept, target)
            if target in concepts:
                concepts[target] = _joined(concepts[target], concept, fresh)
            else:
                concepts[target] = _changed(
                    concept,
                    synonyms=tuple(s for s in fresh if s != concept.name),
                    parents=tuple(dict.fromkeys(renamed.get(p, p) for p in concept.parents)),
                    relations=tuple((r, renamed.get(t, t)) for r, t in concept.relations),
                )
    for identifier, concept in concepts.items():
        concepts[identifier] = _changed(
            concept,
            parents=tuple(p for p in concept.parents if p in concepts and p != identifier),
            relations=tuple((r, t) for r, t in concept.relations if t in concepts),
        )
    provenance = {
        "source": "merged",
        "licensed": any(t.provenance.get("licensed") for t in (base, *others)),
        "parts": [t.provenance for t in (base, *others)],
    }
    return without_cycles(ConceptTable(concepts.values(), provenance, base.cues))


def _joined(host: Concept, guest: Concept, fresh: tuple[str, ...]) -> Concept:
    """The host with the names, codes and, where it has none, the definition of its guest."""
    licensed = guest.source in LICENSED_SOURCES
    take = not host.definition and bool(guest.definition)
    return replace(
        host,
        synonyms=(*host.synonyms, *fresh),
        definition=guest.definition if take else host.definition,
        mappings={
            key: tuple(dict.fromkeys((*host.mappings.get(key, ()), *guest.mappings.get(key, ()))))
            for key in {**host.mappings, **guest.mappings}
        },
        licensed=(
            *host.licensed,
            *(fresh if licensed else ()),
            *((guest.definition,) if licensed and take else ()),
        ),
    )


def _changed(concept: Concept, **values: Any) -> Concept:
    """The concept with other values; itself where none differs (memory: a million of them)."""
    if all(getattr(concept, name) == value for name, value in values.items()):
        return concept
    return replace(concept, **values)


def open_part(table: ConceptTable) -> ConceptTable:
    """The table without licensed concepts, names and definitions: what may be handed on."""
    kept = [c for c in table if c.source not in LICENSED_SOURCES]
    ids = {c.id for c in kept}
    cleaned = []
    for concept in kept:
        secret = set(concept.licensed)
        cleaned.append(
            replace(
                concept,
                synonyms=tuple(s for s in concept.synonyms if s not in secret),
                definition="" if concept.definition in secret else concept.definition,
                parents=tuple(p for p in concept.parents if p in ids),
                relations=tuple((r, t) for r, t in concept.relations if t in ids),
                licensed=(),
            )
        )
    return ConceptTable(cleaned, {"source": "open part", "of": table.fingerprint}, table.cues)


def cycles(table: ConceptTable) -> list[tuple[str, str]]:
    """Is-a edges (child, parent) that close a circle, in table order."""
    closing: list[tuple[str, str]] = []
    state: dict[str, int] = {}  # 1 = on the path, 2 = done
    for concept in table:
        if concept.id in state:
            continue
        stack = [(concept.id, iter(concept.parents))]
        state[concept.id] = 1
        while stack:
            node, rest = stack[-1]
            for parent in rest:
                if state.get(parent) == 1:
                    closing.append((node, parent))
                elif parent not in state and parent in table:
                    state[parent] = 1
                    stack.append((parent, iter(table[parent].parents)))
                    break
            else:
                state[node] = 2
                stack.pop()
    return closing


def without_cycles(table: ConceptTable) -> ConceptTable:
    """Foreign vocabularies do hold circles: the closing edges go, their number is recorded."""
    closing = set(cycles(table))
    if not closing:
        return table
    children = {child for child, _ in closing}
    concepts = [
        replace(c, parents=tuple(p for p in c.parents if (c.id, p) not in closing))
        if c.id in children
        else c
        for c in table
    ]
    provenance = {**table.provenance, "is_a_edges_dropped": len(closing)}
    return ConceptTable(concepts, provenance, table.cues)
