"""How far a cue reaches over commas, "and" and "with": one list goes on, or a statement begins.

What does not live here: what the cues do (scope.py) and the cue words (lexicon/_cues.yaml).
"""

from __future__ import annotations

from typing import NamedTuple

from mlip.knowledge.events import (
    ABSENT,
    FIXED,
    NAME,
    UNCERTAIN,
    Event,
    State,
    any_of,
    before,
    behind,
    one_by_one,
    right_before,
    right_behind,
)

_FINDING, _DEVICE, _STATEMENT, _NEG, _POS = one_by_one(
    "finding device statement negation_before positive"
)
_STRONG, _WEAK, _ARTICLE, _SEEN, _PREDICATE = one_by_one("strong weak article seen predicate")
_COMMA, _AND, _OR, _WITH, _INDEFINITE = one_by_one("comma and or with indefinite")
_SAID_BEHIND, _SIZE, _LIMIT, _HISTORY, _CURRENT = one_by_one(
    "said_behind size limit history current"
)
_SAYS = any_of("be alternative")  # these of whatever stands before them
_MAY_SAY = _SAYS | _PREDICATE | _SAID_BEHIND | _STATEMENT
# "with a small new effusion"
_BEFORE_NEW = any_of("article indefinite weak strong said_behind mark")
_HEDGES = any_of("uncertain_before uncertain_list supposing doubt doubt_one alternative question")
_ENDS_LIST = any_of("clause positive negation_before not")


def list_goes_on(
    events: list[Event], i: int, state: State, closed: bool, single: bool, listing: bool
) -> bool:
    """Whether a cue still reaches over the comma at event i.

    closed: a verb came after a term since the cue
    single: the cue reaches one term, not a list
    listing: it reaches over a list without "or"
    """
    if closed:
        return False
    rest = _rest_of_list(events, i, state, single)
    if rest.says or not rest.has_or and _is_first_device(events, i, state):
        return False
    following = _following(events, i)
    begins = bool(following & _STRONG) and not (following & _WEAK and state == ABSENT)
    if following & (_ARTICLE | _WITH) and state == ABSENT:
        begins = True  # "no edema, the nodule ...", "no edema, with atelectasis at the base"
    if not rest.is_ended and (begins or _has_size(events, i) and not _ends_with_other(events, i)):
        return _is_quality_of_list(events, i)
    if rest.is_joined or listing:
        return True
    if single or state == UNCERTAIN:
        return bool(following & (_AND | _OR))
    return not following & _WEAK


class _Rest(NamedTuple):
    """What stands behind a comma, up to the next cue that ends a list."""

    says: bool  # something is said of a subject before the next comma
    has_or: bool
    is_joined: bool  # by "or", or by "and" behind another comma
    is_ended: bool  # by ", or", whatever its middle looks like


def _rest_of_list(events: list[Event], i: int, state: State, single: bool) -> _Rest:
    says = has_or = is_joined = is_ended = False
    in_segment = True  # up to the next comma
    # ", or" in a row: "no edema, or 8 mm nodule", not "no edema, 5 or 6 mm nodule"
    last = _COMMA if i + 1 < len(events) and events[i + 1][0] == events[i][1] else 0
    for j in range(i + 1, len(events)):
        flags = events[j][2].flags
        if flags & _ENDS_LIST and not flags & _SAID_BEHIND:
            break
        if flags & _COMMA:
            in_segment = False
        elif flags & _OR:
            has_or = is_joined = True
            is_ended = is_ended or last & _COMMA != 0
        elif flags & _AND and not in_segment:
            if single:
                break  # "no acute disease, left effusion, and scar"
            is_joined = True
        elif in_segment and not is_joined and not says:
            if flags & _MAY_SAY:
                says = _says_of_subject(events, i, j, state)
            elif flags & _SEEN:
                says = _is_seen_behind_list(events, i, j)
        last = flags
    return _Rest(says, has_or, is_joined, is_ended)


def _following(events: list[Event], i: int) -> int:
    """The flags of the event behind event i, of the one behind "at least" where no size is."""
    following = events[i + 1][2].flags if i + 1 < len(events) else 0
    if following & _LIMIT and i + 2 < len(events) and not events[i + 2][2].flags & _SIZE:
        following = events[i + 2][2].flags  # "no effusion, at least moderate edema"
    return following


def _is_first_device(events: list[Event], i: int, state: State) -> bool:
    """Whether a device stands behind a denial of other things: "no effusion, PICC in the SVC"."""
    if state != ABSENT or not behind(events, i, NAME | _COMMA) & _DEVICE:
        return False
    return not before(events, i, _NEG | _DEVICE) & _DEVICE


def starts_anew(events: list[Event], i: int, state: State, single: bool) -> bool:
    """Whether "and" or "with" at event i begins a statement of its own.

    single: the cue before reaches one term, not a list
    """
    if i + 1 >= len(events):
        return False
    following = events[i + 1][2].flags
    if following & _INDEFINITE and state == ABSENT:
        # "no edema, and a small effusion", not "no sign of a nodule and a mass"
        if not before(events, i, _NEG | _INDEFINITE) & _INDEFINITE:
            return True
    if state == UNCERTAIN and behind(events, i, ~_BEFORE_NEW) & _CURRENT:
        if before(events, i, _HEDGES) & _HISTORY:
            return True  # "hx of lung cancer with a new effusion"
    if following & (_STRONG | _ARTICLE | _POS):
        return not (following & _ARTICLE and state == UNCERTAIN)
    if following & _WEAK and events[i][2].flags & _WITH:
        return state == ABSENT
    if single or _has_size(events, i):
        return True
    # two denied have no comma before "and": "no edema, and small effusions are seen"
    is_pair = following & _WEAK and state == ABSENT and _is_behind_first_comma(events, i)
    for j in range(i + 1, len(events)):
        flags = events[j][2].flags
        if flags & (_ENDS_LIST | _COMMA | _OR):
            return False
        if is_pair and flags & _SEEN or _says_of_subject(events, i, j, state):
            return True
    return False


def _has_size(events: list[Event], i: int) -> bool:
    """Whether the first finding behind event i has a size that is no limit: "no edema, 8 mm
    nodule", "no edema, nodule measuring 8 mm", not "no edema, nodule larger than 8 mm"."""
    is_sized = False
    for j in range(i + 1, len(events)):
        flags, last = events[j][2].flags, events[j - 1][2].flags
        if flags & _SIZE:
            if last & _LIMIT or j + 1 < len(events) and events[j + 1][2].flags & _LIMIT:
                return False
            if last & _FINDING:
                return True
            is_sized = True
        elif flags & _FINDING and is_sized:
            return True
        elif last & _FINDING or flags & _COMMA:
            return False
    return False


def _ends_with_other(events: list[Event], i: int) -> bool:
    """Whether "or" joins two findings behind event i of which one cannot be the other, as they lie
    apart: "no edema, 8 mm nodule or effusion" goes on as a list, "8 mm nodule or granuloma" is a
    choice."""
    places: frozenset[str] = frozenset()
    is_joined = False
    for _, _, entry in events[i + 1 :]:
        if entry.flags & _FINDING:
            if is_joined:
                return bool(places and entry.places) and places.isdisjoint(entry.places)
            places = entry.places
        elif entry.flags & _OR:
            is_joined = True
        elif entry.flags & (_COMMA | _ENDS_LIST):
            return False
    return False


def _is_seen_behind_list(events: list[Event], i: int, j: int) -> bool:
    """Whether the verb of event j is of a finding behind the comma at event i, and the list of
    denied ones before it has had its last "or", "nor" or "and": "no effusion or mass, scoliosis is
    noted"."""
    if events[i + 1][2].flags & _AND or not behind(events[:j], i, _FINDING):
        return False
    has_last = is_joined = False
    for k in range(i - 1, -1, -1):
        flags = events[k][2].flags
        if flags & NAME:
            if is_joined:
                return True
            has_last = True
        elif flags & (_OR | _AND):
            is_joined = has_last
        elif flags & _COMMA and not is_joined:
            return False  # "no mass or nodule, edema, effusion is seen" is a list still
        elif flags & _ENDS_LIST and not (k and events[k - 1][2].flags & _AND):
            return False  # but of "no effusion and no mass"
    return False


def _says_of_subject(events: list[Event], i: int, j: int, state: State) -> bool:
    """Whether event j says something of a subject that stands behind event i: "heart enlarged",
    "the nodule is", and where that is denied so far "catheter unchanged"."""
    flags = events[j][2].flags
    if flags & _SAYS:
        return True
    if flags & _PREDICATE:  # "heart mildly enlarged"
        return any(entry.flags & FIXED for _, _, entry in events[i + 1 : j])
    if state != ABSENT or not flags & (_SAID_BEHIND | _STATEMENT):
        return False
    subject = right_before(events, j) & (_DEVICE if flags & _STATEMENT else NAME)
    return subject != 0 and not right_behind(events, j) & _FINDING


def _is_quality_of_list(events: list[Event], i: int) -> bool:
    """Whether the comma at event i stands in a list of qualities of one finding behind it, as in
    "no displaced, healing or acute fracture", not in "no effusion, healing fracture"."""
    if not right_behind(events, i + 1) & (_COMMA | _OR):
        return False
    nearest = before(events, i, _NEG | NAME | FIXED)
    return bool(nearest & _NEG and not nearest & FIXED)


def _is_behind_first_comma(events: list[Event], i: int) -> bool:
    """Whether the first comma since the negation stands right before event i."""
    if not right_before(events, i) & _COMMA:
        return False
    return before(events, i - 1, _NEG | _COMMA | _OR) & _NEG != 0
