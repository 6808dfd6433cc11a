"""64-bit hashes of whole Arrow text columns in one compiled pass; nothing here is cryptographic."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

HashArray = NDArray[np.uint64]
Texts = Any  # a large_string column: pa.LargeStringArray or pa.ChunkedArray


def _mix_loop(a: HashArray, b: HashArray, out: HashArray) -> None:
    # splitmix64's finaliser (source: see mlip/keyed_random.py) over a combined with b
    for i in range(len(a)):
        x = a[i] + b[i % len(b)] * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        out[i] = x ^ (x >> np.uint64(31))


def _bytes_loop(data: NDArray[np.uint8], offsets: NDArray[np.int64], out: HashArray) -> None:
    # FNV-1a, 64 bit (Fowler, Noll, Vo; offset basis and prime from the public specification)
    for i in range(len(out)):
        h = np.uint64(0xCBF29CE484222325)
        for j in range(offsets[i], offsets[i + 1]):
            h = (h ^ np.uint64(data[j])) * np.uint64(0x100000001B3)
        out[i] = h


def _words_loop(
    data: NDArray[np.uint8],
    offsets: NDArray[np.int64],
    out: HashArray,
    words: NDArray[np.int32],
) -> None:
    for i in range(len(out)):
        h = np.uint64(0xCBF29CE484222325)
        count, inside = 0, False
        j, end = offsets[i], offsets[i + 1]
        while j < end:
            c = data[j]
            j += 1
            if c == 0xC2 and j < end:  # U+0080 to U+00BF
                d = data[j]
                # feminine and masculine ordinal, 2 3 1 raised, micro, three fractions
                is_letter = d == 0xAA or d == 0xB2 or d == 0xB3 or d == 0xB5 or d == 0xB9
                is_letter = is_letter or d == 0xBA or 0xBC <= d <= 0xBE
                if not is_letter:
                    inside = inside and d == 0xAD  # a soft hyphen stands inside of a word
                    j += 1
                    continue
            elif c == 0xE2 and j + 1 < end and 0x80 <= data[j] <= 0x81:  # U+2000 to U+207F
                d = data[j + 1]
                if data[j] == 0x80 or d <= 0xAF:
                    # joiners and the word joiner stand inside of words
                    joins = d == 0xA0 if data[j] == 0x81 else 0x8C <= d <= 0x8D
                    inside = inside and joins
                    j += 2
                    continue
            elif c == 0xEF and j + 1 < end and data[j] == 0xBB and data[j + 1] == 0xBF:
                inside = False
                j += 2
                continue
            if 65 <= c <= 90:
                c += 32
            # letters, digits and what is beyond ASCII and its marks make words
            if 48 <= c <= 57 or 97 <= c <= 122 or c >= 128:
                if not inside:
                    h = (h ^ np.uint64(32)) * np.uint64(0x100000001B3)
                    count += 1
                    inside = True
                h = (h ^ np.uint64(c)) * np.uint64(0x100000001B3)
            else:
                inside = False
        out[i] = h
        words[i] = count


def _find_loop(
    data: NDArray[np.uint8], offsets: NDArray[np.int64], byte: int, out: NDArray[np.bool_]
) -> None:
    for i in range(len(out)):
        found = False
        for j in range(offsets[i], offsets[i + 1]):
            if data[j] == byte:
                found = True
                break
        out[i] = found


@cache
def _compiled(loop: Callable[..., None]) -> Callable[..., None]:
    from mlip.dataloading.compiled import compiled  # numba: half a second where nothing is hashed

    return compiled(loop)


def _pieces(
    column: Texts,
) -> Iterator[tuple[int, int, NDArray[np.uint8], NDArray[np.int64]]]:
    """First row, last row, bytes and row offsets of each chunk; a null has no bytes."""
    first = 0
    for chunk in column.chunks if isinstance(column, pa.ChunkedArray) else (column,):
        _, offsets, data = chunk.buffers()
        last = first + len(chunk)
        starts = np.zeros(1, np.int64)
        if len(chunk):
            starts = np.frombuffer(offsets, np.int64)[chunk.offset : chunk.offset + len(chunk) + 1]
        content = np.zeros(0, np.uint8) if data is None else np.frombuffer(data, np.uint8)
        yield first, last, content, starts
        first = last


def mix(a: HashArray, b: HashArray | np.uint64) -> HashArray:
    """A well-spread hash of pairs; b is one value or one per row."""
    out = np.empty_like(a)
    _compiled(_mix_loop)(a, np.atleast_1d(np.asarray(b, dtype=np.uint64)), out)
    return out


def hash_bytes(column: Texts) -> HashArray:
    """Hash of every row's exact bytes.  Shapes: [R] -> [R] uint64"""
    out = np.empty(len(column), dtype=np.uint64)
    for first, last, data, offsets in _pieces(column):
        _compiled(_bytes_loop)(data, offsets, out[first:last])
    return mix(out, np.uint64(1))


def hash_words(column: Texts) -> tuple[HashArray, NDArray[np.int32]]:
    """Hash of every row's words in order, ASCII's case and punctuation aside, and their number.

    Two reports with equal hashes read the same: layout, capitals, de-identification marks made of
    underscores, and the blanks, quotation marks and dashes of word processors do not count.
    """
    out = np.empty(len(column), dtype=np.uint64)
    words = np.empty(len(column), dtype=np.int32)
    for first, last, data, offsets in _pieces(column):
        _compiled(_words_loop)(data, offsets, out[first:last], words[first:last])
    return mix(out, np.uint64(2)), words


def contains_byte(column: Texts, byte: bytes) -> NDArray[np.bool_]:
    """Which rows hold an ASCII character; a tenth of a regular expression's time."""
    out = np.empty(len(column), dtype=bool)
    for first, last, data, offsets in _pieces(column):
        _compiled(_find_loop)(data, offsets, byte[0], out[first:last])
    return out


# What exports of tables write where there is no text.
NAN_WORDS = ("nan", "none", "null", "na", "n/a", "nil", "missing", "no report", "not available")


@cache
def hash_of_nan_words() -> HashArray:
    """hash_words of each of NAN_WORDS.  Shapes: [n] uint64"""
    return hash_words(pa.array(NAN_WORDS, pa.large_string()))[0]


def says_none(column: Texts) -> NDArray[np.bool_]:
    """Where a cell is blank, holds marks alone, or what programs write for a gap: NA, nan, None."""
    hashes, words = hash_words(column)
    return (words == 0) | np.isin(hashes, hash_of_nan_words())


def keyed(column: Texts, fingerprint: str) -> HashArray:
    """hash_bytes, of other values in each manifest: fingerprint is the hex SHA-256 of its bytes."""
    return mix(hash_bytes(column), np.uint64(int(fingerprint[:16], 16)))
