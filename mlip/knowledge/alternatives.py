"""Alternatives: of "atelectasis or pneumonia" a report states neither.

What does not live here: the state of each finding by the cues around it (scope.py), the words that
join alternatives (kind `choice` of lexicon/_cues.yaml).
"""

from __future__ import annotations

from mlip.knowledge.concepts import CHEXPERT, ConceptTable
from mlip.knowledge.events import (
    ABSENT,
    CUE,
    FIXED,
    TERM,
    UNCERTAIN,
    Event,
    Found,
    any_of,
    before,
    one_by_one,
    right_before,
)

_FINDING, _COMMA, _ARTICLE, _STATEMENT, _UNCHANGED = one_by_one(
    "finding comma article statement unchanged"
)
_BEGINS = any_of("strong weak current article predicate indefinite said_behind size")
# words that may stand before the second of two: "or, less likely, a small nodule"
_BEFORE_SECOND = _BEGINS | any_of("uncertain_before doubt")
_NO_BEGIN = CUE & ~_BEGINS | _FINDING
_STATEMENT_ENDS = any_of("clause positive")
_UNKNOWN = 2  # words of no concept and no cue: "atelectasis or early developing pneumonia"


def kin_of(table: ConceptTable) -> dict[int, tuple[int, ...]]:
    """Row -> rows that are there too where it is one of two alternatives."""
    of_label: dict[str, list[int]] = {}
    for row, concept in enumerate(table):
        for label in concept.mappings.get(CHEXPERT, ()):
            of_label.setdefault(label, []).append(row)
    kin: dict[int, set[int]] = {}
    for rows in of_label.values():
        for row in rows:
            kin.setdefault(row, set()).update(rows)
    for row, concept in enumerate(table):
        if concept.parents:
            kin.setdefault(row, set()).update(table.index[c] for c in concept.parents if c in table)
    return {row: tuple(rows - {row}) for row, rows in kin.items()}


def places_of(table: ConceptTable) -> dict[int, frozenset[str]]:
    """Row -> where it or what it is a kind of lies, with all of which these places are parts."""
    within = {concept.id: concept for concept in table if concept.relations}
    found = {}
    for row, concept in enumerate(table):
        of_kind = [within[name] for name in (concept.id, *concept.parents) if name in within]
        left = [place for kind in of_kind for name, place in kind.relations if name == "located_in"]
        places: set[str] = set()
        while left:
            if (place := left.pop()) in places or place not in table:
                continue
            places.add(place)
            left += table[place].parents
            left += [whole for name, whole in table[place].relations if name == "part_of"]
        if places:
            found[row] = frozenset(places)
    return found


def leave_open(
    choices: list[int], events: list[Event], found: list[Found], words: list[str]
) -> None:
    """Make findings uncertain that a sentence joins by "or" or "and/or", if it denies none.

    A list whose last comma stands before "or" is joined as a whole ("edema, scar, or pneumonia").
    Where one is a kind of the other ("effusion or hemothorax") the other is there in either case,
    as are both where CheXpert has one label for them ("nodule or mass"); and a denied change is of
    findings that are there ("no change in edema or effusion").

    choices: the events that may join them
    words: every piece of the text, a word or a sign with the blanks behind it
    """
    of_event: dict[int, int] = {}
    for k, (_, _, _, i, _) in enumerate(found):
        of_event.setdefault(i, k)
    for j in choices:
        start = events[j][0]
        first, is_close = _first(events, j)
        if first not in of_event or _is_of_change(events, j):
            continue
        second = _second(events, j, is_close)
        joined = [of_event[first]]
        if second in of_event:
            joined.append(of_event[second])
            listed = first
            if events[first][1] != start:  # a comma before "or"
                while (listed := _listed_before(events, listed)) in of_event:
                    joined.append(of_event[listed])
        elif events[first][1] != start or not _names_other(events, j, words):
            continue  # "nodule or overlying vessel" is open too
        if all(found[k][4] != ABSENT for k in joined):
            _doubt(events, found, joined)


def _doubt(events: list[Event], found: list[Found], joined: list[int]) -> None:
    """Uncertain, but for what another of them is a kind of; one concept twice is no choice."""
    if len(joined) > 1 and len({found[k][2] for k in joined}) == 1:
        return
    stated = {row for k in joined for row in events[found[k][3]][2].kin}
    for k in joined:
        if found[k][2] not in stated:
            found[k] = (*found[k][:4], UNCERTAIN)


def _first(events: list[Event], j: int) -> tuple[int, bool]:
    """The finding that the choice at event j joins to another, -1 = none, and whether it stands
    right before it; else anatomy may stand between: "atelectasis at the base or pneumonia"."""
    i, edge = j - 1, events[j][0]
    if right_before(events, j) & _COMMA:
        i, edge = i - 1, events[i][0]
    if right_before(events, i + 1) & _FINDING:
        return i, True
    unknown = 0
    while i >= 0 and events[i][2].flags & (FIXED | _ARTICLE):
        unknown += edge - events[i][1]
        i, edge = i - 1, events[i][0]
    if i < 0 or i == j - 1 or not events[i][2].flags & _FINDING:
        return -1, False
    return (i if unknown + edge - events[i][1] <= _UNKNOWN else -1), False


def _second(events: list[Event], j: int, is_close: bool) -> int:
    """The finding behind the choice at event j, -1 = none."""
    edge, unknown = events[j][1], 0
    for i in range(j + 1, len(events)):
        start, end, entry = events[i]
        unknown += start - edge
        if unknown > _UNKNOWN:
            return -1
        flags = entry.flags
        if flags & _FINDING:
            return i
        is_word = flags & _BEFORE_SECOND or flags & TERM and not flags & CUE
        if not is_word or flags & (_STATEMENT if is_close else FIXED):
            return -1
        edge = end
    return -1


def _listed_before(events: list[Event], i: int) -> int:
    """The finding right before the comma before the item of a list at event i, -1 = none."""
    edge, unknown = events[i][0], 0
    for at in range(i - 1, 0, -1):
        start, end, entry = events[at]
        unknown += edge - end
        if unknown > _UNKNOWN:
            return -1
        if entry.flags & _COMMA:
            return at - 1 if right_before(events, at) & _FINDING else -1
        if entry.flags & _NO_BEGIN:
            return -1
        edge = start
    return -1


def _is_of_change(events: list[Event], j: int) -> bool:
    """Whether a denied change stands before event j in its statement."""
    return before(events, j, _STATEMENT_ENDS | _UNCHANGED) & _UNCHANGED != 0


def _names_other(events: list[Event], j: int, words: list[str]) -> bool:
    """Whether a word of no concept stands behind the choice at event j; "tortuosity or ectasia of
    the aorta" is a term written apart."""
    end = events[j][1]
    if end == len(words) or not words[end][0].isalpha():
        return False
    return j + 1 == len(events) or events[j + 1][0] > end or not events[j + 1][2].parts
