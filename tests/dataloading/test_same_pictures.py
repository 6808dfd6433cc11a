"""Every pair of near hashes is found once, and nothing else.

Oracle: bits that are counted one by one over all pairs.
"""

from __future__ import annotations

import csv
import itertools
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mlip.dataloading import progress
from mlip.dataloading.images import same_pictures as module
from mlip.dataloading.images.perceptual_hash import BITS
from mlip.dataloading.images.same_pictures import (
    HASHES_FILE,
    SAME_BITS,
    PictureHashes,
    hash_table,
    hashes_of,
    read_hash_table,
    same_pictures,
)
from mlip.dataloading.prepare.duplicates import write_duplicates


def hashes(bits: np.ndarray, row: list[int] | None = None) -> PictureHashes:
    packed = np.packbits(bits, axis=1).view(np.uint64)
    return PictureHashes(packed, np.array(row or range(len(bits))))


def turned(bits: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """The same with that many bits, anywhere, turned round."""
    out = bits.copy()
    out[rng.choice(BITS, count, replace=False)] ^= True
    return out


def test_pairs_are_those_of_counting_bit_by_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ROWS_AT_ONCE", 7)
    rng = np.random.default_rng(1)
    bits = rng.random((60, BITS)) < 0.5
    # in and at the threshold, behind it, inverted; the 5,000 more make a second block
    near = [(0, 0), (1, 100), (2, SAME_BITS), (3, SAME_BITS + 1), (4, BITS - 9), (4, BITS // 2)]
    near += [(5, BITS - SAME_BITS)]
    other = np.stack([turned(bits[i], count, rng) for i, count in near])
    other = np.concatenate([rng.random((5000, BITS)) < 0.5, other])
    found = same_pictures(hashes(bits), hashes(other))
    told = list(zip(found.own.tolist(), found.other.tolist(), found.bits.tolist(), strict=True))
    assert told == [(0, 5000, 0), (1, 5001, 100), (2, 5002, SAME_BITS), (4, 5004, 9)] + [
        (5, 5006, SAME_BITS)
    ]
    back = same_pictures(hashes(other), hashes(bits))  # rows of two lists are no one's own
    assert (
        list(zip(back.other.tolist(), back.own.tolist(), back.bits.tolist(), strict=True)) == told
    )
    alone = same_pictures(hashes(bits[:1]), hashes(bits[:1]))
    assert (alone.own.tolist(), alone.other.tolist()) == ([0], [0])
    everything = np.concatenate([bits, other[-300:]])
    distance = (everything[:, None] != everything[None]).sum(axis=2)
    distance = np.minimum(distance, BITS - distance)
    pairs = itertools.combinations(range(len(everything)), 2)
    expected = [(i, j) for i, j in pairs if distance[i, j] <= SAME_BITS]
    found = same_pictures(hashes(everything))
    assert list(zip(found.own.tolist(), found.other.tolist(), strict=True)) == expected
    assert not found.cut and len(expected) == 5


def test_a_film_of_two_hashes_is_one_film(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(2)
    one = rng.random(BITS) < 0.5
    bits = np.stack([one, turned(one, 20, rng), turned(one, 40, rng), turned(one, 10, rng)])
    # rows 3, 3, 5, 5: near to itself is no pair, and the nearest of the four counts is told
    found = same_pictures(hashes(bits, [3, 3, 5, 5]))
    assert (found.own.tolist(), found.other.tolist()) == ([3], [5])
    counts = [(bits[i] != bits[j]).sum() for i in (0, 1) for j in (2, 3)]
    assert found.bits.tolist() == [min(counts)]
    monkeypatch.setattr(module, "_MOST_PAIRS", 10)
    room: list[int] = []

    def measured(*given: Any) -> int:
        room.append(len(given[-1]))
        return loop(*given)

    loop = module._compare
    monkeypatch.setattr(module, "_compare", measured)
    copies = hashes(np.repeat(one[None], 60, axis=0))
    found = same_pictures(copies)
    assert found.cut and len(found.own) == 10
    assert room == [1024, 10]  # never for all of them, of 30,000 copies 11 GB
    found = same_pictures(hashes(np.repeat(one[None], 5, axis=0)))  # as many as have room
    assert not found.cut and len(found.own) == 10


def test_hashes_of_some_rows_keep_their_numbers() -> None:
    bits = np.random.default_rng(5).random((4, BITS)) < 0.5
    every = hashes(bits, [0, 2, 2, 3])
    kept = every.of(np.array([True, True, False, True]))
    assert kept.row.tolist() == [0, 3] and len(kept) == 2
    assert np.array_equal(kept.bits, every.bits[[0, 3]])


def test_copies_without_number_are_no_pairs_without_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_PAIRS", 7000)
    monkeypatch.setattr(module, "_ROWS_AT_ONCE", 2)
    compared: list[int] = []

    def counted(*given: object) -> int:
        compared.append(given[3])  # type: ignore[arg-type]
        time.sleep(0.01 * (len(compared) > 20))  # for whoever is to say that it is enough
        return loop(*given)

    loop = module._compare
    monkeypatch.setattr(module, "_compare", counted)
    copies = hashes(np.repeat(np.random.default_rng(3).random((1, BITS)) < 0.5, 3000, axis=0))
    found = same_pictures(copies)
    # four rows have more than there is room for: most of the other 1,498 blocks are left alone
    assert found.cut and len(found.own) == 7000 and len(set(compared)) < 300
    assert set(found.own.tolist()) == {0, 1, 2}


def test_more_copies_than_there_is_room_for_at_first_are_all_found() -> None:
    copies = hashes(np.repeat(np.random.default_rng(3).random((1, BITS)) < 0.5, 70, axis=0))
    assert len(same_pictures(copies).own) == 70 * 69 // 2


def test_progress_counts_the_films_that_are_done(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last line of the only part said "0 of 21 films, 0/s" when all was done."""
    monkeypatch.setattr(progress, "EVERY_S", 0.0)
    monkeypatch.setattr(module, "_ROWS_AT_ONCE", 2)
    same_pictures(hashes(np.random.default_rng(3).integers(0, 2, (5, BITS)).astype(bool)))
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" films")[0] for line in lines] == ["2 of 5", "4 of 5", "5 of 5"]


def test_hashes_are_found_by_the_image_s_cell_in_any_order_of_rows(tmp_path: Path) -> None:
    one, two, three = (bytes([i]) * (BITS // 8) for i in (1, 2, 3))
    table = hash_table(["gone", "a#1", "b#2", "blank"], [[one], [one], [two, three], []])
    pq.write_table(table, tmp_path / HASHES_FILE)
    read = read_hash_table(tmp_path)
    assert read is not None and read["hash"].to_pylist() == [one, one, two, three, None]
    images = pa.chunked_array([["b#2", "other", "blank"], ["a#1", None]])
    found = hashes_of(read, images)
    assert found.row.tolist() == [0, 0, 3]
    assert [bits.tobytes() for bits in found.bits] == [two, three, one]
    assert hashes_of(hash_table([], []), images).bits.shape == (0, BITS // 64)


def test_hashes_of_another_version_are_none(tmp_path: Path) -> None:
    table = hash_table(["a"], [[bytes(BITS // 8)]])
    assert read_hash_table(tmp_path) is None
    for other in (
        table.replace_schema_metadata({"version": "0"}),
        table.replace_schema_metadata(None),
        pa.table({"image": ["a"], "hash": ["b"]}),
        pa.table({"image": ["a"], "hash": ["b"]}, metadata=table.schema.metadata),
    ):
        pq.write_table(other, tmp_path / HASHES_FILE)
        assert read_hash_table(tmp_path) is None
    (tmp_path / HASHES_FILE).write_bytes(b"no table")
    assert read_hash_table(tmp_path) is None


def test_duplicates_are_told_by_row_and_counted_by_patient_and_split(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    bits = rng.random((7, BITS)) < 0.5
    bits[1], bits[3], bits[5] = bits[0], turned(bits[2], 5, rng), ~bits[4]
    patient = pa.chunked_array([["MRN1", "MRN1", "MRN2", "MRN3", "MRN4", "MRN5", "MRN6"]])
    split = pa.chunked_array([["train", "train", "train", "test", "val", "val", "test"]])
    path = tmp_path / "duplicates.csv"
    lines = write_duplicates(hashes(bits), patient, split, path)
    with path.open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[1:] == [
        ["0", "1", "train", "train", "yes", "0"],
        ["2", "3", "train", "test", "no", "5"],
        ["4", "5", "val", "val", "no", "0"],
    ]
    assert "6 films look like another one, 4 of them" in lines[0] and "2 like one of" in lines[0]
    assert lines[1].startswith("LEAKAGE") and "MRN" not in path.read_text() + "".join(lines)
    lines = write_duplicates(hashes(bits[[0, 2, 4]]), patient[:3], split[:3], path)
    assert lines == ["same picture: no two of 3 films"] and len(path.read_text().splitlines()) == 1
