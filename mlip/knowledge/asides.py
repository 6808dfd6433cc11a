"""Asides: what "rather than X", "status post X" and a denied "increase in X" say of X alone.

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
_REMOVAL = FLAG["removal"]
_COMMA, _OR = FLAG["comma"], FLAG["or"]
_ENDS = _COMMA | FLAG["clause"] | FLAG["positive"] | FLAG["negation_before"]
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

    "Rather than X" denies X where the rest is stated. "Status post X" and a denied change of X
    state it. A hedge or denial behind an aside speaks of it too and stands.

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
        end = _end(events, i)
        for k, j in enumerate(owner):
            if i < j < end and found[k][3] == around and not events[j][2].fixed:
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
        if entry.flags & stops:
            return j
        if entry.flags & _OR:
            is_open = True
        elif rejects and not is_open:
            return j
        elif entry.opens or entry.device:
            is_open = False
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
