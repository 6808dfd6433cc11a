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

from mlip.knowledge.alternatives import kin_of, places_of
from mlip.knowledge.concept_files import load_concepts
from mlip.knowledge.concepts import ConceptTable, LexiconError
from mlip.knowledge.cues import cues_of
from mlip.knowledge.events import (
    FLAG,
    SENTENCE_ENDS,
    Entry,
    Event,
    Found,
    Part,
    State,
    any_of,
    one_by_one,
)
from mlip.knowledge.scope import DECIDING, resolve
from mlip.knowledge.word_codes import (
    BLANKS,
    MARKS,
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
# semantic type -> kind of term; all others are findings
_TERM = {"anatomy": "anatomy", "normal": "statement", "device": "device"}
_TERM |= dict.fromkeys(("procedure", "external_object", "qualifier", "technique"), "mark")
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
        cue_forms = cues_of(table)
        self._codes = WordCodes(words_of(table), frozenset(cue_forms.get("size", ())))
        flags: dict[str, int] = {self._codes[PARAGRAPH_MARK]: FLAG["sentence"]}
        for mark, kinds in MARKS.items():
            flags[self._codes[mark]] = any_of(kinds)
        for kind, forms in cue_forms.items():
            for form in forms:
                try:
                    key = self.key(form)
                except LexiconError as error:
                    raise LexiconError(f"cues, {kind}: {error}") from None
                flags[key] = flags.get(key, 0) | FLAG[kind]
        owners: dict[str, int] = {}
        for row, concept in enumerate(table):
            for form in concept.surface_forms:
                owners.setdefault(self.key(form), row)
        parts: dict[str, list[Part]] = {}
        used = 0  # slots of terms written apart
        for row, concept in enumerate(table):
            for form in concept.excludes:
                flags.setdefault(self.key(form.lower()), 0)
            for term in concept.apart:
                slots = range(used, used + len(term))
                used += len(term)
                for slot, forms in zip(slots, term, strict=True):
                    part = Part(slot, tuple(s for s in slots if s != slot), slots[-1], row)
                    for form in forms:
                        parts.setdefault(self.key(form.lower()), []).append(part)
        width = self._codes.width
        for key, row in owners.items():
            # "healed fracture" is also the part "fracture" where one concept owns both
            for cut in range(width, len(key), width):
                tail = key[cut:]
                if tail in parts and owners.get(tail) == row and key not in parts:
                    parts[key] = parts[tail]
        types = [concept.semantic_type for concept in table]
        begins = any_of("strong weak current")
        denies = FLAG["negation_before"]
        for key, row in owners.items():
            # "no acute disease" begins a list as "no" does: "no acute disease or effusion"
            if types[row] == "normal":
                cuts = range(width, len(key), width)
                if any(flags.get(key[:cut], 0) & denies for cut in cuts):
                    flags[key] = flags.get(key, 0) | denies
            # "mild atelectasis" as one name begins a statement as "mild" before any other does
            cues = (flags.get(key[:cut], 0) & begins for cut in range(len(key) - width, 0, -width))
            if (begin := next(filter(None, cues), 0)) and not flags.get(key):
                flags[key] = begin
            # "heart enlarged" is a statement, "enlarged heart" a name
            if len(key) > width and flags.get(key[-width:], 0) & FLAG["predicate"]:
                heads = [owners.get(key[:cut], -1) for cut in range(width, len(key), width)]
                if any(head >= 0 and types[head] == "anatomy" for head in heads):
                    flags[key] = flags.get(key, 0) | FLAG["be"]
        normals: dict[str, list[int]] = {}  # anatomy -> statements that it is as it should be
        for row, concept in enumerate(table):
            if types[row] == "normal":
                for relation, place in concept.relations:
                    if relation == "located_in":
                        normals.setdefault(place, []).append(row)
        kin, places = kin_of(table), places_of(table)
        self._automaton = ahocorasick.Automaton(ahocorasick.STORE_ANY)
        entries: dict[str, Entry] = {}
        # the shorter ones first: a statement needs the entry of its anatomy
        for key in sorted(dict.fromkeys((*flags, *owners, *parts)), key=len):
            row = owners.get(key, -1)
            kind = types[row] if row >= 0 else ""
            reads_lists = kind == "normal" and "normal" in cue_forms
            side, subject = self._subject(key, owners, types) if reads_lists else (0, "")
            entries[key] = entry = Entry(
                length=len(key) // width,
                flags=flags.get(key, 0)
                | (FLAG["normal"] if side else 0)
                | (FLAG[_TERM.get(kind, "finding")] if row >= 0 else 0),
                concept=row,
                kin=kin.get(row, ()),
                places=places.get(row, frozenset()),
                parts=tuple(parts.get(key, ())),
                normals=tuple(normals.get(self._ids[row], ())) if row >= 0 else (),
                subject_side=side,
                subject=entries.get(subject),
            )
            self._automaton.add_word(key, entry)
        self._automaton.make_automaton()

    def _subject(self, key: str, owners: dict[str, int], types: list[str]) -> tuple[int, str]:
        """-1 where a normal statement begins with its anatomy ("heart size is normal"), 1 where it
        ends with it ("normal heart size"), else 0; and the longest such anatomy."""
        width = self._codes.width
        for side in (-1, 1):
            for cut in range(width, len(key), width):
                part = key[:-cut] if side < 0 else key[cut:]
                row = owners.get(part, -1)
                if row >= 0 and types[row] == "anatomy":
                    return side, part
        return 0, ""

    def link(self, text: str) -> list[Mention]:
        """Every mention in order of its start; the same list in every process.

        Text under a heading such as INDICATION or COMPARISON says nothing of this image and is
        left out; from IMPRESSION or FINDINGS on, or from a blank line on, it counts again.
        """
        lowered = text.lower()
        if len(lowered) != len(text):  # a few letters change length in lower case
            lowered = "".join([c.lower() if len(c.lower()) == 1 else c for c in text])
        if "\n" in lowered:
            lowered = _PARAGRAPH.sub(PARAGRAPH_MARK, lowered)
        if "(-)" in lowered or "(+)" in lowered or ": -" in lowered or ": +" in lowered:
            lowered = _SIGN.sub(_mark, lowered)
        pieces = PIECE.findall(lowered)
        codes, width = self._codes, self._codes.width
        coded = "".join(map(codes.__getitem__, pieces))
        ends = list(accumulate(map(len, pieces)))
        ids = self._ids
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
        # a NamedTuple's own __new__ costs three times tuple's
        make = tuple.__new__
        mentions = []
        for k, (start, end, row, _, state) in enumerate(found):
            begin = ends[start - 1] if start else 0
            # the last piece carries the blanks behind it
            stop = ends[end - 1] - len(pieces[end - 1]) + len(pieces[end - 1].rstrip(BLANKS))
            if state == "present" and lowered[stop : stop + 1] == ":":
                state = self._below_heading(found, k, lowered, ends)
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
        """A term as codes: equal for terms that match the same text (plurals, hyphens).

        Raises:  LexiconError on a character that no report can match
        """
        out = []
        for piece in PIECE.findall(term.strip()):
            code = self._codes[piece]
            if code == self._codes.unknown:
                raise LexiconError(
                    f"term {term!r}: {piece.strip()!r} in it cannot be matched, only letters, "
                    "digits and ASCII signs can; write it without or leave the term out"
                )
            out.append(code)
        return "".join(out)


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
