"""Assertion of the mentions of one sentence: present, absent or uncertain.

A sentence is a list of events (start, end, entry), each a term or a cue, in order. What does not
live here: finding the events (linker.py) and the cue words (lexicon/_cues.yaml).
"""

from __future__ import annotations

from mlip.knowledge.alternatives import leave_open
from mlip.knowledge.asides import is_assessed, is_of_structure, judge_asides, suppose
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
from mlip.knowledge.normal_lists import is_range, normal_statements
from mlip.knowledge.reach import list_goes_on, starts_anew

_NEG, _NOT = FLAG["negation_before"], FLAG["not"]
_AFTER, _AFTER_ONE = FLAG["negation_after"], FLAG["negation_after_one"]
_UNC, _UNC_LIST = FLAG["uncertain_before"], FLAG["uncertain_list"]
_UNC_AFTER, _ALT = FLAG["uncertain_after"], FLAG["alternative"]
_DOUBT, _DOUBT_ONE = FLAG["doubt"], FLAG["doubt_one"]
_LIKEWISE, _REJECTED = FLAG["likewise"], FLAG["rejected"]
_PAST, _CHANGE_OF = FLAG["past"], FLAG["change_of"]
_TRIED, _UNASSESSED = FLAG["failed"] | FLAG["tried"], FLAG["unassessed"]
_SUPPOSING, _MORE, _TIP = FLAG["supposing"], FLAG["more"], FLAG["tip"]
_ANSWER, _REMOVAL, _FAULT = FLAG["answer"], FLAG["removal"], FLAG["fault"]
_MINUS, _LEADING = FLAG["minus"], FLAG["leading"]
_SIGN = _MINUS | FLAG["plus"]
_CLAUSE, _BE, _SEEN, _POS = FLAG["clause"], FLAG["be"], FLAG["seen"], FLAG["positive"]
_STRONG, _WEAK, _OBJECT = FLAG["strong"], FLAG["weak"], FLAG["object"]
_COMMA, _AND, _OR, _WITH = FLAG["comma"], FLAG["and"], FLAG["or"], FLAG["with"]
_QUESTION, _NORMAL = FLAG["question"], FLAG["normal"]
_DENIED_CLAUSE, _CHANGE = FLAG["denied_clause"], FLAG["change"]
_ARTICLE, _CHOICE = FLAG["article"], FLAG["choice"]
SENTENCE = FLAG["sentence"]
SECTION_REPORT, SECTION_OTHER = FLAG["section_report"], FLAG["section_other"]
# a sentence without any of these asserts all it mentions
DECIDING = _NEG | _NOT | _AFTER | _AFTER_ONE | _UNC | _UNC_LIST | _UNC_AFTER | _ALT | _QUESTION
DECIDING |= _DOUBT | _DOUBT_ONE | _ANSWER | _REMOVAL | _SIGN | _CHOICE | _REJECTED
DECIDING |= _TRIED | _SUPPOSING | _MORE | _UNASSESSED
_ASIDES = _REJECTED | _PAST | _CHANGE_OF | _TRIED
_ACTS = DECIDING & ~_CHOICE | _FAULT | _SEEN | _BE | _LIKEWISE | _PAST | _CHANGE_OF
_STOPS_BACK = _CLAUSE | _POS | _NEG | _NOT | _AFTER | _AFTER_ONE | _UNC_AFTER | _BE | _SEEN
_STOPS_BACK |= _DOUBT | _DOUBT_ONE | _SIGN | _NORMAL
# The longest sentence of 3,955 real reports has 21. Rules look ahead and back over a sentence, so a
# megabyte without a stop would cost the square of its length: it is judged in pieces.
_MAX_EVENTS = 200
_MAX_GAP = 12  # words and signs over which a term may be written apart


def resolve(events: list[Event], decide: bool, stop: int, words: list[str]) -> list[Found]:
    """Mentions of a sentence with their state; `decide` False = no deciding cue is in it.

    stop: the piece behind the sentence's last
    words: every piece of the text, a word or a sign with the blanks behind it
    """
    if len(events) > _MAX_EVENTS:
        pieces = [events[i : i + _MAX_EVENTS] for i in range(0, len(events), _MAX_EVENTS)]
        return [mention for piece in pieces for mention in resolve(piece, decide, stop, words)]
    choices: list[int] = []  # events that may join alternatives
    asides: list[tuple[int, State]] = []  # events of "rather than" and the like, state there
    found: list[Found] = []
    owner: list[int] = []  # event behind each entry of found
    state: State = PRESENT
    said: State
    single = False  # the negation reaches one term, not a list
    listing = False  # the hedge reaches over a list of commas
    leads = False  # a sign speaks of what follows, as the first one of the sentence did
    that = False  # the negation is of a clause: "no evidence that ..."
    normal: list[Found] = []  # statements on a list of anatomy; no cue changes them
    closed = False  # a verb came after a term since the cue: the next comma ends its reach
    since = 0  # entries of found when the cue came
    parts: dict[int, tuple[int, int]] = {}  # first and last piece of what fills a slot
    for i, (start, end, entry) in enumerate(events):
        if entry.subject_side < 0 and entry.subject is not None and is_range(events, i):
            # "the heart is normal to mildly enlarged" states no more of it than its name
            entry = entry.subject
            end = start + entry.length
            events[i] = start, end, entry
        flags = entry.flags
        if flags and decide:
            if flags & _CLAUSE:
                state, closed = PRESENT, False
                parts.clear()
            elif flags & _COMMA:
                if (
                    state != PRESENT
                    and not (i == 1 and events[0][2].flags & _SUPPOSING)
                    and not list_goes_on(events, i, state, closed, single, listing)
                ):
                    state, closed = PRESENT, False
            elif flags & (_AND | _WITH):
                if state != PRESENT and starts_anew(events, i, state, single):
                    state, closed = PRESENT, False
            elif flags & _CHOICE and found and state != ABSENT:
                choices.append(i)
            if flags & _POS:
                state, closed = PRESENT, False
            if not flags & _ACTS:
                if flags & _ARTICLE and state == ABSENT:
                    asides.append((i, state))
            elif flags & _ANSWER and _stands_alone(events, i, stop, words):
                _look_back(events, i, found, owner, words, ABSENT, False)
                closed = True
            elif flags & _SIGN:
                said = ABSENT if flags & _MINUS else PRESENT
                leads = leads or flags & _LEADING != 0
                if leads:
                    state, closed, single, since = said, False, True, len(found)
                elif i and events[i - 1][1] == start and events[i - 1][2].concept >= 0:
                    _look_back(events, i, found, owner, words, said, False)
                    state = PRESENT
            elif flags & _NEG:
                state, closed, single, since = ABSENT, False, False, len(found)
                that = flags & _DENIED_CLAUSE != 0
            elif flags & _NOT:
                state, closed, single, since = ABSENT, False, True, len(found)
            elif flags & _UNC and end == stop and i and _is_hedged_alone(events, i, found):
                found[-1] = (*found[-1][:3], UNCERTAIN)
            elif flags & _UNC and end == stop and i and _is_answer(events, i, words):
                _look_back(events, i, found, owner, words, UNCERTAIN, False)
            elif flags & (_UNC | _UNC_LIST):
                listing = flags & _UNC_LIST != 0
                if state != ABSENT or (i and events[i - 1][2].flags & (_COMMA | _AND | _PAST)):
                    state, closed, single = UNCERTAIN, False, False
            elif flags & _SUPPOSING:
                if state != ABSENT and not suppose(events, i, found, owner, stop):
                    state, closed, single, since = UNCERTAIN, False, False, len(found)
            elif flags & (_AFTER | _AFTER_ONE):
                if _stands_before(events, i):
                    state = ABSENT  # "absent edema and effusion"
                else:
                    # "no evidence that the effusion has resolved"
                    said = PRESENT if that and state == ABSENT else ABSENT
                    _look_back(events, i, found, owner, words, said, bool(flags & _AFTER_ONE))
                    closed = True
            elif flags & (_UNC_AFTER | _UNASSESSED):
                if not flags & _UNASSESSED or not is_assessed(events, i):
                    _look_back(events, i, found, owner, words, UNCERTAIN, False)
                closed = True
            elif flags & (_DOUBT | _DOUBT_ONE):
                if not _doubts_what_follows(events, i):
                    _look_back(events, i, found, owner, words, UNCERTAIN, bool(flags & _DOUBT_ONE))
                    closed = True
                elif state != ABSENT:
                    state, closed, single = UNCERTAIN, False, False
            elif flags & _REMOVAL:
                _give_device(events, i, found, ABSENT)
            elif flags & _FAULT:
                # "no pacemaker lead fracture" denies the fracture and shows the pacemaker
                _give_device(events, i, found, PRESENT)
            elif flags & _ASIDES:
                asides.append((i, state))
            elif flags & _MORE:
                if is_of_structure(events, i):
                    state, closed, single, since = ABSENT, False, False, len(found)
            elif flags & _LIKEWISE:
                if found and found[-1][3] == ABSENT:
                    state, closed, single, since = ABSENT, False, False, len(found)
            elif flags & _ALT:
                if found and not found[-1][3] == ABSENT and events[owner[-1]][2].concept >= 0:
                    if not events[owner[-1]][2].fixed:
                        found[-1] = (*found[-1][:3], UNCERTAIN)
                if state == PRESENT:
                    state, closed, single = UNCERTAIN, False, False
            elif flags & _QUESTION:
                if found and not _leads(words, start):
                    _look_back(events, i, found, owner, words, UNCERTAIN, False)
                else:
                    state, closed, single = UNCERTAIN, False, False
            elif flags & (_SEEN | _BE):
                if flags & _CHANGE and that and state == ABSENT:
                    _look_back(events, i, found, owner, words, PRESENT, False)
                if not flags & _SEEN or not _is_behind_joint(events, i):
                    # "or visible nodule" ends no statement, nor "neither lung shows"
                    closed = len(found) > since and not (
                        flags & _OBJECT and _is_denied_subject(events, i)
                    )
        if flags & _NORMAL:
            stated = normal_statements(events, i, stop, words)
            normal += stated
            if stated and entry.concept < 0:
                state, closed = PRESENT, False
                parts.clear()
        if entry.concept >= 0 and not (flags & _FAULT and _is_of_device(events, i)):
            if entry.resets:
                # "no acute disease, effusion or edema" denies the rest of its list too
                state = ABSENT if flags & _NEG and _begins_list(events, i) else PRESENT
                closed, single = False, True
            found.append((start, end, entry.concept, PRESENT if entry.fixed else state))
            owner.append(i)
        if entry.parts:
            here = (start, end)
            for slot, others, last_slot, row in entry.parts:
                parts[slot] = first = last = here
                for other_slot in others:
                    other = parts.get(other_slot)
                    if other is None or end - other[0] > _MAX_GAP:
                        break
                    first, last = min(first, other), max(last, other)
                else:
                    found.append((first[0], last[1], row, state))
                    owner.append(i)
                    del parts[last_slot]
    if asides:
        judge_asides(asides, events, found, owner, words)
    if choices:
        leave_open(choices, events, found, owner, words)
    return found + normal if normal else found


def _is_behind_joint(events: list[Event], i: int) -> bool:
    """Whether a comma, "and" or "or" stands right before event i."""
    if not i or events[i - 1][1] != events[i][0]:
        return False
    return events[i - 1][2].flags & (_COMMA | _AND | _OR) != 0


def _begins_list(events: list[Event], i: int) -> bool:
    """Whether a comma or "or" stands right behind event i."""
    if i + 1 == len(events) or events[i + 1][0] != events[i][1]:
        return False
    return events[i + 1][2].flags & (_COMMA | _OR) != 0


def _is_denied_subject(events: list[Event], i: int) -> bool:
    """Whether nothing but anatomy stands between a negation and the verb of event i."""
    for _, _, entry in reversed(events[:i]):
        if entry.flags & _NEG:
            return True
        if not (entry.fixed or entry.flags & _ARTICLE):
            return False
    return False


def _stands_before(events: list[Event], i: int) -> bool:
    """Whether the denial of event i begins a sentence, right before a finding or its quality."""
    if i or len(events) == 1 or events[0][1] != events[1][0] or events[0][2].flags & _NORMAL:
        return False
    entry = events[1][2]
    return entry.opens or entry.device or entry.flags & (_STRONG | _WEAK) != 0


def _stands_alone(events: list[Event], i: int, stop: int, words: list[str]) -> bool:
    """Whether event i is the answer to the term or question before it: "edema: no", "edema, no"."""
    if i == 0:
        return False
    start, end, _ = events[i]
    at = i - 1
    if at and events[at][2].flags & _COMMA and events[at][1] == start:
        start, at = events[at][0], at - 1
    _, last, before = events[at]
    if start - last > 1 or before.concept < 0 and not before.flags & (_QUESTION | _SEEN):
        return False  # at most one sign between
    if i + 1 == len(events):
        return end == stop
    following, last, after = events[i + 1]
    if following != end:
        return False
    # "edema: no effusion: yes"
    is_next = after.concept >= 0 and _is_colon(words, start - 1) and _is_colon(words, last)
    return is_next or after.flags & (_COMMA | _AND) != 0


def _is_answer(events: list[Event], i: int, words: list[str]) -> bool:
    """Whether the hedge of event i, the last of its sentence, answers: "edema: possible"."""
    return _is_colon(words, events[i][0] - 1) and events[i - 1][1] == events[i][0] - 1


def _is_hedged_alone(events: list[Event], i: int, found: list[Found]) -> bool:
    """Whether the hedge of event i, the last of its sentence, is of the finding right before it:
    "small effusion possible"."""
    _, last, before = events[i - 1]
    return last == events[i][0] and before.opens and bool(found) and found[-1][3] == PRESENT


def _leads(words: list[str], at: int) -> bool:
    """Whether the sign at a piece is written to what follows: "opacity, ?pneumonia"."""
    if not at or at + 1 >= len(words) or words[at - 1][-1].isalnum():
        return False
    return words[at] == "?" or words[at - 1][0] in ",("


def _is_list_before_colon(events: list[Event], i: int, words: list[str]) -> bool:
    """Whether all before event i is bare terms with commas, and a colon: "edema, mass: none"."""
    if not i or not _is_colon(words, events[i][0] - 1) or events[i - 1][1] != events[i][0] - 1:
        return False
    begin = events[0][0]
    if begin and words[begin - 1][0] not in SENTENCE_ENDS:
        return False
    joints = _COMMA | _AND | _OR
    if any(events[j][1] != events[j + 1][0] for j in range(i - 1)):
        return False
    return all(
        bool(entry.flags & joints)
        or entry.concept >= 0
        and not entry.fixed
        and not entry.flags & ~FLAG["structure"]
        for _, _, entry in events[:i]
    )


def _is_colon(words: list[str], at: int) -> bool:
    return at < len(words) and words[at][0] == ":"


def _doubts_what_follows(events: list[Event], i: int) -> bool:
    """Whether the improbable of event i stands behind it ("less likely edema"), not before."""
    if i + 1 < len(events):
        start, _, entry = events[i + 1]
        if start == events[i][1] and (entry.concept >= 0 or entry.flags & (_STRONG | _WEAK)):
            return True
    if events[i][2].flags & _DOUBT_ONE:
        return False
    return i == 0 or events[i - 1][2].flags & (_COMMA | _AND | _OR | _WITH | _CLAUSE) != 0


def _is_of_device(events: list[Event], i: int) -> bool:
    """Whether event i stands right behind a device: a fractured catheter is no fracture."""
    return i > 0 and events[i - 1][1] == events[i][0] and events[i - 1][2].device


def _is_of_tip(events: list[Event], device: int, i: int) -> bool:
    """Whether event i says of the tip of a device, not of the device, that it is not seen."""
    if events[i - 1][2].flags & _TIP:
        return True
    if device != i - 1:
        return False
    before = device - 1
    while before >= 0 and events[before][2].flags & (_ARTICLE | _STRONG | _WEAK):
        before -= 1
    return before >= 0 and events[before][2].flags & _TIP != 0


def _give_device(events: list[Event], i: int, found: list[Found], state: State) -> None:
    """Give the state to the device that the word of event i stands right behind."""
    if _is_of_device(events, i):
        found[-1] = (*found[-1][:3], state)


def _is_denied(events: list[Event], found: list[Found], owner: list[int]) -> bool:
    """Whether the last of these mentions is denied, anatomy apart."""
    for k in range(len(found) - 1, -1, -1):
        if not events[owner[k]][2].fixed:
            return found[k][3] == ABSENT
    return False


def _look_back(
    events: list[Event],
    i: int,
    found: list[Found],
    owner: list[int],
    words: list[str],
    state: State,
    one: bool,
) -> None:
    """Give the state to the mentions that a cue behind them speaks of."""
    k = len(found) - 1
    met_term = False
    met_conjunction = _is_list_before_colon(events, i, words)
    is_normal = events[i][2].flags & _NORMAL != 0
    for j in range(i - 1, -1, -1):
        flags = events[j][2].flags
        if met_term and _is_colon(words, events[j][1]):
            return  # a heading with an answer of its own
        if is_normal and not met_term and flags & (_COMMA | _WITH | one * _AND):
            if events[j][1] < events[i][0]:
                return  # "small effusion, heart and aorta are normal"
        if flags & _COMMA:
            if met_term and not met_conjunction:
                return
        elif flags & _STOPS_BACK and not (flags & _SEEN and _is_behind_joint(events, j)):
            if met_term or flags & (_CLAUSE | _AFTER | _AFTER_ONE | _UNC_AFTER):
                return
        elif flags & _OR:
            met_conjunction = True
        elif flags & _AND:
            if met_term and one:
                return
            if state == UNCERTAIN and _is_denied(events, found[: k + 1], owner):
                return  # "no effusion and pneumonia cannot be excluded" denies the effusion
            met_conjunction = True
        while k >= 0 and owner[k] == j:
            if not met_term and events[i][0] - found[k][1] > _MAX_GAP:
                return
            start, end, row, _ = found[k]
            # "the tube is unremarkable", "the tip of the tube is not seen"
            is_there = events[j][2].device and (is_normal or _is_of_tip(events, j, i))
            if not is_there and (not events[j][2].fixed or events[j][2].concept != row):
                found[k] = (start, end, row, state)
                met_term = True
            k -= 1
