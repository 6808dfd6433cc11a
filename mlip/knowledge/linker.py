"""Report text -> mentions of concepts with their assertion; a pure function of text and lexicon.

A report becomes a string with a fixed number of characters per word, so that one Aho-Corasick pass
gives longest matches that can only begin and end at word boundaries. What does not live here: the
words (lexicon/) and the rules of assertion (scope.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple
from weakref import WeakValueDictionary

import ahocorasick

from mlip.knowledge.concept_files import load_concepts
from mlip.knowledge.concepts import ConceptTable
from mlip.knowledge.cues import cues_of
from mlip.knowledge.entries import entries_of
from mlip.knowledge.events import (
    SENTENCE_ENDS,
    Event,
    Found,
    State,
    one_by_one,
)
from mlip.knowledge.scope import DECIDING, resolve
from mlip.knowledge.word_codes import (
    BLANKS,
    PARAGRAPH_MARK,
    PIECE,
    WORD,
    WordCodes,
    plurals,
    words_of,
)

# a blank line, or a line that opens an item of a list
_PARAGRAPH = re.compile(r"\n(?=[ \t\r\f\v]*(?:\n|[-*\u2022]|\(?\d{1,2}[.)]\s+[a-z]))")
# "(-)" and "(+)", and the bare sign behind a colon where nothing follows
_SIGN = re.compile(r"(?:: ?)?\(([-+])\)|: ([-+])(?=[ \t]*(?:[,.;\n\x03]|\Z))")
_HEADING_REACH = 400  # characters: no sentence of a report is longer
_STOP = re.compile(f"[{SENTENCE_ENDS}]")
_SENTENCE, _SECTION_REPORT, _SECTION_OTHER = one_by_one("sentence section_report section_other")
_BREAKS = _SENTENCE | _SECTION_REPORT | _SECTION_OTHER
FEW_KNOWN_WORDS = 0.35  # share of known_words: English reports lie above 0.6, others below 0.2


class Mention(NamedTuple):
    """A concept in a text; [start, end) is the hull of its characters."""

    concept_id: str
    start: int
    end: int
    state: State


class Linker:
    """Links texts to the concepts of one table.

    Where two concepts share a surface form, the one earlier in the table has it.
    Raises:  LexiconError where the cue file or a term cannot be used
    Source:  Aho and Corasick 1975; scope rules ours, in the line of NegEx (Chapman et al. 2001)
    """

    def __init__(self, table: ConceptTable) -> None:
        self.table = table
        self._ids = [concept.id for concept in table]
        self._codes = WordCodes(words_of(table), frozenset(cues_of(table).get("size", ())))
        self._automaton = ahocorasick.Automaton(ahocorasick.STORE_ANY)
        for key, entry in entries_of(table, self._codes).items():
            self._automaton.add_word(key, entry)
        self._automaton.make_automaton()

    def link(self, text: str) -> list[Mention]:
        """Every mention in order of its start; the same list in every process.

        Text under a heading such as INDICATION or COMPARISON says nothing of this image and is
        left out; from IMPRESSION or FINDINGS on, or from a blank line on, it counts again.
        """
        lowered = _marked(text)
        pieces = PIECE.findall(lowered)
        width = self._codes.width
        coded = "".join(map(self._codes.__getitem__, pieces))
        ends = list(accumulate(map(len, pieces)))
        found: list[Found] = []
        events: list[Event] = []
        decide = header_end = 0  # a blank line right behind a heading does not end its section
        counts = True
        for last, entry in self._automaton.iter_long(coded):
            end = (last + 1) // width
            flags = entry[1]
            if flags & _BREAKS:
                if flags & _SENTENCE:
                    stop = ends[end - 1]
                    if lowered[stop - 1] == "." and lowered[stop : stop + 1].isdigit():
                        continue  # a decimal point
                if events:
                    if counts:
                        found += resolve(events, decide != 0, end - entry[0], pieces)
                    events = []
                    decide = 0
                if flags & _SECTION_REPORT:
                    counts = True
                elif flags & _SECTION_OTHER:
                    start = end - entry[0]
                    before = lowered[: ends[start - 1]].rstrip(" \t") if start else ""
                    # "no change on comparison: ..." is no heading
                    if not before or before[-1] in "\n.;:\x03":
                        counts, header_end = False, end
                elif pieces[end - 1][0] == PARAGRAPH_MARK and end - 1 > header_end:
                    counts = True
            else:
                decide |= flags & DECIDING
                events.append((end - entry[0], end, entry))
        if events and counts:
            found += resolve(events, decide != 0, len(pieces), pieces)
        found.sort()
        return self._mentions(found, lowered, pieces, ends)

    def _mentions(
        self, found: list[Found], text: str, pieces: list[str], ends: list[int]
    ) -> list[Mention]:
        """What was found in pieces of the text, as places in it."""
        ids = self._ids
        # a NamedTuple's own __new__ costs three times tuple's
        make = tuple.__new__
        mentions = []
        for k, (start, end, row, _, state) in enumerate(found):
            begin = ends[start - 1] if start else 0
            # the last piece carries the blanks behind it
            stop = ends[end - 1] - len(pieces[end - 1]) + len(pieces[end - 1].rstrip(BLANKS))
            if state == "present" and text[stop : stop + 1] == ":":
                state = self._below_heading(found, k, text, ends)
            mentions.append(make(Mention, (ids[row], begin, stop, state)))
        return mentions

    def _below_heading(self, found: list[Found], k: int, text: str, ends: list[int]) -> State:
        """The state of mention k, a heading such as "pneumothorax:": that of the first mention of
        the same concept, or of one right below it, in the sentence behind it."""
        concept = self._ids[found[k][2]]
        begin = ends[found[k][1] - 1]
        stop = _STOP.search(text, begin, begin + _HEADING_REACH)
        last = stop.start() if stop is not None else begin + _HEADING_REACH
        for i in range(k + 1, len(found)):
            start, _, row, _, state = found[i]
            if ends[start - 1] > last:
                break
            if self._ids[row] == concept or concept in self.table.concepts[row].parents:
                return state
        return "present"

    def known_words(self, text: str) -> tuple[int, int]:
        """(words of the text that the table or its cues use, words in all): low for a report in
        another language, which gets few links and no guesses."""
        words = WORD.findall(text.lower())
        unknown = self._codes.unknown
        return sum(self._codes[word] != unknown for word in words), len(words)

    def key(self, term: str) -> str:
        """A term as codes, equal for terms that match the same text; raises as WordCodes.key."""
        return self._codes.key(term)


def _marked(text: str) -> str:
    """The text in lower case, of the same length, with marks for paragraphs and signs."""
    lowered = text.lower()
    if len(lowered) != len(text):  # a few letters change length in lower case
        lowered = "".join([c.lower() if len(c.lower()) == 1 else c for c in text])
    if "\n" in lowered:
        lowered = _PARAGRAPH.sub(PARAGRAPH_MARK, lowered)
    if "(-)" in lowered or "(+)" in lowered or ": -" in lowered or ": +" in lowered:
        lowered = _SIGN.sub(_mark, lowered)
    return lowered


def _mark(sign: re.Match[str]) -> str:
    """The mark of a sign, as long as it."""
    before = sign.string[max(0, sign.start() - 4) : sign.start()].rstrip(" \t")
    is_leading = sign[0][0] == "(" and (not before or before[-1] in "\n\x03.,;!?")
    plus = (sign[1] or sign[2]) == "+"
    return ("\x06\x07" if is_leading else "\x04\x05")[plus].ljust(len(sign[0]))


def link(text: str) -> list[Mention]:
    """Mentions of the project's own concepts in a text."""
    return default_linker().link(text)


@lru_cache(maxsize=1)
def default_linker() -> Linker:
    """The linker of the project's own lexicon, built once a process."""
    return linker_of(load_concepts(None))


_HELD: WeakValueDictionary[str, Linker] = WeakValueDictionary()


def linker_of(table: ConceptTable) -> Linker:
    """The linker of a table: one for all tables of the same content, as long as someone holds it.

    A run and the evaluation after it read the table each, and each linker takes 0.3 s to build.
    """
    linker = _HELD.get(table.fingerprint)
    if linker is None:
        linker = _HELD[table.fingerprint] = Linker(table)
    return linker


@lru_cache(maxsize=1)
def lexicon_words() -> frozenset[str]:
    """Every word of the project's own lexicon: terms, cues, definitions, plurals; lower case."""
    table = load_concepts(None)
    words = words_of(table)
    for concept in table:
        words += WORD.findall(concept.definition.lower())
    return frozenset(form for word in words for form in (word, *plurals(word)))


def few_known_words(texts: Iterable[str]) -> int:
    """How many texts have less than FEW_KNOWN_WORDS of their words in the project's lexicon,
    whatever the table of a run holds: the cues that deny are English in each."""
    known = lexicon_words()
    words = (WORD.findall(text.lower()) for text in texts)
    return sum(sum(w in known for w in each) < FEW_KNOWN_WORDS * len(each) for each in words)
