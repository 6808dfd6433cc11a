"""Report text -> mentions of concepts with their assertion; a pure function of text and lexicon.

A report becomes a string with one character per word, so that one Aho-Corasick pass gives longest
matches that can only begin and end at word boundaries. What does not live here: the words
(lexicon/) and the rules of assertion (scope.py).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

import ahocorasick
import yaml

from mlip.knowledge import scope
from mlip.knowledge.concepts import (
    LEXICON_DIR,
    ConceptTable,
    LexiconError,
    expand,
    load_concepts,
    read_text,
)
from mlip.knowledge.scope import FLAG, Entry, State

_PIECE = re.compile(r"[^\W_]+|[\s\-]+|.", re.DOTALL)
_WORD = re.compile(r"[^\W_]+")
_FIRST_CODE = 0x100  # codes below stand for characters that mean themselves
_UNKNOWN, _SPACE, _NUMBER, _PARAGRAPH = "\x01", " ", "\x02", "\x03"


@dataclass(frozen=True, slots=True)
class Mention:
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
        self._codes: dict[str, str] = {" ": _SPACE, "-": _SPACE, "\n": _SPACE}
        self._next_code = _FIRST_CODE
        self._learn_words(table)
        flags: dict[str, int] = {_PARAGRAPH: FLAG["sentence"]}
        for kind, forms in read_cues().items():
            for form in forms:
                key = self.key(form)
                flags[key] = flags.get(key, 0) | FLAG[kind]
        owners: dict[str, int] = {}
        for row, concept in enumerate(table):
            for form in concept.surface_forms:
                owners.setdefault(self.key(form), row)
        parts: dict[str, list[tuple[int, int]]] = {}
        self._rules: list[tuple[int, int]] = []
        for row, concept in enumerate(table):
            for form in concept.excludes:
                flags.setdefault(self.key(form.lower()), 0)
            for term in concept.apart:
                for slot, forms in enumerate(term):
                    for form in forms:
                        key = self.key(form.lower())
                        parts.setdefault(key, []).append((len(self._rules), slot))
                self._rules.append((row, len(term)))
        for key, row in owners.items():
            # "healed fracture" is also the part "fracture" where one concept owns both
            for cut in (i for i, code in enumerate(key) if code == _SPACE):
                tail = key[cut + 1 :]
                if tail in parts and owners.get(tail) == row and key not in parts:
                    parts[key] = parts[tail]
        types = [concept.semantic_type for concept in table]
        self._automaton = ahocorasick.Automaton(ahocorasick.STORE_ANY)
        for key in dict.fromkeys((*flags, *owners, *parts)):
            row = owners.get(key, -1)
            kind = types[row] if row >= 0 else ""
            entry = Entry(
                length=len(key),
                flags=flags.get(key, 0),
                concept=row,
                fixed=kind in ("anatomy", "normal"),
                resets=kind == "normal",
                parts=tuple(parts.get(key, ())),
            )
            if key:
                self._automaton.add_word(key, entry)
        self._automaton.make_automaton()

    def link(self, text: str) -> list[Mention]:
        """Every mention in order of its start; the same list in every process.

        Text under a heading such as INDICATION or COMPARISON says nothing of this image and is
        left out; from IMPRESSION or FINDINGS on it counts again.
        """
        lowered = text.lower()
        if len(lowered) != len(text):  # a few letters change length in lower case
            lowered = "".join(c.lower() if len(c.lower()) == 1 else c for c in text)
        pieces = _PIECE.findall(lowered)
        known = self._codes.get
        coded = "".join([known(piece) or _other_code(piece) for piece in pieces])
        ends = list(accumulate(map(len, pieces)))
        rules, ids = self._rules, self._ids
        found: list[scope.Found] = []
        events: list[scope.Event] = []
        decide = 0
        counts = True
        header_end = 0  # a blank line right behind a heading does not end its section
        breaks = scope.SENTENCE | scope.SECTION_REPORT | scope.SECTION_OTHER
        for last, entry in self._automaton.iter_long(coded):
            flags = entry[1]
            if flags & breaks:
                if flags & scope.SENTENCE and coded[last + 1 : last + 2] == _NUMBER:
                    continue  # a decimal point
                if events:
                    if counts:
                        found += scope.resolve(events, rules, decide != 0)
                    events = []
                    decide = 0
                if flags & scope.SECTION_REPORT:
                    counts = True
                elif flags & scope.SECTION_OTHER:
                    before = lowered[: ends[last - entry[0]]] if last >= entry[0] else ""
                    # "no change on comparison: ..." is no heading
                    if not before.rstrip(" \t") or before.rstrip(" \t")[-1] in "\n.;:":
                        counts, header_end = False, last + 1
                elif coded[last] == _PARAGRAPH and last > header_end:
                    counts = True
            else:
                decide |= flags & scope.DECIDING
                events.append((last + 1 - entry[0], last + 1, entry))
        if events and counts:
            found += scope.resolve(events, rules, decide != 0)
        found.sort()
        return [
            Mention(ids[row], ends[start - 1] if start else 0, ends[end - 1], state)
            for start, end, row, state in found
        ]

    def _learn_words(self, table: ConceptTable) -> None:
        """Give each word of cues and terms a code, one code to a word and its plural."""
        words: set[str] = set()
        for forms in read_cues().values():
            for form in forms:
                words.update(_WORD.findall(form))
        for concept in table:
            slots = [form.lower() for term in concept.apart for slot in term for form in slot]
            for form in (*concept.surface_forms, *slots, *map(str.lower, concept.excludes)):
                words.update(_WORD.findall(form))
        for word in sorted(words, key=lambda w: (len(w), w)):  # singulars come first
            if word not in self._codes:
                code = chr(self._next_code)
                self._next_code += 1
                if self._next_code == 0xD800:  # surrogates are not characters
                    self._next_code = 0xE000
                for form in (word, *_plurals(word)):
                    self._codes.setdefault(form, code)

    def key(self, term: str) -> str:
        """A term as codes; only words that _learn_words has seen.

        Raises:  LexiconError on a character that no report can match
        """
        out = []
        for piece in _PIECE.findall(term.strip()):
            code = self._codes.get(piece) or _other_code(piece)
            if code in (_UNKNOWN, _PARAGRAPH):
                raise LexiconError(f"term {term!r}: {piece!r} in it cannot be matched")
            out.append(code)
        return "".join(out)


def link(text: str) -> list[Mention]:
    """Mentions of the project's own concepts in a text."""
    return default_linker().link(text)


@lru_cache(maxsize=1)
def default_linker() -> Linker:
    """The linker of the project's own lexicon, built once a process."""
    return Linker(load_concepts(None))


@lru_cache(maxsize=1)
def read_cues(path: Path = LEXICON_DIR / "_cues.yaml") -> dict[str, tuple[str, ...]]:
    """Kind of cue -> its surface forms, alternatives written out.

    Raises:  LexiconError on an unknown kind
    """
    content = yaml.safe_load(read_text(path))
    unknown = sorted(set(content) - set(scope.KINDS))
    if unknown:
        raise LexiconError(f"{path}: unknown kind of cue {unknown[0]!r}; known: {scope.KINDS}")
    return {kind: expand(lines) for kind, lines in content.items()}


def _other_code(piece: str) -> str:
    if piece[0].isalnum():
        return _NUMBER if piece[0].isdigit() else _UNKNOWN
    if piece.strip(" \t\r\n\f\v-"):
        return piece if len(piece) == 1 and "!" <= piece < "\x7f" else _UNKNOWN
    newlines = piece.count("\n")
    return _PARAGRAPH if newlines > 1 or (newlines and "-" in piece) else _SPACE


def _plurals(word: str) -> tuple[str, ...]:
    if len(word) < 3 or not word.isalpha():
        return ()
    if word.endswith("y") and word[-2] not in "aeiou":
        return (word[:-1] + "ies",)
    if word.endswith("is"):
        return (word[:-2] + "es",)
    if word.endswith(("s", "x", "ch", "sh")):
        return (word + "es",)
    return (word + "s",)
