"""Labels from reports: of each named finding whether a report states, denies or doubts it."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence, Set
from typing import NamedTuple

from mlip.knowledge.concepts import CHEXPERT, Concept, ConceptTable, LexiconError
from mlip.knowledge.linker import Linker, State
from mlip.knowledge.plain_letters import plain

_DEVICES = "device"
# what a normal statement of our lexicon denies, and with it every kind of that
_NORMAL = {
    "normal_heart_size": ("cardiomegaly",),
    "normal_mediastinum": ("wide_mediastinum",),
    "clear_lungs": ("lung_opacity",),
    "normal_bones": ("fracture",),
    "normal_pleura": ("pleural_effusion",),
    "normal_trachea": ("tracheal_deviation",),
    "normal_vessels": ("vascular_congestion",),
}
_RANK: dict[State, int] = {"present": 2, "uncertain": 1, "absent": 0}


class _Role(NamedTuple):
    """Of which names a mention of one concept speaks."""

    stated: frozenset[str]  # present or uncertain where it is
    denied: frozenset[str]  # absent where it is
    is_pathology: bool  # one of those of which CheXpert's "No Finding" wants none


def chexpert_names(table: ConceptTable) -> tuple[str, ...]:
    """CheXpert's labels that the concepts of a table name as theirs, in the table's order.

    Raises:  LexiconError where there are none
    """
    names = tuple(dict.fromkeys(code for c in table for code in c.mappings.get(CHEXPERT, ())))
    if not names:
        raise LexiconError(
            "the lexicon names no concept as a label of CheXpert: say which findings to label"
        )
    return names


class ReportLabels:
    """What reports say of a list of findings.

    A finding is present where the report states it or a kind of it (a hydropneumothorax is a
    pneumothorax), else uncertain where it doubts one, else absent where it denies it or what it is
    a kind of; "the lungs are clear" denies opacities. Denying one kind alone says nothing, but
    where it bears the finding's name: "no rib fracture" denies fractures as "no displaced
    fracture" does, and as CheXpert's labels have it.
    CheXpert's "No Finding" is present where none of its other labels, support devices apart, is
    present or uncertain, else absent.

    names  CheXpert's labels, or names, synonyms or ids of the table's concepts
    Raises:  LexiconError for a name that the table does not know, or that comes twice
    Source:  mentions and their states: linker.py; the order of states and "No Finding": Irvin et
             al. 2019 (CheXpert, arXiv 1901.07031), section 3
    """

    def __init__(self, linker: Linker, names: Sequence[str]) -> None:
        self.linker, self.names = linker, tuple(names)
        if not names or len(set(names)) < len(names):
            raise LexiconError(f"findings: expected different names, got {list(names)}")
        table = linker.table
        asked = {name: _concepts_of(name, table) for name in names}
        self._all_clear = frozenset(
            name for name, found in asked.items() if {c.semantic_type for c in found} == {"normal"}
        )
        self._ids = {
            name: frozenset(concept.id for concept in found)
            for name, found in asked.items()
            if name not in self._all_clear
        }
        self._above = {
            name: ids.union(*(table.ancestors(identifier) for identifier in ids))
            for name, ids in self._ids.items()
        }
        self._roles: dict[str, _Role] = {}

    def states(self, text: str) -> dict[str, State]:
        """Of each name that the report speaks of its state, in the order of the names."""
        found: dict[str, State] = {}
        has_pathology = False
        for concept_id, state in self._said(text):
            role, is_denied = self._role(concept_id), state == "absent"
            has_pathology |= role.is_pathology and not is_denied
            for name in role.denied if is_denied else role.stated:
                if name not in found or _RANK[state] > _RANK[found[name]]:
                    found[name] = state
        for name in self._all_clear:
            found[name] = "absent" if has_pathology else "present"
        return {name: found[name] for name in self.names if name in found}

    def _said(self, text: str) -> Iterator[tuple[str, State]]:
        """(concept id, state) of each mention, and of what its normal statements deny."""
        for mention in self.linker.link(text):
            yield mention.concept_id, mention.state
            if mention.state == "present":
                for concept_id in _NORMAL.get(mention.concept_id, ()):
                    if concept_id in self.linker.table:
                        yield concept_id, "absent"

    def _role(self, concept_id: str) -> _Role:
        role = self._roles.get(concept_id)
        if role is None:
            table = self.linker.table
            own = {concept_id} | table.ancestors(concept_id)
            role = self._roles[concept_id] = _Role(
                frozenset(name for name, ids in self._ids.items() if ids & own),
                frozenset(
                    name
                    for name, above in self._above.items()
                    if concept_id in above or self._bears_name(table[concept_id], name, own)
                ),
                any(_is_pathology(table[identifier]) for identifier in own),
            )
        return role

    def _bears_name(self, concept: Concept, name: str, own: Set[str]) -> bool:
        """Whether a concept is a kind of a finding and called so, with a word before it; of
        devices none: that there is no chest tube says nothing of other tubes."""
        if concept.semantic_type == _DEVICES:
            return False
        table = self.linker.table
        forms = [form for i in self._ids[name] & own for form in table[i].surface_forms]
        return any(concept.name.lower().endswith(f" {form}") for form in forms)


def _is_pathology(concept: Concept) -> bool:
    """One of CheXpert's labels but its "No Finding" and "Support Devices"."""
    return CHEXPERT in concept.mappings and concept.semantic_type not in (_DEVICES, "normal")


def _concepts_of(name: str, table: ConceptTable) -> list[Concept]:
    """All concepts of a CheXpert label, or the one of this name, synonym or id."""
    found = [concept for concept in table if name in concept.mappings.get(CHEXPERT, ())]
    wanted = _plain(name)
    if not found:
        found = [c for c in table if wanted in (_plain(c.id), *map(_plain, c.surface_forms))][:1]
    if not found:
        forms = ((c.name, *c.mappings.get(CHEXPERT, ())) for c in table)
        known = {_plain(form): form for both in forms for form in both}
        near = [known[key] for key in difflib.get_close_matches(wanted, known, n=3, cutoff=0.5)]
        hint = f"; near: {', '.join(near)}" if near else ""
        raise LexiconError(f"no concept {name!r} in {len(table)} concepts{hint}")
    return found


def _plain(name: str) -> str:
    return " ".join(plain(name).replace("_", " ").lower().split())
