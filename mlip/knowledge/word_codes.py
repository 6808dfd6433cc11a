"""The words of terms and cues as codes of a fixed number of characters.

What does not live here: finding the terms by their codes (linker.py).
"""

from __future__ import annotations

import re

from mlip.knowledge.concepts import ConceptTable, LexiconError
from mlip.knowledge.cues import cues_of

# a word or one other character, each with the blanks and hyphens behind it
PIECE = re.compile(r"[^\W_]+[\s\-]*|.[\s\-]*", re.DOTALL)
WORD = re.compile(r"[^\W_]+")
_VOWEL = re.compile("[aeiouy]")
BLANKS = "".join(chr(c) for c in range(0x3001) if chr(c).isspace()) + "-"  # [\s\-] of PIECE
PARAGRAPH_MARK = "\x03"
MARKS = {  # what stands for a sign: of what is before it, or leading what follows
    "\x04": "minus",
    "\x05": "plus",
    "\x06": "minus leading",
    "\x07": "plus leading positive",
}
# positions of a word's code have alphabets of their own: no match can begin inside a word
_ALPHABET = 1024
_MEMO_LIMIT = 100_000  # words outside the lexicon whose code is remembered
# "CT rules out" denies, "please rule out" asks: with s these are no plurals
_VERBS = frozenset({"rule", "exclude"})


class WordCodes(dict[str, str]):
    """Piece -> code of `width` characters; plurals have the code of their singular, "8mm" of "mm".

    Two or three characters from small alphabets and not one from a large alphabet: the automaton
    searches the branches of a node one by one, and its root would have one for each word.
    """

    def __init__(self, words: list[str], units: frozenset[str]) -> None:
        super().__init__()
        self._units = units
        signs = [chr(c) for c in range(0x21, 0x7F) if not chr(c).isalnum()]
        signs += [PARAGRAPH_MARK, *MARKS, "\u2265"]  # the last is "at least"
        signs.remove("-")
        total = len(words) + len(signs) + 1
        self.width = 2 if total <= 64 * 64 else 3
        self._base = max(2, 1 + int(total ** (1 / self.width)))
        if self._base > _ALPHABET:
            raise LexiconError(f"{len(words)} different words are more than the linker can code")
        self._used = 0
        self.unknown = self._next()
        for sign in signs:
            self[sign] = self._next()
        for word in words:  # singulars come first
            if word not in self:
                code = self._next()
                for form in (word, *plurals(word)):
                    self.setdefault(form, code)

    def __missing__(self, piece: str) -> str:
        word = piece.rstrip(BLANKS)
        code = self.get(word, self.unknown)
        if code == self.unknown and (unit := word.lstrip("0123456789")) in self._units:
            code = self[unit]
        if len(self) < _MEMO_LIMIT or code != self.unknown and piece[-1:] == " ":
            self[piece] = code
        return code

    def key(self, term: str) -> str:
        """A term as codes: equal for terms that match the same text (plurals, hyphens).

        Raises:  LexiconError on a character that no report can match
        """
        codes = []
        for piece in PIECE.findall(term.strip()):
            code = self[piece]
            if code == self.unknown:
                raise LexiconError(
                    f"term {term!r}: {piece.strip()!r} in it cannot be matched, only letters, "
                    "digits and ASCII signs can; write it without or leave the term out"
                )
            codes.append(code)
        return "".join(codes)

    def _next(self) -> str:
        number, digits = self._used, []
        self._used += 1
        for position in range(self.width):
            number, digit = divmod(number, self._base)
            digits.append(chr(0x100 + _ALPHABET * position + digit))
        return "".join(digits)


def words_of(table: ConceptTable) -> list[str]:
    """Every word of cues and terms, shorter ones first."""
    words: set[str] = set()
    for forms in cues_of(table).values():
        for form in forms:
            words.update(WORD.findall(form))
    for concept in table:
        slots = [form.lower() for term in concept.apart for slot in term for form in slot]
        for form in (*concept.surface_forms, *slots, *map(str.lower, concept.excludes)):
            words.update(WORD.findall(form))
    return sorted(words, key=lambda word: (len(word), word))


def plurals(word: str) -> tuple[str, ...]:
    if not word.isalpha() or word in _VERBS:
        return ()
    if len(word) < 3:  # of abbreviations alone: "fxs", not "ass"
        return () if _VOWEL.search(word) or len(word) < 2 else (word + "s",)
    if word.endswith("y") and word[-2] not in "aeiou":
        return (word[:-1] + "ies",)
    if word.endswith("is"):
        return (word[:-2] + "es",)
    if word.endswith(("s", "x", "ch", "sh")):
        return (word + "es",) if _VOWEL.search(word) else (word + "es", word + "s")  # "ptxs"
    return (word + "s",)
