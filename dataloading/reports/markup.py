"""Reports that a system has exported with their markup: HTML, CDA and the escapes of HL7 v2 become
plain text, RTF is left out.

As text, "nbsp" and "par" would be words of the vocabulary, and a paragraph of a list would not end
the denial before it.
"""

from __future__ import annotations

import html
import re

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

# Elements that reports are written with; "<5 mm" and "<NAME>" are none. Those of a block end a
# paragraph, a cell of a table ends a statement.
_BLOCKS = (
    "p|div|ul|ol|dl|table|h[1-6]|hr|body|html|head|title|blockquote|section|article|pre"
    "|paragraph|list|component|text"  # of CDA
)
_LINES = "br|li|tr|td|th|dt|dd|item|caption"
_INLINE = (
    "a|b|i|u|s|em|strong|span|font|small|big|sub|sup|center|tbody|thead|col|colgroup|meta|content"
)
_HIDDEN = re.compile(
    r"(?i)<(?:(?P<name>style|script|head)\b[^<>]*>|!(?P<comment>--)|!doctype[^<>]*>)"
)
_END = {
    "--": re.compile("-->"),
    **{name: re.compile(rf"(?i)</{name}\s*>") for name in ("style", "script", "head")},
}
_ELEMENT = re.compile(
    # from the first blank of a run on only: from each of them, a cell padded with 50,000 took 2 s
    rf"(?i)(?:(?<!\s)\s+)?<(?P<end>/)?(?:(?P<block>{_BLOCKS})|(?P<line>{_LINES}))(?:\s[^<>]*)?/?>\s*"
    rf"|</?(?:{_INLINE})(?:\s[^<>]*)?/?>"
)
_ENTITY = re.compile(r"&(?:#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,30});")
# HL7 v2, chapter 2.7: breaks of a line, delimiters, and characters by their code
_ESCAPE = re.compile(
    r"(?i)\\(?:\.(br|sp|ce|sk|in|ti|fi|nf) ?[+\-]?\d*|([fstre])|x((?:[0-9a-f]{2})+)|[hn])\\"
)
_FORMAT = {"br": "\n", "sp": "\n", "ce": "\n", "sk": " "}  # indents and fills leave nothing
_DELIMITERS = {"f": "|", "s": "^", "t": "&", "r": "~", "e": "\\"}
# RE2 pattern of what the slow path must look at
_MAY_BE_MARKUP = (
    r"(?i)&(#x?[0-9a-f]+|[a-z][a-z0-9]+);|</?("
    + "|".join((_BLOCKS, _LINES, _INLINE, "style", "script"))
    + r")[\s/>]|^\s*\{\\rtf"
    + r"|\\(\.(br|sp|ce|sk|in|ti|fi|nf) ?[+\-]?[0-9]*|[fstrehn]|x([0-9a-f]{2})+)\\"
)
_RTF = re.compile(r"\s*\{\\rtf")


def is_rtf(text: str) -> bool:
    return _RTF.match(text) is not None


def without_markup(text: str) -> str:
    """A report's words without HTML and HL7 escapes: blocks become paragraphs, <br> and \\.br\\ a
    line, cells items."""
    text = _ESCAPE.sub(_escaped, text) if "\\" in text and not is_rtf(text) else text
    text = _without_hidden(_ENTITY.sub(lambda match: html.unescape(match.group()), text))

    def plain(element: re.Match[str]) -> str:
        if element["block"]:
            return "\n\n"
        if element["line"] is None:
            return ""
        if element["line"].lower() == "br":
            return "\n"
        return "" if element["end"] else "\n- "

    return _ELEMENT.sub(plain, text).strip() if "<" in text else text


def _without_hidden(text: str) -> str:
    """A text without comments, styles and scripts; one that nothing ends is text.

    Each end is looked for once behind the last one: by one pattern, a MB of "<!--" took hours.
    """
    out, kept, unended = [], 0, set()
    at = 0
    while (begin := _HIDDEN.search(text, at)) is not None:
        kind = (begin["name"] or begin["comment"] or "").lower()
        end = None if kind in unended else _END[kind].search(text, begin.end()) if kind else begin
        if end is None:
            unended.add(kind)
            at = begin.start() + 1
            continue
        out += [text[kept : begin.start()], " "]
        kept = at = end.end()
    return "".join([*out, text[kept:]])


def _escaped(escape: re.Match[str]) -> str:
    if escape[3]:
        return bytes.fromhex(escape[3]).decode("cp1252", errors="replace")
    if escape[2]:
        return _DELIMITERS[escape[2].lower()]
    return _FORMAT.get((escape[1] or "").lower(), "")


def plain_reports(column: pa.ChunkedArray) -> tuple[pa.ChunkedArray, NDArray[np.bool_]]:
    """without_markup over a column; only rows that may hold markup leave the fast path.

    Returns: (texts, [R] bool True where the text is RTF, which is not read)
    """
    chunks, rtf = [], []
    for chunk in column.chunks:
        suspects = pc.match_substring_regex(chunk, _MAY_BE_MARKUP)
        suspects = suspects.to_numpy(zero_copy_only=False)
        refused = np.zeros(len(chunk), dtype=bool)
        if suspects.any():
            texts = chunk.filter(pa.array(suspects)).to_pylist()
            refused[suspects] = [is_rtf(text) for text in texts]
            plain = pa.array([without_markup(text) for text in texts], type=pa.large_string())
            chunk = pc.replace_with_mask(chunk, pa.array(suspects), plain)
        chunks.append(chunk)
        rtf.append(refused)
    return (
        pa.chunked_array(chunks, type=pa.large_string()),
        np.concatenate([np.zeros(0, dtype=bool), *rtf]),
    )
