"""What each surface form of a table can mean, by its key: the words the linker looks for.

What does not live here: finding them in a text (linker.py) and the cue words (cues.py).
"""

from __future__ import annotations

from mlip.knowledge.alternatives import kin_of, places_of
from mlip.knowledge.concepts import ConceptTable, LexiconError
from mlip.knowledge.cues import Cues, cues_of
from mlip.knowledge.events import FLAG, Entry, Part, any_of
from mlip.knowledge.word_codes import MARKS, PARAGRAPH_MARK, WordCodes

# semantic type -> kind of term; all others are findings
_TERM = {"anatomy": "anatomy", "normal": "statement", "device": "device"}
_TERM |= dict.fromkeys(("procedure", "external_object", "qualifier", "technique"), "mark")
_BEGINS, _DENIES = any_of("strong weak current"), FLAG["negation_before"]


def entries_of(table: ConceptTable, codes: WordCodes) -> dict[str, Entry]:
    """Key of a surface form -> its entry, the shorter ones first.

    Raises:  LexiconError where a cue or a term cannot be matched
    """
    cues = cues_of(table)
    flags = _flags_of_cues(cues, codes)
    owners: dict[str, int] = {}  # key -> row of the first concept with this form
    for row, concept in enumerate(table):
        for form in concept.surface_forms:
            owners.setdefault(codes.key(form), row)
        for form in concept.excludes:
            flags.setdefault(codes.key(form.lower()), 0)
    width = codes.width
    parts = _parts(table, codes, owners)
    types = [concept.semantic_type for concept in table]
    _give_flags_of_parts(flags, owners, types, width)
    normals = _normals(table)
    kin, places = kin_of(table), places_of(table)
    entries: dict[str, Entry] = {}
    # a statement needs the entry of its anatomy, which is shorter
    for key in sorted(dict.fromkeys((*flags, *owners, *parts)), key=len):
        row = owners.get(key, -1)
        kind = types[row] if row >= 0 else ""
        reads_lists = kind == "normal" and "normal" in cues
        side, subject = _subject(key, owners, types, width) if reads_lists else (0, "")
        entries[key] = Entry(
            length=len(key) // width,
            flags=flags.get(key, 0)
            | (FLAG["normal"] if side else 0)
            | (FLAG[_TERM.get(kind, "finding")] if row >= 0 else 0),
            concept=row,
            kin=kin.get(row, ()),
            places=places.get(row, frozenset()),
            parts=tuple(parts.get(key, ())),
            normals=tuple(normals.get(table.concepts[row].id, ())) if row >= 0 else (),
            subject_side=side,
            subject=entries.get(subject),
        )
    return entries


def _flags_of_cues(cues: Cues, codes: WordCodes) -> dict[str, int]:
    flags = {codes[PARAGRAPH_MARK]: FLAG["sentence"]}
    for mark, kinds in MARKS.items():
        flags[codes[mark]] = any_of(kinds)
    for kind, forms in cues.items():
        for form in forms:
            try:
                key = codes.key(form)
            except LexiconError as error:
                raise LexiconError(f"cues, {kind}: {error}") from None
            flags[key] = flags.get(key, 0) | FLAG[kind]
    return flags


def _parts(table: ConceptTable, codes: WordCodes, owners: dict[str, int]) -> dict[str, list[Part]]:
    """Key -> the slots of terms written apart that it fills."""
    parts: dict[str, list[Part]] = {}
    used = 0
    for row, concept in enumerate(table):
        for term in concept.apart:
            slots = range(used, used + len(term))
            used += len(term)
            for slot, forms in zip(slots, term, strict=True):
                part = Part(slot, tuple(s for s in slots if s != slot), slots[-1], row)
                for form in forms:
                    parts.setdefault(codes.key(form.lower()), []).append(part)
    for key, row in owners.items():
        # "healed fracture" is also the part "fracture" where one concept owns both
        for cut in _cuts(key, codes.width):
            tail = key[cut:]
            if tail in parts and owners.get(tail) == row and key not in parts:
                parts[key] = parts[tail]
    return parts


def _give_flags_of_parts(
    flags: dict[str, int], owners: dict[str, int], types: list[str], width: int
) -> None:
    """Give names the flags that words in them would have."""
    for key, row in owners.items():
        cuts = _cuts(key, width)
        # "no acute disease" begins a list as "no" does: "no acute disease or effusion"
        if types[row] == "normal" and any(flags.get(key[:cut], 0) & _DENIES for cut in cuts):
            flags[key] = flags.get(key, 0) | _DENIES
        # "mild atelectasis" as one name begins a statement as "mild" before any other does
        cues = (flags.get(key[:cut], 0) & _BEGINS for cut in reversed(cuts))
        if (begin := next(filter(None, cues), 0)) and not flags.get(key):
            flags[key] = begin
        # "heart enlarged" is a statement, "enlarged heart" a name
        if len(key) > width and flags.get(key[-width:], 0) & FLAG["predicate"]:
            heads = [owners.get(key[:cut], -1) for cut in cuts]
            if any(head >= 0 and types[head] == "anatomy" for head in heads):
                flags[key] = flags.get(key, 0) | FLAG["be"]


def _normals(table: ConceptTable) -> dict[str, list[int]]:
    """Id of an anatomy -> rows of the statements that it is as it should be."""
    normals: dict[str, list[int]] = {}
    for row, concept in enumerate(table):
        for relation, place in concept.relations if concept.semantic_type == "normal" else ():
            if relation == "located_in":
                normals.setdefault(place, []).append(row)
    return normals


def _subject(key: str, owners: dict[str, int], types: list[str], width: int) -> tuple[int, str]:
    """-1 where a normal statement begins with its anatomy ("heart size is normal"), 1 where it
    ends with it ("normal heart size"), else 0; and the longest such anatomy."""
    for side in (-1, 1):
        for cut in _cuts(key, width):
            part = key[:-cut] if side < 0 else key[cut:]
            row = owners.get(part, -1)
            if row >= 0 and types[row] == "anatomy":
                return side, part
    return 0, ""


def _cuts(key: str, width: int) -> range:
    """Where a key can be cut between two words."""
    return range(width, len(key), width)
