"""What stands beside shards: the index, the manifest and the list of refused files."""

from __future__ import annotations

import csv
import hashlib
import io
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mlip.dataloading.datasets.rows import Row
from mlip.dataloading.demographics import differs
from mlip.dataloading.images.perceptual_hash import HASHES
from mlip.dataloading.images.same_pictures import HASHES_FILE, hash_table
from mlip.dataloading.shards import (
    DEMOGRAPHICS,
    Reference,
    TableWriter,
    kept_columns,
    synced_file,
)
from mlip.dataloading.view_position import PROJECTIONS, is_view_name, projection

_TEXTS = (
    "image image_id patient_id study_id split view sex age report labels uncertain negative boxes "
    "mask subset sha256"
).split()
_NOTHING = "not stated"
_MOST_TOLD = 8  # views
_SIZES = ("height", "width", "bits", "source_height", "source_width")
_MANIFEST_SCHEMA = pa.schema(
    [*((name, pa.string()) for name in _TEXTS), *((name, pa.int64()) for name in _SIZES)]
)


@contextmanager
def outputs(
    rows: list[Row], out: Path, salt: str | None, noted: Counter[str], *, header_first: bool = False
) -> Iterator[Callable[[pa.Table], None]]:
    """Takes the shards' indexes in order; index, manifest, the films' perceptual hashes and
    refused.csv are there at the end.

    A shard at a time: as Python objects the cells of a million rows are 2 GB.
    salt    of the ids, which are written hashed; None = as they are
    noted   gets how many films' headers tell another sex or age than the row
    header_first  sex and age are the header's where it tells them, else the row's first
    """
    refused: list[list[Any]] = [["row", "key", "split", "reason", "image"]]
    with (
        synced_file(out / "manifest.parquet") as manifest_file,
        synced_file(out / "index.parquet") as index_file,
        closing(TableWriter(manifest_file)) as manifest,
        synced_file(out / HASHES_FILE) as hashes_file,
        closing(TableWriter(index_file)) as indexes,
        closing(TableWriter(hashes_file)) as hashes,
    ):

        def write(index: pa.Table) -> None:
            known: list[list[bytes]] = []
            if HASHES in index.column_names:
                known = index.filter(pc.equal(index["reason"], ""))[HASHES].to_pylist()
                index = index.drop_columns([HASHES])
            indexes.add(index)
            part = _manifest_part(rows, index, salt, refused, noted, header_first)
            manifest.add(part)
            hashes.add(hash_table(part["image"].to_pylist()[: len(known)], known))

        yield write
    write_csv(refused, out / "refused.csv")


def _manifest_part(
    rows: list[Row],
    index: pa.Table,
    salt: str | None,
    refused: list[list[Any]],
    noted: Counter[str],
    header_first: bool,
) -> pa.Table:
    """The manifest's rows of a shard; its refused ones are added to the list.

    Sex and age are in it where they are in the index.
    """
    schema = kept_columns(_MANIFEST_SCHEMA, demographics="sex" in index.column_names)
    columns: dict[str, list[Any]] = {field.name: [] for field in schema}
    names = [field.name for field in fields(Row)]
    for entry in index.to_pylist():
        row = rows[entry["row"]]
        if entry["reason"]:
            image = row.image if salt is None else ""
            refused.append([entry["row"], entry["key"], row.split, entry["reason"], image])
            continue
        # not asdict: its deep copies took 0.2 ms a row
        values = {name: getattr(row, name) for name in names}
        values["image"] = str(Reference(entry["shard"], entry["offset"], entry["size"]))
        values["sha256"] = entry["sha256"]
        values["view"] = values["view"] or entry["view"]
        for name in DEMOGRAPHICS:
            told = values[name], entry.get(name, "")
            if differs(name, *told):
                noted[f"{name}_unlike_table"] += 1
            values[name] = (told[1] or told[0]) if header_first else (told[0] or told[1])
        if salt is not None:
            values["image_id"] = entry["key"]
            for level in ("patient", "study"):
                values[f"{level}_id"] = hashed(values[f"{level}_id"], level, salt)
        for name in _SIZES:
            values[name] = entry[name]
        for name, column in columns.items():
            column.append(values[name])
    return pa.table(columns, schema=schema)


def grouping_lines(manifest: Path) -> list[str]:
    """What evaluations may group a manifest's images by: views, their projections and sexes
    counted, ages stated."""
    names = [n for n in ("view", *DEMOGRAPHICS) if n in pq.read_schema(manifest).names]
    table = pq.read_table(manifest, columns=names)
    lines = []
    for name in names:
        found: Counter[str] = Counter()
        for row in pc.value_counts(table[name]).to_pylist():
            found[row["values"] or _NOTHING] += row["counts"]  # a table may have the words too
        if name == "age":
            lines.append(f"age: stated for {len(table) - found[_NOTHING]} of {len(table)}")
        else:
            told = told_views(found) if name == "view" else _counted(found)
            lines.append(f"{name}: {told}")
        if name == "view":
            of = Counter(dict.fromkeys(PROJECTIONS, 0))
            for view, count in found.items():
                of[projection(view)] += count
            told = ", ".join(f"{p or _NOTHING} {count}" for p, count in of.most_common() if count)
            lines.append(f"projections: {told}")
    return lines


def told_views(found: Mapping[str, int]) -> str:
    """Known names of views and how many films have each, and how many have another one, which may
    be anything: an address with a patient's id in it."""
    told: Counter[str] = Counter()
    for view, count in found.items():
        told[(view if is_view_name(view) else "other names") or _NOTHING] += count
    return _counted(told)


def _counted(found: Counter[str]) -> str:
    return ", ".join(f"{value} {count}" for value, count in found.most_common(_MOST_TOLD))


def write_csv(rows: list[list[Any]], path: Path) -> None:
    """A CSV file that is complete or not there, readable by its owner alone."""
    with synced_file(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", newline="")
        csv.writer(text).writerows(rows)
        text.detach()


def hashed(text: str, level: str, salt: str) -> str:
    """Sixteen hex digits for an identifier; without the salt nobody can test a guess."""
    if not text:
        return ""
    content = f"{salt}\0{level}\0{text}".encode(errors="surrogatepass")
    return hashlib.sha256(content).hexdigest()[:16]
