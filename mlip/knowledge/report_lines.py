"""Where a line of a report ends a statement, and where it was only wrapped.

Many systems write one finding a line and no full stop. Joined by blanks, "No pneumothorax" and
"Cardiomegaly" become one denial. What does not live here: sentences of one line (scope.py).
"""

from __future__ import annotations

import re

_BLANK_LINE = re.compile(r"\n[^\S\n]*\n\s*")
# what opens an item of a list; a number only where a capital follows: "2. 5 mm" is a size
_ITEM = re.compile(
    r"[^\S\n]*(?:[-*\u2022\u00b7\u25aa\u25cf\u25e6]|\(?\d{1,2}[.)](?=\s+[A-Z]))(?:\s+|$)"
)
# words and blanks from their first character on only: from each, one of 20,000 took seconds
_LAST_WORD = re.compile(r"(?<![^\W\d_])[^\W\d_]+$")
# "pneumothorax: no", "effusion - no", "edema | no", "pneumothorax: -" is all of it
_ANSWER = re.compile(
    r"(?:(?:[:=?,|]|\s-)\s*|(?<!\s)(?=\s*\t)\s+)(?:no|n)$|:\s*[-+]$", re.IGNORECASE
)
# a line that ends so goes on in the next, whatever that begins with (letters: of s/p, r/o, c/w)
_GOES_ON = frozenset(
    "a an the this that these those no not nor without with within and or versus vs of to in into "
    "on at by for from as than is are was were be been being has have had may might can could "
    "cannot should would will per via near over under between both either neither p o w".split()
)
_LEAST_WIDTH = 60  # a text with no longer line is not wrapped, but written line by line


def joined_lines(text: str) -> str:
    """A report with its lines put together: a blank line stays one, a line that ends a statement
    gets the full stop that it lacks, a wrapped line a blank. Marks of lists are left out.

    A line ends a statement before an item of a list, and before a capital where it was not full:
    its next word would have fitted into the width of the text.
    Source:  ours
    """
    return "\n\n".join(_joined(part) for part in _BLANK_LINE.split(text) if part.strip())


def _joined(paragraph: str) -> str:
    lines = [line.rstrip() for line in paragraph.split("\n")]
    width = max(map(len, lines))
    out = ""
    for before, line in zip(["", *lines], lines, strict=False):
        item = _ITEM.match(line)
        is_row = line.lstrip().startswith("|")  # of a table
        words = line[item.end() if item else 0 :].strip(" \t|" if is_row else None)
        if not words:
            continue
        if out:
            out = _ended(out) if item or is_row or _ends(before, words, width) else out + " "
        out += words
    return out


def _ends(line: str, following: str, width: int) -> bool:
    """Whether a line that begins with a capital opens a statement of its own."""
    if not following[:1].isupper():
        return False
    if not _ANSWER.search(line):
        last = _LAST_WORD.search(line)
        if line[-1:] in ",;:-(/&+" or last is not None and last.group().lower() in _GOES_ON:
            return False
    return width < _LEAST_WIDTH or len(line) + 1 + len(following.split()[0]) <= width


def _ended(line: str) -> str:
    line = line.rstrip(" ,;")
    return line + (" " if line[-1:] in ".!?:" else ". ")
