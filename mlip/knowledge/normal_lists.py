"""Lists of anatomy that one predicate or adjective says to be as it should be.

"Heart size and mediastinal contours are within normal limits" states both, as does "normal heart
size and mediastinal contours". What does not live here: the state of findings (scope.py).
"""

from __future__ import annotations

from mlip.knowledge.events import (
    CUE,
    FIXED,
    JOINT,
    PRESENT,
    SENTENCE_ENDS,
    TERM,
    Event,
    Found,
    any_of,
    one_by_one,
    right_behind,
)

_COMMA, _AND, _ARTICLE, _WITH, _STATEMENT = one_by_one("comma and article with statement")
_CLOSED = any_of("clause be seen normal negation_after negation_after_one")
_GOES_ON = any_of("comma clause negation_before")  # what may stand behind a list
# "normal with small effusions" is no range
_NO_RANGE = CUE & ~any_of("or choice strong weak current predicate said_behind")
_UNKNOWN = 2  # words of an item that is no concept of ours: "great vessels"
_BEGINS_BEHIND = SENTENCE_ENDS + ":?"  # a statement


def normal_statements(events: list[Event], i: int, stop: int, words: list[str]) -> list[Found]:
    """The normal statements of event i, a predicate or a statement itself, on a list beside it.

    stop: the piece behind the sentence's last
    words: every piece of the text, a word or a sign with the blanks behind it
    """
    start, end, entry = events[i]
    side = entry.subject_side
    if side:  # mostly alone: nothing is listed beside it
        beside = i + side
        if not 0 <= beside < len(events) or not events[beside][2].flags & (JOINT | _ARTICLE):
            return []
    if side > 0:
        return [
            (start, last, row, i, PRESENT)
            for _, last, item in _listed_behind(events, i, stop, words)
            for row in item.normals
        ]
    if not side and right_behind(events, i) & TERM:
        # an adjective of what follows: "normal cardiomediastinal silhouette"
        listed = _listed_behind(events, i + 1, stop, words)
        alone = _is_closed(events, i + 1, stop, _GOES_ON | JOINT | _WITH)
        own = [events[i + 1]] if listed or alone else []
        return [
            (start, last, row, i, PRESENT) for _, last, item in own + listed for row in item.normals
        ]
    if is_range(events, i):
        return []
    return [
        (first, end, row, i, PRESENT)
        for first, _, item in _listed_before(events, i, words)
        for row in item.normals
    ]


def _listed_before(events: list[Event], i: int, words: list[str]) -> list[Event]:
    """The items of the list that ends at event i; the own subject of a statement is none of them.

    A list counts where it begins a statement; one that may be the tail of something else ("opacity
    in the lungs, heart and mediastinum normal") from its first comma or behind a finding ("no
    effusion and heart and mediastinum normal").
    """
    j, edge = i - 1, events[i][0]  # edge: first piece of what was read last
    needs_joint = events[i][2].subject_side != 0
    if not needs_joint and edge and words[edge - 1][0] == ":":
        edge -= 1  # "heart: normal"
    items: list[Event] = []
    own = 0  # items behind the comma or finding read last
    while True:
        if needs_joint:
            if j >= 0 and events[j][1] == edge and events[j][2].flags & _ARTICLE:
                j, edge = j - 1, events[j][0]
            last = j
            while j >= 0 and events[j][1] == edge and events[j][2].flags & JOINT:
                if events[j][2].flags & _COMMA:
                    own = len(items)
                j, edge = j - 1, events[j][0]
            if j == last:
                break
        needs_joint = True
        while j >= 0 and not events[j][2].flags:
            j -= 1  # "vessels", part of a term written apart, is an unknown word here
        gap = edge - (events[j][1] if j >= 0 else 0)
        flags = events[j][2].flags if j >= 0 else 0
        if not gap and flags & TERM and not flags & _STATEMENT:
            if not flags & FIXED:
                own = len(items)
            items.append(events[j])
            j, edge = j - 1, events[j][0]
        elif 0 < gap <= _UNKNOWN and all(word[0].isalnum() for word in words[edge - gap : edge]):
            if j >= 0 and not flags & (JOINT | _ARTICLE):
                break
            edge -= gap
        else:
            break
    begins = not edge or words[edge - 1][0] in _BEGINS_BEHIND
    begins = begins or j >= 0 and events[j][1] == edge and events[j][2].flags & _CLOSED != 0
    return items if begins else items[:own]


def _listed_behind(events: list[Event], i: int, stop: int, words: list[str]) -> list[Event]:
    """The items of the list that goes on behind event i up to its last "and"."""
    edge = events[i][1]
    items: list[Event] = []
    closed = 0  # items up to the last one behind "and"
    j = i + 1
    while j < len(events) and events[j][0] == edge and events[j][2].flags & JOINT:
        is_and = False
        while j < len(events) and events[j][0] == edge and events[j][2].flags & (JOINT | _ARTICLE):
            is_and = is_and or events[j][2].flags & _AND != 0
            j, edge = j + 1, events[j][1]
        if j == len(events):
            break
        start, end, entry = events[j]
        if start == edge and entry.flags & TERM and not entry.flags & _STATEMENT:
            items.append(events[j])
            j, edge = j + 1, end
            if is_and:
                closed = len(items)
        elif 0 < start - edge <= _UNKNOWN and entry.flags & JOINT:
            if not all(word[0].isalnum() for word in words[edge:start]):
                break
            edge = start
        else:
            break
    if closed and _is_closed(events, events.index(items[closed - 1]), stop, _GOES_ON):
        return items[:closed]
    return []  # "normal heart size and mediastinum is widened"


def is_range(events: list[Event], i: int) -> bool:
    """Whether a predicate goes on to another: "normal to mildly enlarged", "normal or large"."""
    end = events[i][1]
    for start, last, entry in events[i + 1 : i + 4]:
        if start - end > _UNKNOWN or entry.flags & _NO_RANGE:
            return False
        if entry.parts:
            return not entry.flags & FIXED
        end = last
    return False


def _is_closed(events: list[Event], i: int, stop: int, flags: int) -> bool:
    """Whether the sentence ends behind event i, or a cue of these kinds stands right behind it."""
    return events[i][1] == stop or right_behind(events, i) & flags != 0
