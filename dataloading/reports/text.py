"""Report text: cleaning, sections, sentences. Tokens and mentions are in encoder.py.

Nothing is thrown away that carries meaning: negation words, decimals, units and sides stay.
"""

from __future__ import annotations

import re

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mlip.dataloading.text_hash import contains_byte
from mlip.knowledge.plain_letters import plain
from mlip.knowledge.report_lines import joined_lines

# A report of a megabyte is a fault of the export; sections of a chest report are under 10,000.
MAX_CHARACTERS = 20_000

# ___ (MIMIC-CXR), [** ... **] (older MIMIC), XXXX (Open-i), <NAME> style placeholders
_DEIDENTIFICATION = re.compile(
    r"\[\*\*[^\]]{0,200}\*\*\]|_{2,}|\bX{3,}\b|<[A-Z_]{2,20}>|\[(?:REDACTED|DEIDENTIFIED)\]",
)
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u200b-\u200f\u202a-\u202e\ufeff]")
_LIST_NUMBER = re.compile(r"(?<=[.:;] )\s*\(?\d{1,2}[.)]\s+(?=[A-Z])")
_ITEM_NUMBER = re.compile(r"(?:^|(?<=\s))\(?(\d{1,2})[.)]\s+(?=[A-Z])")
# a form's boxes; an empty bracket is one only where another is ticked
_TICKED = re.compile(r"\[[xX]\]|\( ?[xX] ?\)|[\u2611\u2612\u2713\u2714\U0001f5f9]")
_EMPTY_BOX = re.compile(r"\[ ?\]|\( ?\)|\u2610")
# UTF-8 that was read as Windows-1252, of the marks that mlip/knowledge/plain_letters.py knows
_TWICE = re.compile("\u00e2\u20ac[\u2122\u02dc\u0153\x9d\u201c\u201d]")
_ONCE = dict(zip("\u2122\u02dc\u0153\x9d\u201c\u201d", "''\"\"--", strict=True))
_SPACES = re.compile(r"[^\S\n]+")
_SPACE_BEFORE_STOP = re.compile(r"[^\S\n]+([.,;:])")
# each from the first mark of a run on only: from every one, a line of 20,000 dots took minutes
_DOUBLED_STOP = re.compile(r"(?<![.,;:])([.,;:])(?:[^\S\n]*[.,;:])+(?=\s|$)")

_WANTED = {
    "findings": ("findings", "finding"),
    "impression": ("impression", "impressions", "conclusion", "conclusions", "opinion"),
}
_OTHER = (
    "indication",
    "indications",
    "history",
    "clinical history",
    "clinical information",
    "clinical indication",
    "reason for exam",
    "reason for examination",
    "technique",
    "comparison",
    "comparisons",
    "examination",
    "exam",
    "study",
    "procedure",
    "recommendation",
    "recommendations",
    "notification",
    "wet read",
    "addendum",
)
_NAMES = sorted({*_WANTED["findings"], *_WANTED["impression"], *_OTHER}, key=len, reverse=True)
HEADINGS = frozenset(_NAMES)  # lower case, blanks between words
_BLANKS = "[ \t\u00a0\u202f\ufeff]*"  # with those of HTML, of French, and a byte-order mark
# A heading opens a line, or stands in capitals after a stop; a colon ends it.
_HEADING = re.compile(
    rf"(?:(?:^|\n){_BLANKS}(?:[-*\u2022]{_BLANKS})?(?P<line>(?i:" + "|".join(_NAMES) + r"))"
    r"|(?<=[.\s])(?P<capitals>" + "|".join(n.upper() for n in _NAMES) + rf")){_BLANKS}:"
)
# RE2 pattern for "may have a heading": what the slow path must look at
_MAY_HAVE_HEADING = "(?i)(" + "|".join(_NAMES) + f"){_BLANKS}:"

# Abbreviations whose stop ends no sentence.
_ABBREVIATIONS = frozenset(
    "dr mr mrs ms vs e.g i.e approx st fig resp cf incl max min pt pts a.p p.a a.m p.m".split()
)
_LONGEST_ABBREVIATION = max(map(len, _ABBREVIATIONS))
_STOP = re.compile(r"(?<![.!?])[.!?]+(?=\s|$|[A-Z][a-z])|\n\s*\n")


def clean_report(text: str) -> str:
    """The report, a line a paragraph, without marks that stand for removed identifiers, to
    MAX_CHARACTERS.

    Kept as they are: words, case, negations, decimals, units, blank lines. Removed: control
    characters, lone surrogates, de-identification marks, marks and numbers of lists. Boxes of a
    form become (+) and (-), items numbered on one line statements of their own. A line that
    ends a statement gets the full stop that it lacks (mlip/knowledge/report_lines.py).
    """
    text = _TWICE.sub(lambda mark: _ONCE[mark[0][-1]], text[:MAX_CHARACTERS])
    text = plain(text)[:MAX_CHARACTERS]
    text = _CONTROL.sub(" ", text.replace("\r\n", "\n").replace("\r", "\n"))
    if _TICKED.search(text) or "\u2610" in text:
        text = _EMPTY_BOX.sub("(-)", _TICKED.sub("(+)", text))
    text = _with_items(text)
    text = joined_lines(_DEIDENTIFICATION.sub(" ", text))
    text = _LIST_NUMBER.sub(" ", text)
    text = _SPACES.sub(" ", text)
    text = _SPACE_BEFORE_STOP.sub(r"\1", text)
    return _DOUBLED_STOP.sub(r"\1", text)[:MAX_CHARACTERS].strip(" ,;:\n")


def _with_items(text: str) -> str:
    """Items that count up from 1 within a line ("1) No edema 2) Nodule") on a line each."""
    out, start, wanted = "", 0, 1
    for number in _ITEM_NUMBER.finditer(text):
        before = text[start : number.start()]
        if number[1] == "1":
            wanted = 2 if not before.strip() or before.rstrip()[-1] in ".:;" else 1
        elif wanted > 1 and int(number[1]) == wanted:
            out += before if before.rstrip(" \t").endswith("\n") else f"{before}\n"
            start, wanted = number.start(), wanted + 1
    return out + text[start:]


def split_sections(text: str) -> dict[str, str]:
    """Heading (lower case) -> body, in order; "" holds what stands before the first heading."""
    sections: dict[str, list[str]] = {}
    name, start = "", 0
    for heading in _HEADING.finditer(text):
        if body := text[start : heading.start()].strip():
            sections.setdefault(name, []).append(body)
        name = (heading["line"] or heading["capitals"]).lower()
        start = heading.end()
    if body := text[start:].strip():
        sections.setdefault(name, []).append(body)
    return {name: "\n\n".join(bodies) for name, bodies in sections.items()}


def choose_sections(text: str, sections: str) -> str | None:
    """The part of a report to train on, or None where it has headings but nothing below the asked.

    sections: "findings", "impression", or "all" = both, and the whole text where it has neither.
    A text without any heading, or with words before the first one only, is taken whole.
    """
    headings = {(h["line"] or h["capitals"]).lower() for h in _HEADING.finditer(text)}
    found = split_sections(text)
    if not headings or set(found) == {""}:
        return text
    names = _WANTED.get(sections, (*_WANTED["findings"], *_WANTED["impression"]))
    chosen = [body for name, body in found.items() if name in names]
    if chosen:
        return "\n\n".join(chosen)
    has_either = any(name in headings for group in _WANTED.values() for name in group)
    return text if sections == "all" and found and not has_either else None


def select_sections(
    column: pa.ChunkedArray, sections: str
) -> tuple[pa.ChunkedArray, NDArray[np.bool_]]:
    """choose_sections over a column; only rows that may hold a heading leave the fast path.

    Returns: (texts, [R] bool True where the asked section is missing)
    """
    missing = np.zeros(len(column), dtype=bool)
    chunks, first = [], 0
    for chunk in column.chunks:
        rows = np.flatnonzero(contains_byte(chunk, b":"))
        suspects = pc.match_substring_regex(chunk.take(pa.array(rows)), _MAY_HAVE_HEADING)
        rows = rows[suspects.to_numpy(zero_copy_only=False)]
        if len(rows):
            chosen = [choose_sections(t, sections) for t in chunk.take(pa.array(rows)).to_pylist()]
            missing[first + rows] = [text is None for text in chosen]
            replaced = np.zeros(len(chunk), dtype=bool)
            replaced[rows] = True
            texts = pa.array([text or "" for text in chosen], type=pa.large_string())
            chunk = pc.replace_with_mask(chunk, pa.array(replaced), texts)
        chunks.append(chunk)
        first += len(chunk)
    return pa.chunked_array(chunks, type=pa.large_string()), missing


def sentence_spans(text: str) -> list[tuple[int, int]]:
    """(start, end) of each sentence of a cleaned report; decimals and abbreviations stay whole."""
    spans: list[tuple[int, int]] = []
    start = 0
    for stop in _STOP.finditer(text):
        if stop.group()[0] == "." and _is_abbreviation(text, stop.start()):
            continue
        _add_span(spans, text, start, stop.end())
        start = stop.end()
    _add_span(spans, text, start, len(text))
    return spans


def _is_abbreviation(text: str, stop: int) -> bool:
    begin = stop
    first = max(0, stop - _LONGEST_ABBREVIATION - 1)  # no farther: a report may be one long word
    while begin > first and (text[begin - 1].isalnum() or text[begin - 1] == "."):
        begin -= 1
    word = text[begin:stop].lower()
    # a single capital letter is an initial or a grade, except at the end of the text
    lone_initial = len(word) == 1 and word.isalpha() and text[stop + 1 : stop + 2] != ""
    return word in _ABBREVIATIONS or lone_initial


def _add_span(spans: list[tuple[int, int]], text: str, start: int, end: int) -> None:
    while start < end and text[start].isspace():
        start += 1
    while end > start and text[end - 1].isspace():
        end -= 1
    # a piece without any letter or digit joins nothing and is no sentence
    if any(c.isalnum() for c in text[start:end]):
        spans.append((start, end))
