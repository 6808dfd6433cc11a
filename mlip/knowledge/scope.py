"""Assertion of the mentions of one sentence: present, absent or uncertain.

A sentence is a list of events (start, end, entry), each a term or a cue, in order. Here is what a
cue says of what follows it, and which rules are asked of the rest (events.py lists them). What does
not live here: finding the events (linker.py) and the cue words (lexicon/_cues.yaml).
"""

from __future__ import annotations

from mlip.knowledge.alternatives import leave_open
from mlip.knowledge.asides import is_of_structure, judge_asides
from mlip.knowledge.events import (
    ABSENT,
    CUE,
    FIXED,
    JOINT,
    NAME,
    PRESENT,
    QUALITY,
    TERM,
    UNCERTAIN,
    Event,
    Found,
    State,
    any_of,
    one_by_one,
    right_before,
    right_behind,
)
from mlip.knowledge.look_back import (
    MAX_GAP,
    doubts_what_follows,
    give_device,
    is_answer,
    is_assessed,
    is_hedged_alone,
    leads_on,
    look_back,
    stands_alone,
    suppose,
)
from mlip.knowledge.normal_lists import is_range, normal_statements
from mlip.knowledge.reach import list_goes_on, starts_anew

_FINDING, _DEVICE, _STATEMENT = one_by_one("finding device statement")
_NEG, _NOT, _AFTER_ONE, _UNC, _UNC_LIST = one_by_one(
    "negation_before not negation_after_one uncertain_before uncertain_list"
)
_ALT, _DOUBT_ONE, _LIKEWISE, _UNASSESSED = one_by_one("alternative doubt_one likewise unassessed")
_PAST, _SUPPOSING, _MORE, _ANSWER, _REMOVAL = one_by_one("past supposing more answer removal")
_FAULT, _MINUS, _LEADING, _CLAUSE, _SEEN = one_by_one("fault minus leading clause seen")
_POS, _OBJECT, _COMMA, _AND, _OR = one_by_one("positive object comma and or")
_QUESTION, _NORMAL, _DENIED_CLAUSE, _CHANGE = one_by_one("question normal denied_clause change")
_ARTICLE, _CHOICE = one_by_one("article choice")
_AFTER = any_of("negation_after negation_after_one")
_UNC_AFTER = any_of("uncertain_after unassessed")
_UNC_BEFORE, _DOUBT = any_of("uncertain_before uncertain_list"), any_of("doubt doubt_one")
_SIGN = any_of("minus plus")
_BEGUN = NAME | QUALITY
_OPEN, _LISTS = TERM & ~FIXED, any_of("comma or")
_AND_WITH, _VERB = any_of("and with"), any_of("seen be")
_ASIDES = any_of("rejected past change_of failed tried")
# a sentence without any of these asserts all it mentions
DECIDING = _NEG | _NOT | _AFTER | _UNC_BEFORE | _UNC_AFTER | _ALT | _QUESTION | _DOUBT | _SIGN
DECIDING |= any_of("answer removal choice rejected failed tried supposing more")
_ACTS = DECIDING & ~_CHOICE | _VERB | _ASIDES | any_of("fault likewise")
# The longest sentence of 3,955 real reports has 21. Rules look ahead and back over a sentence, so a
# megabyte without a stop would cost the square of its length: it is judged in pieces.
_MAX_EVENTS = 200


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
        if decide and flags & CUE:
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
            elif flags & _AND_WITH:
                if state != PRESENT and starts_anew(events, i, state, single):
                    state, closed = PRESENT, False
            elif flags & _CHOICE and state != ABSENT:
                choices.append(i)
            if flags & _POS:
                state, closed = PRESENT, False
            if not flags & _ACTS:
                if flags & _ARTICLE and state == ABSENT:
                    asides.append((i, state))
            elif flags & _ANSWER and stands_alone(events, i, stop, words):
                look_back(events, i, found, words, ABSENT)
                closed = True
            elif flags & _SIGN:
                said = ABSENT if flags & _MINUS else PRESENT
                leads = leads or flags & _LEADING != 0
                if leads:
                    state, closed, single, since = said, False, True, len(found)
                elif right_before(events, i) & TERM:
                    look_back(events, i, found, words, said)
                    state = PRESENT
            elif flags & _NEG:
                state, closed, single, since = ABSENT, False, False, len(found)
                that = flags & _DENIED_CLAUSE != 0
            elif flags & _NOT:
                state, closed, single, since = ABSENT, False, True, len(found)
            elif flags & _UNC and end == stop and is_hedged_alone(events, i, found):
                found[-1] = (*found[-1][:4], UNCERTAIN)
            elif flags & _UNC and end == stop and is_answer(events, i, words):
                look_back(events, i, found, words, UNCERTAIN)
            elif flags & _UNC_BEFORE:
                listing = flags & _UNC_LIST != 0
                if state != ABSENT or (i and events[i - 1][2].flags & (_COMMA | _AND | _PAST)):
                    state, closed, single = UNCERTAIN, False, False
            elif flags & _SUPPOSING:
                if state != ABSENT and not suppose(events, i, found, stop):
                    state, closed, single, since = UNCERTAIN, False, False, len(found)
            elif flags & _AFTER:
                if not i and not flags & _NORMAL and right_behind(events, 0) & _BEGUN:
                    state = ABSENT  # "absent edema and effusion"
                else:
                    # "no evidence that the effusion has resolved"
                    said = PRESENT if that and state == ABSENT else ABSENT
                    look_back(events, i, found, words, said, flags & _AFTER_ONE)
                    closed = True
            elif flags & _UNC_AFTER:
                if not flags & _UNASSESSED or not is_assessed(events, i):
                    look_back(events, i, found, words, UNCERTAIN)
                closed = True
            elif flags & _DOUBT:
                if not doubts_what_follows(events, i):
                    look_back(events, i, found, words, UNCERTAIN, flags & _DOUBT_ONE)
                    closed = True
                elif state != ABSENT:
                    state, closed, single = UNCERTAIN, False, False
            elif flags & _REMOVAL:
                give_device(events, i, found, ABSENT)
            elif flags & _FAULT:
                # "no pacemaker lead fracture" denies the fracture and shows the pacemaker
                give_device(events, i, found, PRESENT)
            elif flags & _ASIDES:
                asides.append((i, state))
            elif flags & _MORE:
                if is_of_structure(events, i):
                    state, closed, single, since = ABSENT, False, False, len(found)
            elif flags & _LIKEWISE:
                if found and found[-1][4] == ABSENT:
                    state, closed, single, since = ABSENT, False, False, len(found)
            elif flags & _ALT:
                if found and found[-1][4] != ABSENT:
                    if events[found[-1][3]][2].flags & _OPEN:
                        found[-1] = (*found[-1][:4], UNCERTAIN)
                if state == PRESENT:
                    state, closed, single = UNCERTAIN, False, False
            elif flags & _QUESTION:
                if found and not leads_on(words, start):
                    look_back(events, i, found, words, UNCERTAIN)
                else:
                    state, closed, single = UNCERTAIN, False, False
            elif flags & _VERB:
                if flags & _CHANGE and that and state == ABSENT:
                    look_back(events, i, found, words, PRESENT)
                if not flags & _SEEN or not right_before(events, i) & JOINT:
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
        if flags & TERM and not (flags & _FAULT and right_before(events, i) & _DEVICE):
            if flags & _STATEMENT:
                # "no acute disease, effusion or edema" denies the rest of its list too
                goes_on = flags & _NEG and right_behind(events, i) & _LISTS
                state, closed, single = ABSENT if goes_on else PRESENT, False, True
            found.append((start, end, entry.concept, i, PRESENT if flags & FIXED else state))
        if entry.parts:
            here = (start, end)
            for slot, others, last_slot, row in entry.parts:
                parts[slot] = first = last = here
                for other_slot in others:
                    other = parts.get(other_slot)
                    if other is None or end - other[0] > MAX_GAP:
                        break
                    first, last = min(first, other), max(last, other)
                else:
                    found.append((first[0], last[1], row, i, state))
                    del parts[last_slot]
    if asides:
        judge_asides(asides, events, found, words)
    if choices:
        leave_open(choices, events, found, words)
    return found + normal if normal else found


def _is_denied_subject(events: list[Event], i: int) -> bool:
    """Whether nothing but anatomy stands between a negation and the verb of event i."""
    for _, _, entry in reversed(events[:i]):
        if entry.flags & _NEG:
            return True
        if not entry.flags & (FIXED | _ARTICLE):
            return False
    return False
