"""How the text of a table is encoded: its byte-order mark, and where it stops being UTF-8."""

from __future__ import annotations

import codecs
from pathlib import Path

BOM = codecs.BOM_UTF8  # what Windows tools write before UTF-8
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_BLOCK_BYTES = 4 << 20


def is_utf16(head: bytes) -> bool:
    """Whether a file that begins with `head` says so by its byte-order mark."""
    return head.startswith(_UTF16)


def first_line_not_utf8(path: Path) -> int | None:
    """Number of the line with the first byte that is not UTF-8, from 1; None where all is.

    Reads the file in blocks: for the error path, after another reader has refused it.
    Lines end in \\n or \\r\\n, where there is none in \\r.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    feeds = returns = 0
    with open(path, "rb") as stream:
        while True:
            block = stream.read(_BLOCK_BYTES)
            try:
                decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                # the begin of a character that the block before ended with holds no line break
                sound = error.object[: error.start]
                feeds, returns = feeds + sound.count(b"\n"), returns + sound.count(b"\r")
                return 1 + (feeds or returns)
            if not block:
                return None
            feeds, returns = feeds + block.count(b"\n"), returns + block.count(b"\r")
