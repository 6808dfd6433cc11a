"""What a sentence consists of for the rules of assertion: kinds of cue and term, entries, events.

What does not live here: the rules and the words (lexicon/). Of the rules, scope.py has what a cue
says of what follows it, reach.py how far that goes, look_back.py what a cue says of what stands
before it, asides.py what is said of one name alone, alternatives.py what "or" joins, and
normal_lists.py anatomy that is as it should be.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, Literal, NamedTuple

State = Literal["present", "absent", "uncertain"]
PRESENT: Final = "present"
ABSENT: Final = "absent"
UNCERTAIN: Final = "uncertain"
SENTENCE_ENDS = ".;!\n\x03"  # the last is what linker.py puts for the end of a paragraph
# of cues; lexicon/_cues.yaml says what each is
KINDS = tuple(
    "negation_before not negation_after negation_after_one neutral uncertain_before history "
    "current uncertain_list uncertain_after unassessed doubt doubt_one rejected answer minus "
    "plus leading removal alternative likewise clause be object seen positive strong weak "
    "predicate said_behind fault past failed tried placing tip supposing size limit normal "
    "denied_clause change change_of more structure article indefinite comma and or choice "
    "unchanged with sentence question section_report section_other".split()
)
# a term is of one of these kinds: anatomy and normal statements are present whatever stands around
# them, a "mark" is a qualifier, procedure or the like
TERMS = ("finding", "device", "anatomy", "statement", "mark")
FLAG = {kind: 1 << bit for bit, kind in enumerate((*TERMS, *KINDS))}


def one_by_one(kinds: str) -> Iterator[int]:
    """The flag of each of these kinds, named with blanks between them."""
    return (FLAG[kind] for kind in kinds.split())


def any_of(kinds: str) -> int:
    """The flags of all these kinds together, named with blanks between them."""
    return sum(one_by_one(kinds))


CUE = any_of(" ".join(KINDS))
TERM = any_of(" ".join(TERMS))
FIXED = any_of("anatomy statement")
NAME = any_of("finding device")
QUALITY = any_of("strong weak")
JOINT = any_of("comma and or")


class Part(NamedTuple):
    """One slot of a term written apart; slots are numbered over all terms."""

    slot: int
    others: tuple[int, ...]  # the other slots of its term
    last: int  # the term's last slot, which one finding uses up
    concept: int  # row of the table


class Entry(NamedTuple):
    """What one surface form can mean; several at once where forms coincide."""

    length: int  # words and signs
    flags: int  # FLAG of every kind of cue it is, and of the kind of term
    concept: int  # row of the table, -1 = none
    kin: tuple[int, ...]  # rows of what it is a kind of, or has one label of CheXpert with
    places: frozenset[str]  # where it lies, empty = not told
    parts: tuple[Part, ...]  # slots of terms written apart that it can fill
    normals: tuple[int, ...]  # rows of the statements that this anatomy is as it should be
    subject_side: int  # of such a statement: -1 = its anatomy comes first, 1 = last, 0 = no such
    subject: Entry | None  # this anatomy


Event = tuple[int, int, Entry]
# first piece, piece behind the last, concept row, event that it was found at, state
Found = tuple[int, int, int, int, State]


def before(events: list[Event], i: int, kinds: int) -> int:
    """The flags of the nearest event before event i that is of one of these kinds, 0 = none."""
    for _, _, entry in reversed(events[:i]):
        if entry.flags & kinds:
            return entry.flags
    return 0


def behind(events: list[Event], i: int, kinds: int) -> int:
    """The flags of the nearest event behind event i that is of one of these kinds, 0 = none."""
    for _, _, entry in events[i + 1 :]:
        if entry.flags & kinds:
            return entry.flags
    return 0


def right_before(events: list[Event], i: int) -> int:
    """The flags of the event before event i where no word stands between the two, else 0."""
    return events[i - 1][2].flags if i > 0 and events[i - 1][1] == events[i][0] else 0


def right_behind(events: list[Event], i: int) -> int:
    """The flags of the event behind event i where no word stands between the two, else 0."""
    i += 1
    return events[i][2].flags if i < len(events) and events[i][0] == events[i - 1][1] else 0
