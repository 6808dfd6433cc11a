"""Assertion of the mentions of one sentence: present, absent or uncertain.

A sentence is a list of events (start, end, entry), each a term or a cue, in order. Here is what a
cue says of what follows it, and which rules are asked of the rest (events.py lists them). What does
not live here: finding the events (linker.py) and the cue words (lexicon/_cues.yaml).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

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
    scope = _Scope(events, stop, words)
    found = scope.found
    for i, (start, _, entry) in enumerate(events):
        if entry.subject_side < 0 and entry.subject is not None and is_range(events, i):
            # "the heart is normal to mildly enlarged" states no more of it than its name
            entry = entry.subject
            events[i] = start, start + entry.length, entry
        flags = entry.flags
        if decide and flags & CUE:
            scope.hear(i, flags)
        if flags & _NORMAL:
            scope.state_normal(i)
        if flags & TERM and not (flags & _FAULT and right_before(events, i) & _DEVICE):
            if flags & _STATEMENT:
                # "no acute disease, effusion or edema" denies the rest of its list too
                goes_on = flags & _NEG and right_behind(events, i) & _LISTS
                scope.reach(ABSENT if goes_on else PRESENT, single=True)
            state = PRESENT if flags & FIXED else scope.state
            found.append((start, events[i][1], entry.concept, i, state))
        if entry.parts:
            scope.join_parts(i)
    if scope.asides:
        judge_asides(scope.asides, events, found, words)
    if scope.choices:
        leave_open(scope.choices, events, found, words)
    return found + scope.normal if scope.normal else found


class _Scope:
    """A sentence up to one of its events: what the cues so far say of the next term, and what was
    found. Each cue acts by one rule, the first of _RULES for one of its kinds."""

    state: State = PRESENT
    since = 0  # entries of found when the cue came
    closed = False  # a verb came after a term since the cue: the next comma ends its reach
    single = False  # the negation reaches one term, not a list
    listing = False  # the hedge reaches over a list of commas
    leads = False  # a sign speaks of what follows, as the first one of the sentence did
    that = False  # the negation is of a clause: "no evidence that ..."

    def __init__(self, events: list[Event], stop: int, words: list[str]) -> None:
        self.events, self.stop, self.words = events, stop, words
        self.found: list[Found] = []
        self.normal: list[Found] = []  # statements on a list of anatomy; no cue changes them
        self.choices: list[int] = []  # events that may join alternatives
        # events of "rather than" and the like, state there
        self.asides: list[tuple[int, State]] = []
        self.parts: dict[int, tuple[int, int]] = {}  # first and last piece of what fills a slot

    def hear(self, i: int, flags: int) -> None:
        """The cue of event i: whether it ends the reach of the one before, then what it says."""
        if flags & _CLAUSE:
            self._end()
            self.parts.clear()
        elif flags & _COMMA:
            if self.state != PRESENT and not self._goes_on(i):
                self._end()
        elif flags & _AND_WITH:
            if self.state != PRESENT and starts_anew(self.events, i, self.state, self.single):
                self._end()
        elif flags & _CHOICE and self.state != ABSENT:
            self.choices.append(i)
        if flags & _POS:
            self._end()
        if flags & _ANSWER and stands_alone(self.events, i, self.stop, self.words):
            self._look_back(i, ABSENT)
            self.closed = True
        elif rule := _rule_of(flags):
            rule(self, i, flags)

    def state_normal(self, i: int) -> None:
        """The statements that event i makes of a list of anatomy."""
        stated = normal_statements(self.events, i, self.stop, self.words)
        self.normal += stated
        if stated and self.events[i][2].concept < 0:
            self._end()
            self.parts.clear()

    def reach(self, state: State, single: bool = False) -> None:
        """From here on `state` holds."""
        self.state, self.closed, self.single = state, False, single

    def join_parts(self, i: int) -> None:
        """The terms written apart of which event i is the last part to come."""
        start, end, entry = self.events[i]
        here = (start, end)
        for slot, others, last_slot, row in entry.parts:
            self.parts[slot] = first = last = here
            for other_slot in others:
                other = self.parts.get(other_slot)
                if other is None or end - other[0] > MAX_GAP:
                    break
                first, last = min(first, other), max(last, other)
            else:
                self.found.append((first[0], last[1], row, i, self.state))
                del self.parts[last_slot]

    def _begin(self, state: State, single: bool = False) -> None:
        """From here on `state` holds, and a verb closes it only behind a term yet to come."""
        self.reach(state, single)
        self.since = len(self.found)

    def _end(self) -> None:
        self.state, self.closed = PRESENT, False

    def _goes_on(self, i: int) -> bool:
        """Whether what holds reaches over the comma of event i."""
        if i == 1 and self.events[0][2].flags & _SUPPOSING:
            return True
        return list_goes_on(self.events, i, self.state, self.closed, self.single, self.listing)

    def _look_back(self, i: int, state: State, kinds: int = 0) -> None:
        look_back(self.events, i, self.found, self.words, state, kinds)

    def _sign(self, i: int, flags: int) -> None:
        said: State = ABSENT if flags & _MINUS else PRESENT
        self.leads = self.leads or flags & _LEADING != 0
        if self.leads:
            self._begin(said, single=True)
        elif right_before(self.events, i) & TERM:
            self._look_back(i, said)
            self.state = PRESENT

    def _negation(self, i: int, flags: int) -> None:
        self._begin(ABSENT)
        self.that = flags & _DENIED_CLAUSE != 0

    def _not(self, i: int, flags: int) -> None:
        self._begin(ABSENT, single=True)

    def _hedge(self, i: int, flags: int) -> None:
        if flags & _UNC and self.events[i][1] == self.stop:
            if is_hedged_alone(self.events, i, self.found):
                self.found[-1] = (*self.found[-1][:4], UNCERTAIN)
                return
            if is_answer(self.events, i, self.words):
                self._look_back(i, UNCERTAIN)
                return
        self.listing = flags & _UNC_LIST != 0
        is_apart = i and self.events[i - 1][2].flags & (_COMMA | _AND | _PAST)
        if self.state != ABSENT or is_apart:
            self.reach(UNCERTAIN)

    def _supposing(self, i: int, flags: int) -> None:
        if self.state != ABSENT and not suppose(self.events, i, self.found, self.stop):
            self._begin(UNCERTAIN)

    def _denied_before(self, i: int, flags: int) -> None:
        if not i and not flags & _NORMAL and right_behind(self.events, 0) & _BEGUN:
            self.state = ABSENT  # "absent edema and effusion"
            return
        # "no evidence that the effusion has resolved"
        is_twice = self.that and self.state == ABSENT
        self._look_back(i, PRESENT if is_twice else ABSENT, flags & _AFTER_ONE)
        self.closed = True

    def _doubted_before(self, i: int, flags: int) -> None:
        if not flags & _UNASSESSED or not is_assessed(self.events, i):
            self._look_back(i, UNCERTAIN)
        self.closed = True

    def _doubt(self, i: int, flags: int) -> None:
        if not doubts_what_follows(self.events, i):
            self._look_back(i, UNCERTAIN, flags & _DOUBT_ONE)
            self.closed = True
        elif self.state != ABSENT:
            self.reach(UNCERTAIN)

    def _removal(self, i: int, flags: int) -> None:
        give_device(self.events, i, self.found, ABSENT)

    def _fault(self, i: int, flags: int) -> None:
        # "no pacemaker lead fracture" denies the fracture and shows the pacemaker
        give_device(self.events, i, self.found, PRESENT)

    def _aside(self, i: int, flags: int) -> None:
        self.asides.append((i, self.state))

    def _article(self, i: int, flags: int) -> None:
        if self.state == ABSENT:
            self.asides.append((i, self.state))

    def _more(self, i: int, flags: int) -> None:
        if is_of_structure(self.events, i):
            self._begin(ABSENT)

    def _likewise(self, i: int, flags: int) -> None:
        if self.found and self.found[-1][4] == ABSENT:
            self._begin(ABSENT)

    def _alternative(self, i: int, flags: int) -> None:
        if self.found and self.found[-1][4] != ABSENT:
            if self.events[self.found[-1][3]][2].flags & _OPEN:
                self.found[-1] = (*self.found[-1][:4], UNCERTAIN)
        if self.state == PRESENT:
            self.reach(UNCERTAIN)

    def _question(self, i: int, flags: int) -> None:
        if self.found and not leads_on(self.words, self.events[i][0]):
            self._look_back(i, UNCERTAIN)
        else:
            self.reach(UNCERTAIN)

    def _verb(self, i: int, flags: int) -> None:
        if flags & _CHANGE and self.that and self.state == ABSENT:
            self._look_back(i, PRESENT)
        if not flags & _SEEN or not right_before(self.events, i) & JOINT:
            # "or visible nodule" ends no statement, nor "neither lung shows"
            is_denied = flags & _OBJECT and _is_denied_subject(self.events, i)
            self.closed = len(self.found) > self.since and not is_denied


_Rule = Callable[[_Scope, int, int], None]
# of a cue of several kinds the first rule that is of one of them
_RULES: tuple[tuple[int, _Rule], ...] = (
    (_SIGN, _Scope._sign),
    (_NEG, _Scope._negation),
    (_NOT, _Scope._not),
    (_UNC_BEFORE, _Scope._hedge),
    (_SUPPOSING, _Scope._supposing),
    (_AFTER, _Scope._denied_before),
    (_UNC_AFTER, _Scope._doubted_before),
    (_DOUBT, _Scope._doubt),
    (_REMOVAL, _Scope._removal),
    (_FAULT, _Scope._fault),
    (_ASIDES, _Scope._aside),
    (_MORE, _Scope._more),
    (_LIKEWISE, _Scope._likewise),
    (_ALT, _Scope._alternative),
    (_QUESTION, _Scope._question),
    (_VERB, _Scope._verb),
    (_ARTICLE, _Scope._article),
)


@cache
def _rule_of(flags: int) -> _Rule | None:
    return next((rule for kinds, rule in _RULES if flags & kinds), None)


def _is_denied_subject(events: list[Event], i: int) -> bool:
    """Whether nothing but anatomy stands between a negation and the verb of event i."""
    for _, _, entry in reversed(events[:i]):
        if entry.flags & _NEG:
            return True
        if not entry.flags & (FIXED | _ARTICLE):
            return False
    return False
