"""The tables beside shards: written a shard at a time, the bytes those of all at once."""

from __future__ import annotations

import csv
import hashlib
import io
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from mlip.dataloading import shards
from mlip.dataloading.datasets.rows import Row
from mlip.dataloading.images.perceptual_hash import BITS, HASHES
from mlip.dataloading.images.same_pictures import HASHES_FILE
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


SIZES = {"height": 3, "width": 4, "bits": 12, "source_height": 5, "source_width": 6}
ONE, TWO = (bytes([i]) * (BITS // 8) for i in (1, 2))
FILMS = [
    Row("a.png", "p0", "s0", "i0", "train", view="PA", sex="F", age="40", report="Clear."),
    Row("b.png", "p1", "s1", "i1", "val"),
    Row("MRN7/c.dcm", "p2", "s2", "i2", "test"),
    Row("d.png", "p3", "", "i3", "test", sex="M", age="50"),
]


def entry(row: int, **more: Any) -> dict[str, Any]:
    told = {"shard": "s.tar", "offset": row, "size": 9, "sha256": f"{row}" * 64, "view": ""}
    return {"row": row, "key": f"k{row}", "reason": "", **told, **SIZES, **more}


def table_of(entries: list[dict[str, Any]], hashes: list[list[bytes]] | None = None) -> pa.Table:
    made = pa.Table.from_pylist(entries)
    if hashes is None:
        return made
    return made.append_column(HASHES, pa.array(hashes, pa.list_(pa.binary())))


def written(out: Path, salt: str | None, *, header_first: bool = False) -> Counter[str]:
    """Two shards' tables in `out`, of which the second is of a version without hashes; notes."""
    first = [
        entry(0, view="LATERAL", sex="M", age="45"),
        entry(2, reason="undecodable", sex="", age=""),
        entry(1, view="AP", sex="O", age="60"),
    ]
    noted: Counter[str] = Counter()
    out.mkdir()
    with outputs(FILMS, out, salt, noted, header_first=header_first) as write:
        write(table_of(first, [[ONE, TWO], [], []]))
        write(table_of([entry(3, sex="F", age="")]))
    return noted


def read(path: Path) -> list[dict[str, Any]]:
    return list(pa.parquet.read_table(path).to_pylist())


def test_a_row_has_what_its_table_says_and_else_what_its_file_says(tmp_path: Path) -> None:
    assert written(tmp_path / "a", None) == {"sex_unlike_table": 2, "age_unlike_table": 1}
    rows = read(tmp_path / "a" / "manifest.parquet")
    told = ["image_id", "patient_id", "study_id", "split", "view", "sex", "age", "report"]
    assert [[row[name] for name in told] for row in rows] == [
        ["i0", "p0", "s0", "train", "PA", "F", "40", "Clear."],
        ["i1", "p1", "s1", "val", "AP", "O", "60", ""],
        ["i3", "p3", "", "test", "", "M", "50", ""],
    ]
    assert [(row["image"], row["sha256"]) for row in rows] == [
        (f"s.tar#{i}+9", f"{i}" * 64) for i in (0, 1, 3)
    ]
    assert [{name: row[name] for name in SIZES} for row in rows] == [SIZES] * 3
    by_header = written(tmp_path / "b", None, header_first=True)
    assert by_header == {"sex_unlike_table": 2, "age_unlike_table": 1}
    rows = read(tmp_path / "b" / "manifest.parquet")
    assert [(r["sex"], r["age"]) for r in rows] == [("M", "45"), ("O", "60"), ("F", "50")]


def test_beside_the_manifest_stand_index_hashes_and_refused_files(tmp_path: Path) -> None:
    for name, salt, image in (("a", None, "MRN7/c.dcm"), ("b", "salt", "")):
        out = tmp_path / name
        written(out, salt)
        with (out / "refused.csv").open(newline="") as file:
            head, *refused = csv.reader(file)
        assert head == ["row", "key", "split", "reason", "image"]
        assert refused == [["2", "k2", "test", "undecodable", image]]
        assert (out / "refused.csv").stat().st_mode & 0o777 == 0o600
        index = read(out / "index.parquet")
        assert [row["row"] for row in index] == [0, 2, 1, 3] and HASHES not in index[0]
        rows = read(out / "manifest.parquet")
        # of the second shard nothing is known, of a film without a hash that it has none
        images = [rows[i]["image"] for i in (0, 0, 1)]
        found = [(film["image"], film["hash"]) for film in read(out / HASHES_FILE)]
        assert found == list(zip(images, [ONE, TWO, None], strict=True))
    assert [row["image_id"] for row in rows] == ["k0", "k1", "k3"]
    assert [row["patient_id"] for row in rows] == [
        hashed(f"p{i}", "patient", "salt") for i in "013"
    ]
    assert [row["study_id"] for row in rows[:2]] == [hashed(f"s{i}", "study", "salt") for i in "01"]
    assert rows[2]["study_id"] == ""


def test_sex_and_age_are_columns_where_they_are_wanted(tmp_path: Path) -> None:
    with outputs(FILMS, tmp_path, None, Counter()) as write:
        write(table_of([entry(0)]))
    names = read(tmp_path / "manifest.parquet")[0].keys()
    assert "view" in names and not {"sex", "age"} & names


def test_what_a_table_calls_not_stated_is_counted_with_what_it_leaves_blank(tmp_path: Path) -> None:
    """The one count took the place of the other."""
    views = ["not stated", "", None, "LL", "AP", *(f"own {i}" for i in range(9))]
    ages = ["not stated", "", None, *["50"] * 11]
    pa.parquet.write_table(pa.table({"view": views, "age": ages}), tmp_path / "m.parquet")
    told, projections, age = grouping_lines(tmp_path / "m.parquet")
    assert told == "view: other names 9, not stated 3, LL 1, AP 1"
    assert projections == "projections: OTHER 9, not stated 3, AP 1, LATERAL 1"
    assert age == "age: stated for 11 of 14"


def test_a_study_without_a_name_has_none_when_ids_are_hashed() -> None:
    """Or all of them would be one study, of one id."""
    assert hashed("", "study", "salt") == ""
    assert {len(hashed("s1", level, "salt")) for level in ("patient", "study")} == {16}
    assert hashed("s1", "patient", "salt") != hashed("s1", "study", "salt")
    # prepared again with the same salt, a set has the same ids
    content = b"salt\0study\0" + b"\xed\xb3\xbf1"  # a byte that is no UTF-8 in a name
    assert hashed("\udcff1", "study", "salt") == hashlib.sha256(content).hexdigest()[:16]
