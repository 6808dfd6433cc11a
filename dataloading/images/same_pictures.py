"""Which films of two lists, or of one, show the same picture: their perceptual hashes compared.

The file that holds a manifest's hashes, beside it, is read and made here too.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mlip.dataloading.compiled import compiled
from mlip.dataloading.images.perceptual_hash import BITS, VERSION
from mlip.dataloading.progress import Progress
from mlip.system.machine import usable_cores

IntArray = NDArray[np.int64]

HASHES_FILE = "perceptual_hashes.parquet"  # beside a manifest
# Of 612,484 pairs of different people's films the nearest differed in 233 bits, and of 200,880 on
# which one large shutter was put 1 in 160 or less, 70 in a quarter; one film that is stored anew
# differs in less wherever it is neither cropped nor turned (datasets.md).
SAME_BITS = 160
_WORDS = BITS // 64
# Of the first 256 bits, a look that ends 998 of 1,000 comparisons: a film at SAME_BITS differs in
# 53 of them, give or take 5; in 69 at most of 4,643 real films stored anew that count as the same.
_LOOK_WORDS, _LOOK_BITS = 4, 88
_BLOCK = 4096
_MOST_PAIRS = 1_000_000  # of a thousand copies of one blank there are half as many
_ROWS_AT_ONCE = 512
_SCHEMA = pa.schema(
    [("image", pa.string()), ("hash", pa.binary(BITS // 8))], {"version": str(VERSION)}
)


@dataclass(frozen=True)
class PictureHashes:
    """Hashes of a table's rows: none, one or two a row.

    Shapes:  bits [K, 12] uint64; row [K], ascending
    """

    bits: NDArray[np.uint64]
    row: IntArray

    def of(self, rows: NDArray[np.bool_]) -> PictureHashes:
        """Those of the marked rows, numbered as before."""
        kept = rows[self.row]
        return PictureHashes(self.bits[kept], self.row[kept])

    def __len__(self) -> int:
        return len(self.row)


@dataclass(frozen=True)
class SamePairs:
    """Rows of both sides that show the same picture, each pair once, and how many bits differ.

    cut  there were more than _MOST_PAIRS (of hashes), and those behind are not among them
    """

    own: IntArray
    other: IntArray
    bits: IntArray
    cut: bool


def hash_table(images: list[str], hashes: list[list[bytes]]) -> pa.Table:
    """HASHES_FILE of films by their image cells; null stands for one that was looked at and has
    none, so that nobody looks again."""
    pairs = zip(images, hashes, strict=True)
    rows = [(image, bits) for image, film in pairs for bits in (*film, *[None] * (not film))]
    columns = zip(*rows, strict=True) if rows else ((), ())
    arrays = [pa.array(list(c), field.type) for c, field in zip(columns, _SCHEMA, strict=True)]
    return pa.table(arrays, schema=_SCHEMA)


def read_hash_table(folder: Path) -> pa.Table | None:
    """HASHES_FILE of a folder; None where there is none, or one of another version of the hash."""
    try:
        table = pq.read_table(folder / HASHES_FILE)
    except (OSError, pa.ArrowException):
        return None
    is_ours = table.schema == _SCHEMA and table.schema.metadata == _SCHEMA.metadata
    return table if is_ours else None


def hashes_of(table: pa.Table, image: pa.ChunkedArray) -> PictureHashes:
    """Those of a manifest's rows, by its column of images."""
    table = table.filter(pc.is_valid(table["hash"]))
    names = pc.unique(image)
    film = pc.fill_null(pc.index_in(table["image"], value_set=names), -1).to_numpy()
    place = pc.index_in(image, value_set=names).to_numpy()
    by_film = np.argsort(film, kind="stable")
    first, last = (np.searchsorted(film[by_film], place, side) for side in ("left", "right"))
    count = last - first
    at = np.repeat(first - (np.cumsum(count) - count), count) + np.arange(count.sum())
    content = b"".join(table["hash"].take(pa.array(by_film[at])).to_pylist())
    bits = np.frombuffer(content, np.uint64).reshape(-1, _WORDS)
    return PictureHashes(bits, np.repeat(np.arange(len(image)), count))


def same_pictures(own: PictureHashes, other: PictureHashes | None = None) -> SamePairs:
    """Pairs of films whose hashes, or one's hash and the other's turned round, are that near.

    other  None = own among themselves, each pair once
    Costs:  len(own) x len(other) comparisons on all cores, no memory but the pairs
    """
    theirs = own if other is None else other
    found: list[NDArray[np.int64]] = []
    cut = False
    starts = range(0, len(own), _ROWS_AT_ONCE)
    look = np.ascontiguousarray(theirs.bits[:, :_LOOK_WORDS].T)
    told = Progress("films compared by their pictures")

    def compare(start: int) -> tuple[NDArray[np.int64], bool]:
        stop = min(start + _ROWS_AT_ONCE, len(own))
        pairs = np.empty((1024, 3), np.int64)
        while True:
            count = _compare(own.bits, theirs.bits, look, start, stop, other is None, pairs)
            if count <= len(pairs) or len(pairs) == _MOST_PAIRS:
                return pairs[:count], count > len(pairs)
            pairs = np.empty((min(count, _MOST_PAIRS), 3), np.int64)

    with ThreadPoolExecutor(usable_cores()) as threads:
        for start, (pairs, is_cut) in zip(starts, threads.map(compare, starts), strict=True):
            found.append(pairs)
            told(min(start + _ROWS_AT_ONCE, len(own)), len(own))
            # of 30,000 copies of one picture all pairs were 450 million
            if cut := is_cut or sum(map(len, found)) > _MOST_PAIRS:
                threads.shutdown(cancel_futures=True)
                break
    return _once(np.concatenate([np.empty((0, 3), np.int64), *found]), own, theirs, cut)


def _once(
    pairs: NDArray[np.int64], own: PictureHashes, other: PictureHashes, cut: bool
) -> SamePairs:
    """Pairs of rows for pairs of hashes: the nearest of each, none of a row with itself."""
    mine, theirs, bits = own.row[pairs[:, 0]], other.row[pairs[:, 1]], pairs[:, 2]
    if own is other:
        apart = mine != theirs
        mine, theirs, bits = mine[apart], theirs[apart], bits[apart]
    order = np.lexsort((bits, theirs, mine))
    mine, theirs, bits = mine[order], theirs[order], bits[order]
    is_first = np.ones(len(mine), bool)
    is_first[1:] = (mine[1:] != mine[:-1]) | (theirs[1:] != theirs[:-1])
    kept = np.flatnonzero(is_first)[:_MOST_PAIRS]
    return SamePairs(mine[kept], theirs[kept], bits[kept], cut)


def _loop(
    own: NDArray[np.uint64],
    other: NDArray[np.uint64],
    look: NDArray[np.uint64],
    start: int,
    stop: int,
    among_themselves: bool,
    pairs: NDArray[np.int64],
) -> int:
    """How many pairs there are; as many as have room stand in `pairs`: places and bits.

    Shapes:  own [n, 12], other [m, 12]; look [4, m], the first words of other
    """
    count = 0
    apart = np.empty(_BLOCK, np.uint8)
    # a block of looks stays in the cache, and its loop becomes vector instructions: six times the
    # speed of one loop over pairs
    for first in range(0, len(other), _BLOCK):
        last = min(first + _BLOCK, len(other))
        look_0, look_1 = look[0, first:last], look[1, first:last]
        look_2, look_3 = look[2, first:last], look[3, first:last]
        for i in range(start, stop):
            if among_themselves and i >= last - 1:
                break
            mine = own[i]
            my_0, my_1, my_2, my_3 = mine[0], mine[1], mine[2], mine[3]
            for j in range(last - first):
                apart[j] = (
                    _ones(my_0 ^ look_0[j])
                    + _ones(my_1 ^ look_1[j])
                    + _ones(my_2 ^ look_2[j])
                    + _ones(my_3 ^ look_3[j])
                    - _LOOK_BITS
                )
            for j in range(max(i + 1 - first, 0) if among_themselves else 0, last - first):
                # fewer than _LOOK_BITS have wrapped round to the top, as more than the rest lie
                if apart[j] <= 256 - 2 * _LOOK_BITS:
                    continue
                bits = 0
                for word in range(_WORDS):
                    bits += _ones(mine[word] ^ other[first + j, word])
                bits = min(bits, BITS - bits)
                if bits <= SAME_BITS:
                    if count < len(pairs):
                        pairs[count, 0], pairs[count, 1], pairs[count, 2] = i, first + j, bits
                    count += 1
    return count


def _count_ones(x: Any) -> Any:
    """Bits of a uint64, added up in pairs, fours and bytes: one instruction once compiled."""
    x = x - ((x >> np.uint64(1)) & np.uint64(0x5555555555555555))
    x = (x & np.uint64(0x3333333333333333)) + ((x >> np.uint64(2)) & np.uint64(0x3333333333333333))
    x = (x + (x >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return np.int64((x * np.uint64(0x0101010101010101)) >> np.uint64(56))


_ones: Callable[..., Any] = compiled(_count_ones)
_compare: Callable[..., int] = compiled(_loop)
