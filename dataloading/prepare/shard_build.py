"""Collected rows -> shards, index and manifest: resumable, parallel, every row accounted for.

A shard is a fixed range of rows of one split, so any process can make any shard; a finished one
carries a fingerprint of its settings and sources and is never made twice. Whoever finds all shards
finished writes the index, the manifest and the list of refused files.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet

from mlip.dataloading.datasets.rows import Row
from mlip.dataloading.images.image_file import read_bytes
from mlip.dataloading.images.perceptual_hash import HASHES
from mlip.dataloading.images.same_pictures import HASHES_FILE
from mlip.dataloading.ledger import BadSample, DataError
from mlip.dataloading.name_forms import as_it_lies, on_disk
from mlip.dataloading.prepare.duplicates import DUPLICATES_FILE, with_hashes
from mlip.dataloading.prepare.shard_worker import ImageSettings
from mlip.dataloading.prepare.tables import outputs
from mlip.dataloading.prepare.worker_pool import Reply, WorkerPool
from mlip.dataloading.progress import Progress
from mlip.dataloading.shards import (
    DEMOGRAPHICS,
    INDEX_SCHEMA,
    ShardError,
    ShardWriter,
    index_path,
    is_complete,
    kept_columns,
    remove_partials,
    synced_file,
    write_table,
)
from mlip.system.machine import LimitError

# part of every fingerprint: raise it when the pixels of a member change, or what is refused.
# 3: padding, VOI tables, windows, cut streams and requisitions are read as since 2026-11-27
FORMAT = 3
OUTPUTS = (
    *("prepared.json", "manifest.parquet", "index.parquet", "refused.csv"),
    *(HASHES_FILE, DUPLICATES_FILE),
)
PASSING = ("missing", "io_error")  # reasons that may be none at the next look
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Plan:
    """Everything that decides what the shards hold."""

    root: Path
    out: Path
    settings: ImageSettings
    salt: str
    keep_ids: bool
    shard_images: int = 4096
    workers: int = 1
    timeout_s: float = 10.0
    part: tuple[int, int] = (0, 1)  # this process makes shards with number % n == i
    verify: bool = False  # read finished shards again and compare every hash
    header_first: bool = False  # a DICOM header tells sex and age before the row does


@dataclass(frozen=True)
class Result:
    shards: int
    made: int  # by this call
    complete: bool  # all shards of all parts
    images: int  # members in finished shards
    member_bytes: int
    refused: Counter[str]  # reason -> files, over finished shards
    noted: Counter[str]  # code -> films that were taken, over finished shards


@dataclass(frozen=True)
class _Shard:
    path: Path
    rows: range  # places in the list of rows
    number: int


def build_shards(
    rows: list[Row], plan: Plan, progress: Callable[[int, int], None] | None = None
) -> Result:
    """Makes the shards of plan.part that are missing, then the manifest once all are there.

    rows are sorted by split here; places in that order are the index's `row`.

    Raises:  ShardError where the disk is full or not writable, or plan.root goes away; LimitError
             where a worker meets a limit of the machine; finished shards stay whole.
    """
    order = {"train": 0, "val": 1, "test": 2}
    rows = sorted(rows, key=lambda row: order[row.split])
    keys = member_keys(rows, plan.salt)
    folder = plan.out / "shards"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    remove_partials(folder)
    remove_partials(plan.out)
    shards = list(_cut(rows, folder, plan.shard_images))
    told = Progress("shards compared with their sources")
    prints, missing = [], []
    for shard in shards:
        told(shard.number, len(shards))
        prints.append(_fingerprint(rows, shard, plan))
        is_mine = shard.number % plan.part[1] == plan.part[0]
        if is_mine and (
            not is_complete(shard.path, prints[-1], verify=plan.verify)
            or _can_have_more(shard, rows, plan)
        ):
            missing.append(shard)
    try:
        if missing:
            # an older manifest would name places in shards that are about to be replaced
            for name in OUTPUTS:
                (plan.out / name).unlink(missing_ok=True)
            _make(rows, keys, missing, prints, plan, progress)
        made = {shard.number for shard in missing}
        complete = all(
            is_complete(shard.path, prints[shard.number], verify=False)
            for shard in shards
            if shard.number not in made
        )
        _remove_strangers(folder, shards)
        return _finish(rows, keys, shards, plan, len(missing), complete)
    except OSError as error:
        raise _explained(error, plan) from error


def member_keys(rows: list[Row], salt: str) -> list[str]:
    """Sixteen hex digits an image: the member's name, which tells nothing without the salt."""
    keys = [
        hashlib.sha256(f"{salt}\0image\0{row.image_id}".encode(errors="surrogatepass")).hexdigest()[
            :16
        ]
        for row in rows
    ]
    if len(set(keys)) != len(keys):
        raise ShardError(
            f"{len(keys) - len(set(keys))} image ids occur more than once: expected one row an "
            "image"
        )
    return keys


def _cut(rows: list[Row], folder: Path, size: int) -> Iterator[_Shard]:
    number, start = 0, 0
    while start < len(rows):
        split, stop, first = rows[start].split, start, start
        while stop < len(rows) and rows[stop].split == split:
            stop += 1
        for index, begin in enumerate(range(first, stop, size)):
            places = range(begin, min(begin + size, stop))
            yield _Shard(folder / f"{split}-{index:05d}.tar", places, number)
            number += 1
        start = stop


def _fingerprint(rows: list[Row], shard: _Shard, plan: Plan) -> str:
    """Of the settings and of every source file's name, size and time."""
    digest = hashlib.sha256(f"{FORMAT} {plan.settings.to_json()} {plan.salt}".encode())
    root = os.fsencode(plan.root)
    for place in shard.rows:
        row = rows[place]
        try:
            path = os.path.join(root, on_disk(row.image))
            if not os.path.lexists(path) and (lies := as_it_lies(root, on_disk(row.image))):
                path = os.path.join(root, lies)
            status = os.stat(path)
            state = f"{status.st_size} {status.st_mtime_ns}"
            # a change of mode leaves size and time as they are
            if not os.access(path, os.R_OK):
                state += " unreadable"
        except (OSError, ValueError):
            state = "absent"
        line = f"{row.image}\0{row.image_id}\0{row.sha256}\0{state}\n"
        digest.update(line.encode(errors="surrogatepass"))
    return digest.hexdigest()


def _can_have_more(shard: _Shard, rows: list[Row], plan: Plan) -> bool:
    """Whether a file was given up after less time than it may take now, or was gone or out of reach
    and is there: the fingerprint was taken before a network's folder went away."""
    index = pa.parquet.read_table(index_path(shard.path), columns=["reason"])
    reasons = index.column("reason").to_pylist()
    given = (index.schema.metadata or {}).get(b"timeout_s")
    if given is not None and float(given) < plan.timeout_s and "timeout" in reasons:
        return True
    gone = [p for p, reason in zip(shard.rows, reasons, strict=True) if reason in PASSING]
    return any(_can_be_read(plan.root, rows[place].image) for place in gone)


def _can_be_read(root: Path, image: str) -> bool:
    try:
        return bool(read_bytes(str(root), image))
    except (BadSample, DataError):
        return False


def _make(
    rows: list[Row],
    keys: list[str],
    missing: list[_Shard],
    prints: list[str],
    plan: Plan,
    progress: Callable[[int, int], None] | None,
) -> None:
    items = (
        {"image": rows[place].image, "sha256": rows[place].sha256}
        for shard in missing
        for place in shard.rows
    )
    start = json.dumps({"root": str(plan.root), "settings": asdict(plan.settings)})
    total, done = sum(len(shard.rows) for shard in missing), 0
    suffix = "jpg" if plan.settings.codec == "jpeg" else "png"
    module = "mlip.dataloading.prepare.shard_worker"
    with WorkerPool(module, start, plan.workers, plan.timeout_s) as pool:
        replies = pool.ordered(items)
        for shard in missing:
            index_path(shard.path).unlink(missing_ok=True)
            with synced_file(shard.path) as file:
                writer = ShardWriter(file)
                entries = []
                for place in shard.rows:
                    reply = next(replies)
                    if reply.fields.get("reason") == "missing" and not plan.root.is_dir():
                        raise ShardError(
                            f"{plan.root}: the folder of the images is gone: mount or restore it "
                            "and run the same command again; finished shards are whole"
                        )
                    if limit := reply.fields.get("limit"):
                        raise LimitError(
                            f"{limit}; finished shards are whole: run the same command again"
                        )
                    entries.append(_entry(place, keys[place], suffix, reply, plan, writer))
                    done += 1
                    if progress is not None:
                        progress(done, total)
                size = writer.finish()
            columns = kept_columns(INDEX_SCHEMA, demographics=plan.settings.demographics)
            # here alone: what lies beside the shards is what it was before there were hashes
            columns = columns.append(pa.field(HASHES, pa.list_(pa.binary())))
            schema = columns.with_metadata(
                {
                    "fingerprint": prints[shard.number],
                    "tar_bytes": str(size),
                    "timeout_s": str(plan.timeout_s),
                }
            )
            write_table(pa.Table.from_pylist(entries, schema=schema), index_path(shard.path))


def _entry(
    place: int, key: str, suffix: str, reply: Reply, plan: Plan, writer: ShardWriter
) -> dict[str, Any]:
    fields = reply.fields
    reason = reply.fault or fields["reason"]
    entry: dict[str, Any] = {
        "row": place,
        "key": key,
        "offset": -1,
        "size": 0,
        "sha256": "",
        "bits": plan.settings.bits,
        "source_sha256": fields.get("source_sha256", ""),
        "reason": reason,
        "notes": fields.get("notes", []),
        HASHES: [bytes.fromhex(bits) for bits in fields.get("hashes", [])],
    }
    for name in ("height", "width", "source_height", "source_width"):
        entry[name] = fields.get(name, 0)
    for name in ("view", *DEMOGRAPHICS):
        entry[name] = fields.get(name, "")
    if not reason:
        member = writer.add(f"{key}.{suffix}", reply.content)
        entry.update(offset=member.offset, size=member.size, sha256=member.sha256)
    return entry


def _remove_strangers(folder: Path, shards: list[_Shard]) -> None:
    """Finished shards of an earlier, longer list of rows; half-written files stay for others."""
    wanted = {shard.path.name for shard in shards}
    for path in folder.glob("*-?????.tar"):
        index = index_path(path)
        if path.name in wanted or not index.exists():
            continue
        if b"fingerprint" in (pa.parquet.read_schema(index).metadata or {}):
            path.unlink(missing_ok=True)
            index.unlink(missing_ok=True)


def _finish(
    rows: list[Row], keys: list[str], shards: list[_Shard], plan: Plan, made: int, complete: bool
) -> Result:
    refused: Counter[str] = Counter()
    noted: Counter[str] = Counter()
    images = member_bytes = 0
    salt = None if plan.keep_ids else plan.salt
    complete = complete and all(index_path(shard.path).exists() for shard in shards)
    first = plan.header_first
    made_of = outputs(rows, plan.out, salt, noted, header_first=first)
    with made_of if complete else nullcontext() as write:
        for shard in shards:
            if not index_path(shard.path).exists():
                continue
            index = _read_index(shard)
            if write is not None:
                index = with_hashes(_placed(index, shard, keys), shard.path)
            refused.update(reason for reason in index.column("reason").to_pylist() if reason)
            taken = index.filter(pc.greater_equal(index.column("offset"), 0))
            for notes in taken.column("notes").to_pylist():
                noted.update(notes)
            images += len(taken)
            member_bytes += sum(index.column("size").to_pylist())
            if write is not None:
                name = f"shards/{shard.path.name}"
                write(index.append_column("shard", pa.array([name] * len(index))))
    return Result(len(shards), made, complete, images, member_bytes, refused, noted)


def _read_index(shard: _Shard) -> pa.Table:
    return pa.parquet.read_table(index_path(shard.path)).replace_schema_metadata(None)


def _placed(index: pa.Table, shard: _Shard, keys: list[str]) -> pa.Table:
    """The shard's index with `row` as of now: a row more in an earlier split moves all later ones.

    Raises:  ShardError where the index is not of these rows; the image would get another's report.
    """
    if index.column("key").to_pylist() != [keys[place] for place in shard.rows]:
        raise ShardError(
            f"{index_path(shard.path)}: is not the index of its shard: remove it and run the same "
            "command again"
        )
    place = index.schema.get_field_index("row")
    return index.set_column(place, index.schema.field(place), pa.array(shard.rows, pa.int64()))


def _explained(error: OSError, plan: Plan) -> ShardError:
    if error.errno in _FULL:
        free = shutil.disk_usage(plan.out).free
        return ShardError(
            f"{plan.out}: the disk or quota is full ({free >> 20} MiB free): finished shards are "
            "whole, the unfinished one was removed; make room and run the same command again"
        )
    return ShardError(
        f"{plan.out}: cannot be written: {error.strerror}. Finished shards are whole; mend it and "
        "run the same command again"
    )
