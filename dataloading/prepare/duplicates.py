"""Films of one manifest that show the same picture: a table of their rows, and how many they are.

Rows and splits alone: identifiers stay in the manifest.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mlip.dataloading.images.image_file import decode_grey, read_header
from mlip.dataloading.images.perceptual_hash import HASHES, perceptual_hashes
from mlip.dataloading.images.same_pictures import (
    PictureHashes,
    hashes_of,
    read_hash_table,
    same_pictures,
)
from mlip.dataloading.ledger import BadSample
from mlip.dataloading.prepare.tables import write_csv
from mlip.dataloading.progress import Progress
from mlip.dataloading.shards import Reference, read_bytes

DUPLICATES_FILE = "duplicates.csv"
_HEADER = "row other_row split other_split same_patient bits".split()
_MOST_FILMS = 2_000_000  # 35 minutes on two cores; ten times as many take a hundred times that


def with_hashes(index: pa.Table, shard: Path) -> pa.Table:
    """The index of a shard, with the hashes of its pictures where an earlier version made it."""
    if HASHES in index.column_names:
        return index
    told = Progress("pictures of earlier shards hashed")
    hashes: list[list[bytes]] = []
    for offset, size in zip(*(index[name].to_pylist() for name in ("offset", "size")), strict=True):
        found: list[bytes] = []
        if offset >= 0:
            with suppress(BadSample):  # damaged since: told by whoever reads it
                content = read_bytes(str(shard.parent), Reference(shard.name, offset, size))
                picture = decode_grey(content, read_header(content))
                found = [bits.tobytes() for bits in perceptual_hashes(picture)]
        hashes.append(found)
        told(len(hashes), len(index))
    return index.append_column(HASHES, pa.array(hashes, pa.list_(pa.binary())))


def prepared_duplicates(out: Path) -> list[str]:
    """Writes DUPLICATES_FILE of a prepared set; lines for the terminal."""
    names = ["image", "patient_id", "split"]
    manifest = pq.read_table(out / "manifest.parquet", columns=names)
    table = read_hash_table(out)
    if table is None or len(manifest) > _MOST_FILMS:
        (out / DUPLICATES_FILE).unlink(missing_ok=True)
        return [f"same picture: not looked for, as there are more than {_MOST_FILMS:,} films"]
    known = hashes_of(table, manifest["image"])
    path = out / DUPLICATES_FILE
    lines = write_duplicates(known, manifest["patient_id"], manifest["split"], path)
    if missing := len(manifest) - len(np.unique(known.row)):
        lines.append(
            f"same picture: {missing} films were not compared: blank, or a side below 64 px"
        )
    return lines


def write_duplicates(
    hashes: PictureHashes, patient: pa.ChunkedArray, split: pa.ChunkedArray, path: Path
) -> list[str]:
    """A CSV of each pair of rows (from 0) that show the same picture; lines for the terminal."""
    pairs = same_pictures(hashes)
    who = _codes(patient)
    where = _codes(split)
    same_patient = who[pairs.own] == who[pairs.other]
    same_split = where[pairs.own] == where[pairs.other]
    names = split.to_pylist()
    rows = [
        [i, j, names[i], names[j], "yes" if same else "no", bits]
        for i, j, same, bits in zip(
            *(a.tolist() for a in (pairs.own, pairs.other, same_patient, pairs.bits)), strict=True
        )
    ]
    write_csv([_HEADER, *rows], path)

    def films(kept: NDArray[np.bool_]) -> int:
        return len(np.union1d(pairs.own[kept], pairs.other[kept]))

    every = films(np.ones(len(rows), bool))
    if not every:
        return [f"same picture: no two of {len(np.unique(hashes.row))} films"]
    more = f" (and more: only the first {len(rows):,} pairs stand there)" * pairs.cut
    lines = [
        f"same picture: {every} films look like another one, {films(~same_patient)} of them like "
        f"one of another patient, {films(~same_split)} like one of another split; pairs of rows: "
        f"{path}{more}"
    ]
    if films(~same_split):
        lines.append(
            "LEAKAGE: films of different splits look the same: look at the pairs, then give "
            "those patients one split or take the films out of --root"
        )
    return lines


def _codes(column: pa.ChunkedArray) -> NDArray[np.int64]:
    return np.asarray(pc.fill_null(pc.index_in(column, value_set=pc.unique(column)), -1))
