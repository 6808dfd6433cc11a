"""Asides: what "rather than X", "status post X", a denied "increase in X", "no A in the X" and "in
the appropriate clinical setting" say of X alone.

What does not live here: the state of the rest of the sentence (scope.py).
"""

from __future__ import annotations

from mlip.knowledge.events import (
    ABSENT,
    FLAG,
    PRESENT,
    SENTENCE_ENDS,
    UNCERTAIN,
    Event,
    Found,
    State,
)

_REJECTED, _PAST, _CHANGE_OF = FLAG["rejected"], FLAG["past"], FLAG["change_of"]
_REMOVAL, _FAILED, _PLACING = FLAG["removal"], FLAG["failed"], FLAG["placing"]
_TRIED = _FAILED | FLAG["tried"]
_MORE, _STRUCTURE, _ARTICLE = FLAG["more"], FLAG["structure"], FLAG["article"]
_COMMA, _OR, _AND = FLAG["comma"], FLAG["or"], FLAG["and"]
_HEDGES = FLAG["uncertain_before"] | FLAG["uncertain_after"]
_ENDS = _COMMA | FLAG["clause"] | FLAG["positive"] | FLAG["negation_before"]
_IN_NAME = _ARTICLE | FLAG["be"]  # "no edema the lungs are hyperinflated"
_ALT, _SAYS = FLAG["alternative"], FLAG["be"] | FLAG["uncertain_before"]
_QUALITY = FLAG["strong"] | FLAG["weak"]
_STATEMENT = _COMMA | FLAG["seen"]  # behind these "rather than" is of all of it


def judge_asides(
    asides: list[tuple[int, State]],
    events: list[Event],
    found: list[Found],
    owner: list[int],
    words: list[str],
) -> None:
    """Give the findings of each aside the state that it says, where they have the sentence's.

    "Rather than X" denies X where the rest is stated. "Status post X", a denied change of X and
    "the X" that something denied would be in state it. A hedge or denial behind an aside speaks of
    it too and stands.

    asides: event and state of the sentence there
    owner: event behind each of found
    words: every piece of the text, a word or a sign with the blanks behind it
    """
    for i, around in asides:
        flags = events[i][2].flags
        said: State = PRESENT
        if flags & _REJECTED:
            if around != PRESENT:
                continue
            said = _rejected_state(events, i, words)
        elif flags & _CHANGE_OF and around != ABSENT:
            continue
        elif flags & _ARTICLE and not _is_given(events, i):
            continue
        elif flags & _TRIED:
            if not is_of_placing(events, i):
                continue
            said = ABSENT if flags & _FAILED else UNCERTAIN
        end = _end_of_name(events, i) if flags & (_ARTICLE | _TRIED) else _end(events, i)
        for k, j in enumerate(owner):
            if i < j < end and found[k][3] == around and not events[j][2].fixed:
                if flags & _MORE and events[j][2].flags & _STRUCTURE:
                    continue  # "no edema or increase in lung markings": more of them is the finding
                # "status post chest tube removal"
                if j + 1 == len(events) or not events[j + 1][2].flags & _REMOVAL:
                    found[k] = (*found[k][:3], said)


def _end(events: list[Event], i: int) -> int:
    """The event before which the aside of event i ends, with the sentence at the latest.

    "Rather than X" reaches over what "or" joins to X, "status post X" to a comma or "or", a denied
    "increase in X" to a comma.
    """
    flags = events[i][2].flags
    rejects, stops = flags & _REJECTED, _ENDS
    if flags & _PAST:
        stops |= _OR
    is_open = True  # no term of what is rejected yet, or "or" behind the last one
    for j in range(i + 1, len(events)):
        entry = events[j][2]
        if entry.flags & stops or entry.flags & _TRIED and is_of_placing(events, j):
            return j
        if entry.flags & _OR:
            is_open = True
        elif rejects and not is_open:
            return j
        elif entry.opens or entry.device:
            is_open = False
    return len(events)


def _end_of_name(events: list[Event], i: int) -> int:
    """The event behind the one finding or device that event i speaks of: "the left lower lobe mass"
    names one, "the left lower lobe suggestive of pneumonia" none. Up to one word may be unknown,
    before the first place or finding."""
    last, may_skip = events[i][1], 1
    for j in range(i + 1, len(events)):
        start, end, entry = events[j]
        if start - last > may_skip:
            return j
        if entry.opens or entry.device:
            return j + 1
        if entry.flags & ~_IN_NAME and not entry.flags & _QUALITY:
            return j
        if entry.concept >= 0 and entry.fixed:
            may_skip = 0
        last = end
    return len(events)


def _rejected_state(events: list[Event], i: int, words: list[str]) -> State:
    """The state of what the "rather than" of event i names, where the rest is stated.

    "Atelectasis rather than pneumonia" denies the second, as the patterns of NegBio and CheXpert
    do. "Chronic rather than acute fracture" states the fracture. Behind a word that is no concept
    ("linear rather than nodular opacity") either may be meant.
    """
    start = events[i][0]
    if not start or words[start - 1][0] in SENTENCE_ENDS:
        return ABSENT
    if not i or events[i - 1][1] != start:
        return UNCERTAIN
    before = events[i - 1][2]
    if before.flags & _QUALITY and before.length == 1:
        return PRESENT
    is_name = before.opens or before.device or before.fixed
    return ABSENT if is_name or before.flags & _STATEMENT else UNCERTAIN


def _is_given(events: list[Event], i: int) -> bool:
    """Whether the article of event i names what is there: "no calcification in the nodule", not
    "no edema or the nodule". A word of place or cause stands before it, a denied finding before
    that."""
    for _, _, entry in reversed(events[:i]):
        if entry.opens:
            return True
        if entry.device or entry.flags & ~(_QUALITY | _ARTICLE):
            return False
    return False


def is_of_placing(events: list[Event], i: int) -> bool:
    """Whether what event i says to have failed is the placing of a device right behind it: "failed
    PICC placement", not "failed hardware" or "failed therapy requiring chest tube placement". Of a
    try, "attempted PICC" is enough."""
    last = events[i][1]
    for j in range(i + 1, len(events)):
        start, end, entry = events[j]
        if start - last > 1:
            return False
        if entry.device:
            if not events[i][2].flags & _FAILED:
                return True
            behind = events[j + 1 : j + 2]
            return bool(behind) and behind[0][0] == end and behind[0][2].flags & _PLACING != 0
        if entry.flags & ~(_QUALITY | _ARTICLE | _PLACING):
            return False
        last = end
    return False


def is_assessed(events: list[Event], i: int) -> bool:
    """Whether what event i says to be unassessed is no finding or one that is there: "the left base
    cannot be evaluated", "the extent of the effusion cannot be assessed", a device."""
    j = i - 1
    if j < 0 or not events[j][2].opens:
        return True
    while j > 0 and (events[j][2].flags == 0 or events[j][2].flags & _QUALITY):
        if events[j - 1][1] != events[j][0]:
            return False
        j -= 1
    return events[j][2].flags & _ARTICLE != 0


def is_of_structure(events: list[Event], i: int) -> bool:
    """Whether the first finding behind event i is a structure that everybody has, of which more
    is the finding: "no increase in lung markings"."""
    for _, _, entry in events[i + 1 :]:
        if entry.opens:
            return entry.flags & _STRUCTURE != 0
        if entry.flags & ~(_QUALITY | _ARTICLE):
            return False
    return False


def suppose(events: list[Event], i: int, found: list[Found], owner: list[int], stop: int) -> bool:
    """Leave open the finding before event i ("pneumonia in the appropriate clinical setting") and
    what "or" joins to it; False where event i speaks of what follows. What a hedge of its own
    follows is left to that.

    stop: the piece behind the sentence's last
    """
    end = events[i][1]
    if i + 1 < len(events):
        start, _, entry = events[i + 1]
        if start == end and entry.flags & _SAYS:
            return False  # "which in the proper setting is consistent with edema"
        if i and start > end and not events[i - 1][2].opens:
            return False  # "consolidation in the base in the proper setting represents pneumonia"
    if not any(entry.opens for _, _, entry in events[:i]):
        # "in the appropriate clinical setting, the opacity may reflect pneumonia"
        return any(entry.flags & _HEDGES for _, _, entry in events[i + 1 :])
    met = False
    k = len(found) - 1
    for j in range(i - 1, -1, -1):
        entry = events[j][2]
        while k >= 0 and owner[k] > j:
            k -= 1
        if entry.opens and k >= 0 and owner[k] == j:
            found[k] = (*found[k][:3], UNCERTAIN)
            met = True
        elif entry.flags & (_OR | _ALT):
            continue
        elif j == i - 1 == len(events) - 2 and entry.flags & _COMMA:
            continue  # "pneumonia, in the appropriate clinical setting"
        elif entry.flags & _ENDS or met and not entry.flags & _QUALITY:
            break
    return met
