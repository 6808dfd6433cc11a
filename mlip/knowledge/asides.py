"""Asides: what "rather than X", "status post X", "failed X placement", a denied "increase in X" and
"no A in the X" say of X alone.

What does not live here: the state of the rest of the sentence (scope.py).
"""

from __future__ import annotations

from mlip.knowledge.events import (
    ABSENT,
    CUE,
    FIXED,
    NAME,
    PRESENT,
    QUALITY,
    SENTENCE_ENDS,
    UNCERTAIN,
    Event,
    Found,
    State,
    any_of,
    before,
    behind,
    one_by_one,
    right_before,
    right_behind,
)

_REJECTED, _PAST, _CHANGE_OF, _REMOVAL, _FAILED = one_by_one(
    "rejected past change_of removal failed"
)
_PLACING, _MORE, _STRUCTURE, _ARTICLE, _OR = one_by_one("placing more structure article or")
_FINDING, _DEVICE = one_by_one("finding device")
_TRIED = any_of("failed tried")
_ENDS = any_of("comma clause positive negation_before")
# what ends a name; a verb does not: "no edema the lungs are hyperinflated"
_NO_NAME = CUE & ~any_of("article be")
_NOT_OF_NAME = CUE & ~(QUALITY | _ARTICLE)
_OF_ALL = any_of("comma seen")  # behind these "rather than" is of all that was said


def judge_asides(
    asides: list[tuple[int, State]], events: list[Event], found: list[Found], words: list[str]
) -> None:
    """Give the findings of each aside the state that it says, where they have the sentence's.

    "Rather than X" denies X where the rest is stated. "Status post X", a denied change of X and
    "the X" that something denied would be in state it. A hedge or denial behind an aside speaks of
    it too and stands.

    asides: event and state of the sentence there
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
        for k, (_, _, _, j, state) in enumerate(found):
            if i < j < end and state == around and not events[j][2].flags & FIXED:
                if flags & _MORE and events[j][2].flags & _STRUCTURE:
                    continue  # "no edema or increase in lung markings": more of them is the finding
                # "status post chest tube removal"
                if j + 1 == len(events) or not events[j + 1][2].flags & _REMOVAL:
                    found[k] = (*found[k][:4], said)


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
        elif entry.flags & NAME:
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
        if entry.flags & NAME:
            return j + 1
        if entry.flags & _NO_NAME and not entry.flags & QUALITY:
            return j
        if entry.flags & FIXED:
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
    flags = right_before(events, i)
    if flags & QUALITY and events[i - 1][2].length == 1:
        return PRESENT
    return ABSENT if flags & (NAME | FIXED | _OF_ALL) else UNCERTAIN


def _is_given(events: list[Event], i: int) -> bool:
    """Whether the article of event i names what is there: "no calcification in the nodule", not
    "no edema or the nodule". A word of place or cause stands before it, a denied finding before
    that."""
    return before(events, i, NAME | _NOT_OF_NAME) & _FINDING != 0


def is_of_placing(events: list[Event], i: int) -> bool:
    """Whether what event i says to have failed is the placing of a device right behind it: "failed
    PICC placement", not "failed hardware" or "failed therapy requiring chest tube placement". Of a
    try, "attempted PICC" is enough."""
    last = events[i][1]
    for j in range(i + 1, len(events)):
        start, end, entry = events[j]
        if start - last > 1:
            return False
        if entry.flags & _DEVICE:
            return not events[i][2].flags & _FAILED or right_behind(events, j) & _PLACING != 0
        if entry.flags & _NOT_OF_NAME:
            return False
        last = end
    return False


def is_of_structure(events: list[Event], i: int) -> bool:
    """Whether the first finding behind event i is a structure that everybody has, of which more
    is the finding: "no increase in lung markings"."""
    return behind(events, i, _FINDING | _NOT_OF_NAME) & _STRUCTURE != 0
