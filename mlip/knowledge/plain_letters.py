"""What word processors and PDF files put in the place of plain letters: no vocabulary knows it.

Reports and concept files are read through the same function, so that one finds the other.
"""

import unicodedata

_PLAIN = str.maketrans(
    {
        "\u2018": "'",
        "\u2019": "'",
        "\u201c": '"',
        "\u201d": '"',
        "\u2013": "-",
        "\u2014": "-",
        "\u2212": "-",
        "\u00a0": " ",
        "\u2010": "-",
        "\u2011": "-",
        "\u2026": "...",
        **dict.fromkeys("\u00ad\u200c\u200d\u2060", ""),  # seen nowhere, inside of words
        "\ufb00": "ff",
        "\ufb01": "fi",
        "\ufb02": "fl",
        "\ufb03": "ffi",
        "\ufb04": "ffl",
        "\ufb05": "st",
        "\ufb06": "st",
    }
)


def plain(text: str) -> str:
    """The text with plain marks, and a letter and its accent as one character (NFC): apart, as
    some PDF files have them, they would be a word and a sign."""
    return text if text.isascii() else unicodedata.normalize("NFC", text.translate(_PLAIN))
