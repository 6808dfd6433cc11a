"""Report text -> mentions of concepts with their assertion; a pure function of text and lexicon.

A report becomes a string with one character per word, so that one Aho-Corasick pass gives longest
matches that can only begin and end at word boundaries. What does not live here: the words.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import ahocorasick
import yaml

from mlip.knowledge.concepts import LEXICON_DIR, ConceptTable, LexiconError, expand, load_concepts

State = Literal["present", "absent", "uncertain"]
_PIECE = re.compile(r"[^\W_]+|[\s\-]+|.", re.DOTALL)
_FIRST_CODE = 0x100  # codes below stand for characters that mean themselves
_UNKNOWN, _SPACE, _NUMBER, _PARAGRAPH = "\x01", " ", "\x02", "\x03"
_MAX_GAP = 24  # codes (words and spaces) between the parts of a term written apart
_KINDS = (
    "concept",
    "negation_before",
    "negation_after",
    "pseudo",
    "uncertain_before",
    "uncertain_after",
    "clause",
    "verb",
    "positive",
    "comma",
    "conjunction",
    "sentence",
    "section_findings",
    "section_other",
)


@dataclass(frozen=True, slots=True)
class Mention:
    """A concept in a text; [start, end) is the hull of its characters."""

    concept_id: str
    start: int
    end: int
    state: State


class Linker:
    """Links texts to the concepts of one table.

    Raises:  LexiconError where the cue file or a term cannot be used
    Source:  Aho and Corasick 1975; scope rules ours, in the line of NegEx (Chapman et al. 2001)
    """

    def __init__(self, table: ConceptTable) -> None:
        self.table = table
        self._codes: dict[str, str] = {" ": _SPACE, "-": _SPACE, "\n": _SPACE}
        self._next_code = _FIRST_CODE
        self._automaton = ahocorasick.Automaton(ahocorasick.STORE_ANY)
        entries: dict[str, _Entry] = {}
        for kind, forms in read_cues().items():
            for form in forms:
                entries.setdefault(self._encode_term(form), _Entry()).kinds.add(kind)
        for row, concept in enumerate(table):
            for form in concept.surface_forms:
                entry = entries.setdefault(self._encode_term(form), _Entry())
                if entry.concept < 0:
                    entry.concept = row
            for form in concept.excludes:
                entries.setdefault(self._encode_term(form.lower()), _Entry())
        self._rules: list[tuple[int, int]] = []
        for row, concept in enumerate(table):
            for term in concept.apart:
                rule = len(self._rules)
                self._rules.append((row, len(term)))
                for slot, forms in enumerate(term):
                    for form in forms:
                        entry = entries.setdefault(self._encode_term(form.lower()), _Entry())
                        entry.parts.append((rule, slot))
        self._always_present = {
            row for row, c in enumerate(table) if c.semantic_type in ("anatomy", "normal")
        }
        for key, entry in entries.items():
            if key:
                entry.length = len(key)
                self._automaton.add_word(key, entry)
        self._automaton.make_automaton()

    def link(self, text: str) -> list[Mention]:
        """Every mention in order of its start; the same list in every process."""
        lowered = text.lower()
        if len(lowered) != len(text):  # a few letters change length in lower case
            lowered = "".join(c.lower() if len(c.lower()) == 1 else c for c in text)
        pieces = _PIECE.findall(lowered)
        codes = self._codes
        coded = "".join([codes.get(piece) or _other_code(piece) for piece in pieces])
        ends = list(itertools.accumulate(map(len, pieces)))
        mentions: list[Mention] = []
        sentence: list[tuple[int, int, _Entry]] = []
        asserted = True
        for last, entry in self._automaton.iter_long(coded):
            kinds = entry.kinds
            if "sentence" in kinds:
                if coded[last + 1 : last + 2] == _NUMBER:
                    continue
                self._resolve(sentence, mentions, ends, asserted)
                sentence = []
            elif "section_findings" in kinds or "section_other" in kinds:
                self._resolve(sentence, mentions, ends, asserted)
                sentence = []
                asserted = "section_findings" in kinds
            else:
                sentence.append((last + 1 - entry.length, last + 1, entry))
        self._resolve(sentence, mentions, ends, asserted)
        mentions.sort(key=lambda m: (m.start, m.end, m.concept_id))
        return mentions

    def _resolve(
        self,
        sentence: list[tuple[int, int, _Entry]],
        mentions: list[Mention],
        ends: list[int],
        asserted: bool,
    ) -> None:
        if not asserted:
            return
        found: list[tuple[int, int, int, str]] = []  # code start, code end, concept, state
        current = "present"
        verb = False
        after_comma = False
        clause_start = 0  # first entry of `found` in this clause
        open_parts: dict[tuple[int, int], tuple[int, int]] = {}
        for start, end, entry in sentence:
            kinds = entry.kinds
            if kinds:
                if "clause" in kinds:
                    current, verb, clause_start = "present", False, len(found)
                    open_parts.clear()
                if "positive" in kinds:
                    current, verb = "present", True
                    if after_comma:
                        clause_start = len(found)
                if "comma" in kinds:
                    after_comma = True
                    if verb:
                        current, verb, clause_start = "present", False, len(found)
                if "negation_after" in kinds or "uncertain_after" in kinds:
                    state = "absent" if "negation_after" in kinds else "uncertain"
                    for i in range(clause_start, len(found)):
                        s, e, row, old = found[i]
                        if row not in self._always_present:
                            found[i] = (s, e, row, state)
                    verb = True
                if "negation_before" in kinds:
                    current = "absent"
                elif "uncertain_before" in kinds:
                    current = "uncertain"
                if "verb" in kinds:
                    verb = True
            if entry.concept >= 0:
                always = entry.concept in self._always_present
                found.append((start, end, entry.concept, "present" if always else current))
            for rule, slot in entry.parts:
                row, slots = self._rules[rule]
                open_parts[rule, slot] = (start, end)
                others = [open_parts.get((rule, k)) for k in range(slots)]
                if all(o is not None and end - o[0] <= _MAX_GAP for o in others):
                    hull = [o for o in others if o is not None]
                    found.append((min(o[0] for o in hull), max(o[1] for o in hull), row, current))
                    del open_parts[rule, slot]
        for start, end, row, state in found:
            first = ends[start - 1] if start else 0
            mentions.append(Mention(self.table.concepts[row].id, first, ends[end - 1], state))

    def _encode_term(self, term: str) -> str:
        out = []
        for piece in _PIECE.findall(term.strip()):
            code = self._codes.get(piece)
            if code is None:
                if not piece[0].isalnum():
                    code = _SPACE if not piece.strip(" \t\r\n-") else piece
                    if ord(code) >= _FIRST_CODE:
                        raise LexiconError(f"term {term!r}: character {piece!r} cannot be matched")
                else:
                    if 0xD800 <= self._next_code <= 0xDFFF:
                        self._next_code = 0xE000
                    code = chr(self._next_code)
                    self._next_code += 1
                    for form in (piece, *_plurals(piece)):
                        self._codes.setdefault(form, code)
                self._codes[piece] = code
            out.append(code)
        return "".join(out)


class _Entry:
    __slots__ = ("concept", "kinds", "parts", "length")

    def __init__(self) -> None:
        self.concept = -1
        self.kinds: set[str] = set()
        self.parts: list[tuple[int, int]] = []
        self.length = 0


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
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    unknown = sorted(set(content) - set(_KINDS))
    if unknown:
        raise LexiconError(f"{path}: unknown kind of cue {unknown[0]!r}; known: {_KINDS[1:]}")
    return {kind: expand(lines) for kind, lines in content.items()}


def _other_code(piece: str) -> str:
    if piece[0].isalnum():
        return _NUMBER if piece[0].isdigit() else _UNKNOWN
    if piece.strip(" \t\r\n-"):
        return piece if len(piece) == 1 and ord(piece) < _FIRST_CODE else _UNKNOWN
    return _PARAGRAPH if piece.count("\n") > 1 else _SPACE


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
