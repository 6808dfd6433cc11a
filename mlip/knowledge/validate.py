"""Checks of a concept table that a lexicon must pass; CI runs them on the project's own.

python -m mlip.knowledge.validate [folder or file]
"""

from __future__ import annotations

import sys

from mlip.knowledge.concept_files import load_concepts
from mlip.knowledge.concepts import Concept, ConceptTable, LexiconError
from mlip.knowledge.cues import cues_of
from mlip.knowledge.linker import Linker
from mlip.knowledge.merging import cycles

_MAX_DEFINITION_WORDS = 40  # a definition is one or two sentences a radiologist reads at a glance


def problems(table: ConceptTable) -> list[str]:
    """Everything wrong with a table, one line each, empty where it is sound.

    Raises:  LexiconError for a term that no report can match.
    """
    found = [f"{child}: is_a {parent} closes a circle" for child, parent in cycles(table)]
    if not any(forms for kind, forms in cues_of(table).items() if kind.startswith("negation")):
        found.append("cues: none denies a finding (negation_before, negation_after)")
    linker = Linker(table)
    owner: dict[str, Concept] = {}
    for concept in table:
        if not concept.definition:
            found.append(f"{concept.id}: the definition is empty")
        elif len(concept.definition.split()) > _MAX_DEFINITION_WORDS:
            found.append(
                f"{concept.id}: the definition is longer than {_MAX_DEFINITION_WORDS} words"
            )
        for parent in concept.parents:
            if parent not in table:
                found.append(f"{concept.id}: is_a {parent} does not exist")
        for relation, target in concept.relations:
            if target not in table:
                found.append(f"{concept.id}: {relation} {target} does not exist")
        for form in concept.surface_forms:
            key = linker.key(form)  # plurals and hyphens make forms equal that look different
            other = owner.setdefault(key, concept)
            if other is not concept:
                found.append(f"{concept.id}: {form!r} already belongs to {other.id}")
    by_definition: dict[str, str] = {}
    for concept in table:
        if concept.definition:
            first = by_definition.setdefault(concept.definition.lower(), concept.id)
            if first != concept.id:
                found.append(f"{concept.id}: has the definition of {first} word for word")
    return found


def main() -> int:
    try:
        table = load_concepts(sys.argv[1] if len(sys.argv) > 1 else None)
        lines = problems(table)
    except LexiconError as error:
        print(error, file=sys.stderr)
        return 2
    for line in lines:
        print(line)
    print(f"{len(table)} concepts, {len(lines)} problems")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
