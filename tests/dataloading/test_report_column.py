"""Report texts kept compressed against plain lists; a large manifest starts in bounded memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest

from mlip.dataloading.reports.column import TextStore
from mlip.dataloading.tables.table import read_table

ROWS = 60_000
MIB = 1 << 20


def _texts(count: int) -> list[str]:
    rng = np.random.default_rng(3)
    words = ["effusion", "Lungen", "\u00e9panchement", "", "no", "\U0001fac1", "\x00"]
    lengths = rng.integers(0, 12, count)
    return [" ".join(words[j] for j in rng.integers(0, len(words), n)) for n in lengths]


@pytest.mark.parametrize("pieces", [(0,), (1,), (31,), (32,), (33,), (5, 0, 70, 31, 1, 400)])
def test_a_store_gives_back_every_text_whatever_the_pieces_it_came_in(pieces: tuple) -> None:
    texts, store, first = _texts(sum(pieces)), TextStore(), 0
    for count in pieces:
        # a slice with texts before and after it: offsets do not start at zero
        array = pa.array(["before", *texts[first : first + count], "after"], pa.large_string())
        store.append(array[1 : 1 + count])
        first += count
    assert len(store) == len(texts) and list(store) == texts
    order = np.random.default_rng(1).permutation(len(texts)).tolist()
    assert [store[row] for row in order] == [texts[row] for row in order]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(store.__getitem__, order)) == [texts[row] for row in order]
    for outside in (-1, len(texts)):
        with pytest.raises(IndexError):
            store[outside]


def test_null_texts_and_groups_without_any_character_are_empty() -> None:
    store = TextStore()
    store.append(pa.nulls(100, pa.large_string()))
    assert list(store) == [""] * 100


class _Kept(list[pa.Array]):
    """Takes a column's pieces."""


@pytest.mark.parametrize("longest", [90, 3000])
def test_pieces_taken_while_reading_are_the_column_that_reading_it_whole_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, longest: int
) -> None:
    """Also where a row is longer than a small block, so that reading starts again."""
    monkeypatch.setattr("mlip.dataloading.tables.table._SMALL_BLOCK_BYTES", 2048)
    monkeypatch.setattr("mlip.dataloading.tables.table._BLOCK_BYTES", 8192)
    monkeypatch.setattr("mlip.dataloading.tables.table._ROWS_AT_ONCE", 100)
    texts = [f"Text {i} with\na line break, {'x' * (i % 90)}" for i in range(1000)]
    texts[700] += "y" * longest
    table = pa.table({"image": [f"{i}.png" for i in range(1000)], "report": texts})
    pyarrow.csv.write_csv(table, tmp_path / "m.csv")
    pyarrow.parquet.write_table(table, tmp_path / "m.parquet")
    lines = [json.dumps(row) for row in table.to_pylist()]
    (tmp_path / "m.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for name in ("m.csv", "m.parquet", "m.jsonl"):
        taken, wanted = _Kept(), {"image": "image", "report": "report"}
        columns, _ = read_table(tmp_path / name, wanted, {"report": taken})
        assert list(columns) == ["image"]
        assert columns["image"].to_pylist() == table["image"].to_pylist()
        assert [t for piece in taken for t in piece.to_pylist()] == texts and len(taken) > 2, name


def test_a_manifest_takes_less_memory_than_its_file_has_bytes(
    tmp_path: Path,
) -> None:
    """Peak resident memory of a process of its own, above what its imports take."""
    path = tmp_path / "m.csv"
    sentence = "There is a small left pleural effusion. The heart size is normal. "
    with open(path, "w", encoding="utf-8") as file:
        file.write("image,report,patient_id,study_id,split\n")
        for i in range(ROWS):
            text = f"Film {i}. {sentence * 18} Compared with film {i * 7919 % ROWS}."
            file.write(f"{i}.png,{text},p{i},s{i},train\n")
    program = (
        "import resource, sys\n"
        "from mlip.settings import config\n"
        "from mlip.dataloading.manifest import load_manifest\n"
        "import scipy.sparse.csgraph\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "before = peak()\n"
        "manifest = load_manifest(config.load([], ['data.manifest=' + sys.argv[1]]).data)\n"
        "print(peak() - before, manifest.text(len(manifest) - 1)[:10])\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", program, str(path)]
    printed = subprocess.run(
        command, check=True, capture_output=True, text=True, env=environment
    ).stdout.split(maxsplit=1)
    assert printed[1].strip() == f"Film {ROWS - 1}"
    # read whole, the texts alone would take as much; 32 blocks ahead are half of this bound
    size = path.stat().st_size
    assert size > 70 * MIB and int(printed[0]) < 0.8 * size, f"{int(printed[0]) / MIB:.0f} MiB"
