"""How far a cue reaches over commas, "and" and "with": one list goes on, or a statement begins.

What does not live here: what the cues do (scope.py) and the cue words (lexicon/_cues.yaml).
"""

from __future__ import annotations

from itertools import takewhile

from mlip.knowledge.events import ABSENT, FLAG, UNCERTAIN, Entry, Event

_NEG, _NOT, _CLAUSE, _POS = (
    FLAG["negation_before"],
    FLAG["not"],
    FLAG["clause"],
    FLAG["positive"],
)
_STRONG, _WEAK, _ARTICLE = FLAG["strong"], FLAG["weak"], FLAG["article"]
_BE, _SEEN, _PREDICATE = FLAG["be"], FLAG["seen"], FLAG["predicate"]
_COMMA, _AND, _OR, _WITH = FLAG["comma"], FLAG["and"], FLAG["or"], FLAG["with"]
_INDEFINITE, _SAID_BEHIND = FLAG["indefinite"], FLAG["said_behind"]
_SIZE, _LIMIT = FLAG["size"], FLAG["limit"]
_ALT = FLAG["alternative"]
_SAYS = _BE | _ALT | _PREDICATE | _SAID_BEHIND
_ENDS_LIST = _CLAUSE | _POS | _NEG | _NOT


def list_goes_on(
    events: list[Event], i: int, state: str, closed: bool, single: bool, listing: bool
) -> bool:
    """Whether a cue still reaches over the comma at event i.

    closed: a verb came after a term since the cue
    single: the cue reaches one term, not a list
    listing: it reaches over a list without "or"
    """
    if closed:
        return False
    following = events[i + 1][2].flags if i + 1 < len(events) else 0
    if following & _LIMIT and i + 2 < len(events) and not events[i + 2][2].flags & _SIZE:
        following = events[i + 2][2].flags  # "no effusion, at least moderate edema"
    has_or = has_be = False
    ends_list = False  # ", or" ends a list, whatever its middle looks like
    in_segment = True  # up to the next comma
    met = 0
    # ", or" in a row: "no edema, or 8 mm nodule", not "no edema, 5 or 6 mm nodule"
    before = _COMMA if i + 1 < len(events) and events[i + 1][0] == events[i][1] else 0
    device = state == ABSENT and i + 1 < len(events) and _is_first_device(events, i)
    for j in range(i + 1, len(events)):
        entry = events[j][2]
        flags = entry.flags
        met |= flags
        if flags & _ENDS_LIST and not flags & _SAID_BEHIND:
            break
        if flags & _COMMA:
            in_segment = False
        elif flags & _OR:
            has_or, device = True, False
            ends_list = ends_list or before & _COMMA != 0
        elif flags & _AND and not in_segment:
            if single:
                break  # "no acute disease, left effusion, and scar"
            has_or = True
        elif (flags & _SAYS or entry.resets) and in_segment and not has_or and not has_be:
            has_be = _says_of_subject(events, i, j, state)
        elif flags & _SEEN and in_segment and not has_or:
            has_be = has_be or _is_seen_behind_list(events, i, j)
        before = flags
    begins = bool(following & _STRONG) and not (following & _WEAK and state == ABSENT)
    if following & (_ARTICLE | _WITH) and state == ABSENT:
        begins = True  # "no edema, the nodule ...", "no edema, with atelectasis at the base"
    if has_be or device:
        return False
    has_size = met & _SIZE and _has_size(events, i) and not _ends_with_other(events, i)
    if not ends_list and (begins or has_size):
        return _is_quality_of_list(events, i)
    if has_or or listing:
        return True
    if single or state == UNCERTAIN:
        return bool(following & (_AND | _OR))
    return not following & _WEAK


def starts_anew(events: list[Event], i: int, state: str, single: bool) -> bool:
    """Whether "and" or "with" at event i begins a statement of its own.

    single: the cue before reaches one term, not a list
    """
    if i + 1 >= len(events):
        return False
    following = events[i + 1][2].flags
    if following & _INDEFINITE and state == ABSENT and not _is_second_article(events, i):
        return True  # "no edema, and a small effusion"; a list of denials has "or" there
    if following & (_STRONG | _ARTICLE | _POS):
        return not (following & _ARTICLE and state == UNCERTAIN)
    if following & _WEAK and events[i][2].flags & _WITH:
        return state == ABSENT
    if single or _has_size(events, i):
        return True
    # two denied have no comma before "and": "no edema, and small effusions are seen"
    is_pair = following & _WEAK and state == ABSENT and _is_first_comma(events, i - 1)
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
        entry, before = events[j][2], events[j - 1][2]
        if entry.flags & _SIZE:
            if before.flags & _LIMIT or j + 1 < len(events) and events[j + 1][2].flags & _LIMIT:
                return False
            if before.opens:
                return True
            is_sized = True
        elif entry.opens and is_sized:
            return True
        elif before.opens or entry.flags & _COMMA:
            return False
    return False


def _ends_with_other(events: list[Event], i: int) -> bool:
    """Whether "or" joins two findings behind event i of which one cannot be the other, as they lie
    apart: "no edema, 8 mm nodule or effusion" goes on as a list, "8 mm nodule or granuloma" is a
    choice."""
    places: frozenset[str] = frozenset()
    is_joined = False
    for _, _, entry in events[i + 1 :]:
        if entry.opens:
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
    behind = [entry for _, _, entry in events[i + 1 : j]]
    if not any(entry.opens for entry in behind) or behind[0].flags & _AND:
        return False
    has_last = is_joined = False
    for k in range(i - 1, -1, -1):
        entry = events[k][2]
        if entry.opens or entry.device:
            if is_joined:
                return True
            has_last = True
        elif entry.flags & (_OR | _AND):
            is_joined = has_last
        elif entry.flags & _COMMA and not is_joined:
            return False  # "no mass or nodule, edema, effusion is seen" is a list still
        elif entry.flags & _ENDS_LIST and not (k and events[k - 1][2].flags & _AND):
            return False  # but of "no effusion and no mass"
    return False


def _says_of_subject(events: list[Event], i: int, j: int, state: str) -> bool:
    """Whether event j says something of a subject that stands behind event i: "heart enlarged",
    "the nodule is", and where that is denied so far "catheter unchanged"."""
    start, end, entry = events[j]
    flags = entry.flags
    if flags & (_BE | _ALT):
        return True
    if flags & _PREDICATE:
        return _has_subject(events, i, entry)
    if state != ABSENT or not (flags & _SAID_BEHIND or entry.resets):
        return False
    _, last, subject = events[j - 1]
    if last != start or not (subject.device or subject.opens and not entry.resets):
        return False
    return j + 1 == len(events) or events[j + 1][0] != end or not events[j + 1][2].opens


def _has_subject(events: list[Event], i: int, predicate: Entry) -> bool:
    """Whether anatomy stands between event i and the predicate: "heart mildly enlarged"."""
    between = takewhile(lambda event: event[2] is not predicate, events[i + 1 :])
    return any(entry.fixed for _, _, entry in between)


def _is_quality_of_list(events: list[Event], i: int) -> bool:
    """Whether the comma at event i stands in a list of qualities of one finding behind it, as in
    "no displaced, healing or acute fracture", not in "no effusion, healing fracture"."""
    _, end, _ = events[i + 1]
    if i + 2 == len(events) or events[i + 2][0] != end:
        return False
    if not events[i + 2][2].flags & (_COMMA | _OR):
        return False
    for _, _, entry in reversed(events[:i]):
        if entry.opens or entry.device or entry.fixed:
            return False
        if entry.flags & _NEG:
            return True
    return False


def _is_first_device(events: list[Event], i: int) -> bool:
    """Whether a device stands behind the comma at event i, and none was denied before it: "no
    effusion, PICC in the SVC"."""
    for j in range(i + 1, len(events)):
        behind = events[j][2]
        if behind.opens or behind.device or behind.flags & _COMMA:
            break
    if not behind.device:
        return False
    for _, _, entry in reversed(events[:i]):
        if entry.flags & _NEG:
            break
        if entry.device:
            return False
    return True


def _is_second_article(events: list[Event], i: int) -> bool:
    """Whether a term denied before event i has an article too: "no sign of a nodule and a mass"."""
    since = takewhile(lambda event: not event[2].flags & _NEG, reversed(events[:i]))
    return any(entry.flags & _INDEFINITE for _, _, entry in since)


def _is_first_comma(events: list[Event], i: int) -> bool:
    """Whether event i is a comma right before its neighbour and the first since the negation."""
    if i < 0 or not events[i][2].flags & _COMMA or events[i][1] != events[i + 1][0]:
        return False
    for _, _, entry in reversed(events[:i]):
        if entry.flags & _NEG:
            return True
        if entry.flags & (_COMMA | _OR):
            return False
    return False
