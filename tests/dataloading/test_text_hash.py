"""Column hashes against the same definition in Python integers."""

from __future__ import annotations

import re

import numpy as np
import pyarrow as pa

from mlip.dataloading.text_hash import contains_byte, hash_bytes, hash_words, mix

TEXTS = ["", "a", "No effusion.", "no  EFFUSION", "Size 1.5 cm", "Size 15 cm", "Z0 A9",
         "Ergu\u00df links", "___", None, "x" * 5000, "@a[z`A{Z/0:9"]  # fmt: skip


def fnv(data: bytes) -> int:
    h = 0xCBF29CE484222325
    for byte in data:
        h = (h ^ byte) * 0x100000001B3 % 2**64
    return h


def mixed(h: int, salt: int) -> int:
    x = (h + salt * 0x9E3779B97F4A7C15) % 2**64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
    return x ^ (x >> 31)


def test_hash_bytes_is_mixed_fnv() -> None:
    column = pa.array(TEXTS, pa.large_string())
    expected = [mixed(fnv((t or "").encode()), 1) for t in TEXTS]
    assert hash_bytes(column).tolist() == expected


def test_hash_words_sees_words_in_order_and_nothing_else() -> None:
    column = pa.array(TEXTS, pa.large_string())
    hashes, words = hash_words(column)
    pieces = [re.findall(rb"[0-9a-z\x80-\xff]+", (t or "").lower().encode()) for t in TEXTS]
    assert words.tolist() == [len(p) for p in pieces]
    assert hashes.tolist() == [mixed(fnv(b"".join(b" " + w for w in p)), 2) for p in pieces]
    assert hashes[2] == hashes[3] and hashes[4] != hashes[5]


def test_marks_beyond_ascii_are_no_words() -> None:
    """Of two copies of a report one has the blanks and the apostrophes of a word processor."""
    joiners = dict.fromkeys(map(ord, "\u00ad\u200c\u200d\u2060"))
    characters = [
        *map(chr, range(0x80, 0x180)),
        *map(chr, range(0x2000, 0x2080)),
        *"ab .'\ufeff\ufefb",
    ]
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(characters, rng.integers(0, 9))) for _ in range(3000)]

    def is_mark(c: str) -> bool:
        latin = c < "\u00c0" and not c.isalnum()
        return latin or "\u2000" <= c < "\u2070" or c == "\ufeff"

    def words_of(text: str) -> list[bytes]:
        plain = text.translate(joiners)
        blank = [" " if is_mark(c) else c for c in plain]
        return [word.encode().lower() for word in "".join(blank).split(" ") if word]

    pieces = [words_of(text) for text in texts]
    hashes, words = hash_words(pa.array(texts, pa.large_string()))
    assert words.tolist() == [len(p) for p in pieces]
    assert hashes.tolist() == [mixed(fnv(b"".join(b" " + w for w in p)), 2) for p in pieces]
    curly = "Heart isn\u2019t\u00a0enlarged \u2013 stable\u2026"
    same = hash_words(pa.array([curly, "heart isn't enlarged - stable"], pa.large_string()))[0]
    assert same[0] == same[1]


def test_a_slice_of_a_column_hashes_as_its_own_rows() -> None:
    column = pa.array(TEXTS, pa.large_string())
    assert (hash_bytes(column.slice(3, 4)) == hash_bytes(column)[3:7]).all()
    assert (hash_words(column.slice(3, 4))[0] == hash_words(column)[0][3:7]).all()


def test_a_column_in_pieces_hashes_as_in_one() -> None:
    whole = pa.array(TEXTS, pa.large_string())
    pieces = pa.chunked_array([whole.slice(0, 3), whole.slice(3, 0), whole.slice(3)])
    assert (hash_bytes(pieces) == hash_bytes(whole)).all()
    for part in (0, 1):
        assert np.array_equal(hash_words(pieces)[part], hash_words(whole)[part])
    assert contains_byte(pieces, b".").tolist() == ["." in (t or "") for t in TEXTS]


def test_columns_without_a_row_or_without_a_text_have_hashes_too() -> None:
    for texts in ([], [None, None]):
        column = pa.array(texts, pa.large_string())
        hashes, words = hash_words(column)
        assert hash_bytes(column).tolist() == [mixed(fnv(b""), 1)] * len(texts)
        assert hashes.tolist() == [mixed(fnv(b""), 2)] * len(texts) and not words.any()
        assert not contains_byte(column, b"a").any()


def test_mix_takes_one_salt_or_one_per_row() -> None:
    a, b = np.array([1, 2, 2**64 - 1], np.uint64), np.array([5, 6, 7], np.uint64)
    assert mix(a, b).tolist() == [mixed(int(x), int(y)) for x, y in zip(a, b, strict=True)]
    assert mix(a, np.uint64(9)).tolist() == [mixed(int(x), 9) for x in a]
