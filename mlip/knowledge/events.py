"""What a sentence consists of for the rules of assertion: kinds of cue, entries, events.

What does not live here: the rules (scope.py, normal_lists.py) and the words (lexicon/).
"""

from __future__ import annotations

from typing import Final, Literal, NamedTuple

State = Literal["present", "absent", "uncertain"]
PRESENT: Final = "present"
ABSENT: Final = "absent"
UNCERTAIN: Final = "uncertain"
SENTENCE_ENDS = ".;!\n\x03"  # the last is what linker.py puts for the end of a paragraph
KINDS = (
    "negation_before",
    "not",
    "negation_after",
    "negation_after_one",
    "neutral",
    "uncertain_before",
    "uncertain_list",
    "uncertain_after",
    "unassessed",
    "doubt",
    "doubt_one",
    "rejected",
    "answer",
    "minus",
    "plus",
    "leading",
    "removal",
    "alternative",
    "likewise",
    "clause",
    "be",
    "object",
    "seen",
    "positive",
    "strong",
    "weak",
    "predicate",
    "said_behind",
    "fault",
    "past",
    "failed",
    "tried",
    "placing",
    "tip",
    "supposing",
    "size",
    "limit",
    "normal",
    "denied_clause",
    "change",
    "change_of",
    "more",
    "structure",
    "article",
    "indefinite",
    "comma",
    "and",
    "or",
    "choice",
    "unchanged",
    "with",
    "sentence",
    "question",
    "section_report",
    "section_other",
)
FLAG = {kind: 1 << bit for bit, kind in enumerate(KINDS)}


class Part(NamedTuple):
    """One slot of a term written apart; slots are numbered over all terms."""

    slot: int
    others: tuple[int, ...]  # the other slots of its term
    last: int  # the term's last slot, which one finding uses up
    concept: int  # row of the table


class Entry(NamedTuple):
    """What one surface form can mean; several at once where forms coincide."""

    length: int  # words and signs
    flags: int  # FLAG of every kind of cue it is
    concept: int  # row of the table, -1 = none
    fixed: bool  # anatomy and normal statements: present whatever stands around them
    resets: bool  # normal statements end the reach of a cue before them
    device: bool  # a fault of it denied leaves it there
    opens: bool  # a finding: of two that "or" joins neither is stated
    kin: tuple[int, ...]  # rows of what it is a kind of, or has one label of CheXpert with
    places: frozenset[str]  # where it lies, empty = not told
    parts: tuple[Part, ...]  # slots of terms written apart that it can fill
    normals: tuple[int, ...]  # rows of the statements that this anatomy is as it should be
    subject_side: int  # of such a statement: -1 = its anatomy comes first, 1 = last, 0 = no such
    subject: Entry | None  # this anatomy


Event = tuple[int, int, Entry]
Found = tuple[int, int, int, State]  # first piece, piece behind the last, concept row, state
