"""What a cue says of what stands before it: "is not seen", "cannot be excluded", "edema: no".

What does not live here: what a cue says of what follows it (scope.py).
"""

from __future__ import annotations

from mlip.knowledge.events import (
    ABSENT,
    CUE,
    FIXED,
    JOINT,
    PRESENT,
    QUALITY,
    SENTENCE_ENDS,
    TERM,
    UNCERTAIN,
    Event,
    Found,
    State,
    any_of,
    before,
    one_by_one,
    right_before,
    right_behind,
)

_FINDING, _DEVICE, _COMMA, _AND, _OR = one_by_one("finding device comma and or")
_ARTICLE, _NORMAL, _TIP, _ALT, _WITH = one_by_one("article normal tip alternative with")
_SEEN, _CLAUSE, _DOUBT_ONE, _QUESTION, _REMOVAL = one_by_one(
    "seen clause doubt_one question removal"
)
_ENDED = any_of("clause negation_after negation_after_one uncertain_after")  # a statement before
_STOPS = _ENDED | any_of("positive negation_before not be seen doubt doubt_one minus plus normal")
_OF_NAME = _ARTICLE | QUALITY
# of a list before a colon: "edema, markings: none"
_NOT_BARE = CUE & ~any_of("structure")
_SAYS, _HEDGES = any_of("be uncertain_before"), any_of("uncertain_before uncertain_after")
_SUPPOSED_FROM = any_of("comma clause positive negation_before")
MAX_GAP = 12  # words and signs within a term written apart, and from a finding to a cue behind it


def look_back(
    events: list[Event], i: int, found: list[Found], words: list[str], state: State, one: int = 0
) -> None:
    """Give the state to the mentions that the cue of event i behind them speaks of.

    words: every piece of the text, a word or a sign with the blanks behind it
    one: not 0 where its verb is in the singular: not over "and"
    """
    k = len(found) - 1
    met_term = False
    met_conjunction = _is_list_before_colon(events, i, words)
    is_normal, is_gone = events[i][2].flags & _NORMAL, events[i][2].flags & _REMOVAL
    for j in range(i - 1, -1, -1):
        flags = events[j][2].flags
        if met_term and _is_colon(words, events[j][1]):
            return  # a heading with an answer of its own
        if is_normal and not met_term and flags & (_COMMA | _WITH | (_AND if one else 0)):
            if events[j][1] < events[i][0]:
                return  # "small effusion, heart and aorta are normal"
        if flags & _COMMA:
            if met_term and not met_conjunction:
                return
        elif flags & _STOPS and not (flags & _SEEN and right_before(events, j) & JOINT):
            if met_term or flags & _ENDED:
                return
        elif flags & _OR:
            met_conjunction = True
        elif flags & _AND:
            if met_term and one:
                return
            if state == UNCERTAIN and _is_denied(events, found[: k + 1]):
                return  # "no effusion and pneumonia cannot be excluded" denies the effusion
            met_conjunction = True
        while k >= 0 and found[k][3] == j:
            if not met_term and events[i][0] - found[k][1] > MAX_GAP:
                return
            # "the tube is unremarkable", "the tip of the tube is not seen", not "as it was removed"
            is_there = flags & _DEVICE and (is_normal or not is_gone and _is_of_tip(events, j, i))
            if not is_there and (not flags & FIXED or events[j][2].concept != found[k][2]):
                found[k] = (*found[k][:4], state)
                met_term = True
            k -= 1


def give_device(events: list[Event], i: int, found: list[Found], state: State) -> None:
    """Give the state to the device that the word of event i stands right behind."""
    if right_before(events, i) & _DEVICE:
        found[-1] = (*found[-1][:4], state)


def suppose(events: list[Event], i: int, found: list[Found], stop: int) -> bool:
    """Leave open the finding before event i ("pneumonia in the appropriate clinical setting") and
    what "or" joins to it; False where event i speaks of what follows. What a hedge of its own
    follows is left to that.

    stop: the piece behind the sentence's last
    """
    if right_behind(events, i) & _SAYS:
        return False  # "which in the proper setting is consistent with edema"
    if 0 < i < len(events) - 1 and events[i + 1][0] > events[i][1]:
        if not events[i - 1][2].flags & _FINDING:
            return False  # "consolidation in the base in the proper setting represents pneumonia"
    if not before(events, i, _FINDING):
        # "in the appropriate clinical setting, the opacity may reflect pneumonia"
        return any(entry.flags & _HEDGES for _, _, entry in events[i + 1 :])
    met = False
    k = len(found) - 1
    for j in range(i - 1, -1, -1):
        flags = events[j][2].flags
        while k >= 0 and found[k][3] > j:
            k -= 1
        if flags & _FINDING and k >= 0 and found[k][3] == j:
            found[k] = (*found[k][:4], UNCERTAIN)
            met = True
        elif flags & (_OR | _ALT):
            continue
        elif j == i - 1 == len(events) - 2 and flags & _COMMA:
            continue  # "pneumonia, in the appropriate clinical setting"
        elif flags & _SUPPOSED_FROM or met and not flags & QUALITY:
            break
    return met


def is_assessed(events: list[Event], i: int) -> bool:
    """Whether what event i says to be unassessed is no finding or one that is there: "the left base
    cannot be evaluated", "the extent of the effusion cannot be assessed", a device."""
    j = i - 1
    if j < 0 or not events[j][2].flags & _FINDING:
        return True
    while j > 0 and (not events[j][2].flags & CUE or events[j][2].flags & QUALITY):
        if events[j - 1][1] != events[j][0]:
            return False
        j -= 1
    return events[j][2].flags & _ARTICLE != 0


def stands_alone(events: list[Event], i: int, stop: int, words: list[str]) -> bool:
    """Whether event i is the answer to the term or question before it: "edema: no", "edema, no"."""
    if i == 0:
        return False
    start, end, _ = events[i]
    at = i - 1
    if at and right_before(events, i) & _COMMA:
        start, at = events[at][0], at - 1
    _, last, entry = events[at]
    if start - last > 1 or not entry.flags & (TERM | _QUESTION | _SEEN):
        return False  # at most one sign between
    if i + 1 == len(events):
        return end == stop
    following = right_behind(events, i)
    # "edema: no effusion: yes"
    is_next = _is_colon(words, start - 1) and _is_colon(words, events[i + 1][1])
    return following & (TERM | _COMMA | _AND if is_next else _COMMA | _AND) != 0


def is_answer(events: list[Event], i: int, words: list[str]) -> bool:
    """Whether a colon alone parts event i from the one before it: "edema: possible"."""
    start = events[i][0]
    return i > 0 and _is_colon(words, start - 1) and events[i - 1][1] == start - 1


def is_hedged_alone(events: list[Event], i: int, found: list[Found]) -> bool:
    """Whether the hedge of event i, the last of its sentence, is of the finding right before it:
    "small effusion possible"."""
    return right_before(events, i) & _FINDING != 0 and found[-1][4] == PRESENT


def leads_on(words: list[str], at: int) -> bool:
    """Whether the sign at a piece is written to what follows: "opacity, ?pneumonia"."""
    if not at or at + 1 >= len(words) or words[at - 1][-1].isalnum():
        return False
    return words[at] == "?" or words[at - 1][0] in ",("


def doubts_what_follows(events: list[Event], i: int) -> bool:
    """Whether the improbable of event i stands behind it ("less likely edema"), not before."""
    if right_behind(events, i) & (TERM | QUALITY):
        return True
    if events[i][2].flags & _DOUBT_ONE:
        return False
    return i == 0 or events[i - 1][2].flags & (JOINT | _WITH | _CLAUSE) != 0


def _is_list_before_colon(events: list[Event], i: int, words: list[str]) -> bool:
    """Whether all before event i is bare terms with commas, and a colon: "edema, mass: none"."""
    if not is_answer(events, i, words):
        return False
    begin = events[0][0]
    if begin and words[begin - 1][0] not in SENTENCE_ENDS:
        return False
    if any(events[j][1] != events[j + 1][0] for j in range(i - 1)):
        return False
    all_flags = [entry.flags for _, _, entry in events[:i]]
    return all(f & JOINT or f & TERM and not f & (_NOT_BARE | FIXED) for f in all_flags)


def _is_colon(words: list[str], at: int) -> bool:
    return at < len(words) and words[at][0] == ":"


def _is_of_tip(events: list[Event], device: int, i: int) -> bool:
    """Whether event i says of the tip of a device, not of the device, that it is not seen."""
    if events[i - 1][2].flags & _TIP:
        return True
    if device != i - 1:
        return False
    at = device - 1
    while at >= 0 and events[at][2].flags & _OF_NAME:
        at -= 1
    return at >= 0 and events[at][2].flags & _TIP != 0


def _is_denied(events: list[Event], found: list[Found]) -> bool:
    """Whether the last of these mentions is denied, anatomy apart."""
    for _, _, _, at, state in reversed(found):
        if not events[at][2].flags & FIXED:
            return state == ABSENT
    return False
