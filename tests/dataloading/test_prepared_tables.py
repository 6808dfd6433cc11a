"""The tables beside shards: written a shard at a time, the bytes those of all at once."""

from __future__ import annotations

import io
import tracemalloc
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from mlip.dataloading import shards
from mlip.dataloading.datasets.rows import Row
from mlip.dataloading.prepare.tables import grouping_lines, hashed, outputs

PARTS = (3, 7, 0, 8, 25, 1)  # rows of each


@pytest.mark.parametrize("group", [10, 1 << 20])
def test_a_file_written_in_parts_is_that_of_the_whole_table(
    group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "_GROUP_ROWS", group)
    whole = pa.table({"text": [f"report {i % 5}" for i in range(44)], "n": list(range(44))})
    at_once, in_parts = io.BytesIO(), io.BytesIO()
    pa.parquet.write_table(whole, at_once, compression="zstd", row_group_size=group)
    writer, start = shards.TableWriter(in_parts), 0
    for rows in PARTS:
        writer.add(whole.slice(start, rows))
        assert sum(map(len, writer._waiting)) < group
        start += rows
    writer.close()
    assert in_parts.getvalue() == at_once.getvalue()


def test_cells_are_objects_a_shard_at_a_time(tmp_path: Path) -> None:
    rows = [Row(f"{i}.png", f"p{i}", f"s{i}", f"i{i}", "train") for i in range(8_000)]
    sizes = ("bits", "height", "width", "source_height", "source_width")
    tracemalloc.start()
    with outputs(rows, tmp_path, "salt", Counter()) as write:
        for first in range(0, len(rows), 200):
            places = range(first, first + 200)
            entry = {"shard": "s.tar", "offset": 1, "size": 2, "sha256": "a" * 64, "view": ""}
            entries = [{**entry, "row": place, "key": f"{place}", "reason": ""} for place in places]
            write(pa.Table.from_pylist([{**e, **dict.fromkeys(sizes, 8)} for e in entries]))
        _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1e6  # 8,000 rows of Python objects are more than 1e7
    table = pa.parquet.read_table(tmp_path / "manifest.parquet")
    assert table.column("image_id").to_pylist() == [f"{i}" for i in range(8_000)]
    assert table.column("patient_id")[0].as_py() not in ("", "p0")
    assert len((tmp_path / "refused.csv").read_text().splitlines()) == 1


def test_what_a_table_calls_not_stated_is_counted_with_what_it_leaves_blank(tmp_path: Path) -> None:
    """The one count took the place of the other."""
    views = ["not stated", "", None, "AP", "LL", *(f"own {i}" for i in range(9))]
    ages = ["not stated", "", None, *["50"] * 11]
    pa.parquet.write_table(pa.table({"view": views, "age": ages}), tmp_path / "m.parquet")
    told, projections, age = grouping_lines(tmp_path / "m.parquet")
    assert told == "view: not stated 3, AP 1, LL 1, " + ", ".join(f"own {i} 1" for i in range(5))
    assert projections == "projections: OTHER 9, not stated 3, AP 1, LATERAL 1"
    assert age == "age: stated for 11 of 14"


def test_a_study_without_a_name_has_none_when_ids_are_hashed() -> None:
    """Or all of them would be one study, of one id."""
    assert hashed("", "study", "salt") == ""
    assert {len(hashed("s1", level, "salt")) for level in ("patient", "study")} == {16}
    assert hashed("s1", "patient", "salt") != hashed("s1", "study", "salt")
