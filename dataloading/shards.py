"""Shards: plain tar files of encoded images, read by offset, written once and atomically.

A shard is a ustar archive `<split>-<number>.tar` of members `<key>.jpg` or `<key>.png` (readable
as WebDataset by others) with `<split>-<number>.parquet` beside it. The manifest names a member as
`shards/train-00012.tar#<offset>+<size>`. Building them is prepare/shard_build.py.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import resource
import socket
import stat
import tarfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from mlip.dataloading.ledger import BadSample, DataError, unreadable
from mlip.system.folder_lock import is_alive
from mlip.system.output_file import new_file, sync

MAX_MEMBER_BYTES = 64 << 20  # a 4096-pixel side at 16 bits is 32 MiB before compression
_BLOCK = 512  # of a tar file
_GROUP_ROWS = 1 << 20  # Arrow's own, said here so that a manifest's bytes stay what they were
# of the files that this process may open: an image of a shuffled epoch is of any shard, and a
# million images in shards of 4,096 are 245; beyond this each read opens its shard anew
_OPEN_SHARE, _MOST_OPEN = 4, 4096
_REFERENCE = re.compile(r"^(?P<shard>[^#\0]+\.tar)#(?P<offset>\d{1,15})\+(?P<size>\d{1,10})$")

INDEX_SCHEMA = pa.schema(
    [
        ("row", pa.int64()),  # data row of the collected manifest
        ("key", pa.string()),  # member name without suffix: a hash, never an identifier
        ("offset", pa.int64()),  # of the member's content in the tar, bytes; -1 where refused
        ("size", pa.int64()),  # bytes
        ("sha256", pa.string()),  # of the member's content
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("bits", pa.int8()),
        ("source_height", pa.int32()),
        ("source_width", pa.int32()),
        ("source_sha256", pa.string()),
        ("view", pa.string()),  # DICOM ViewPosition, "" where there is none
        ("sex", pa.string()),  # of the DICOM header, in the words of demographics.py; so is age
        ("age", pa.string()),
        ("reason", pa.string()),  # "" or why the file was refused
        ("notes", pa.list_(pa.string())),  # codes of what its reader noted
    ]
)

DEMOGRAPHICS = ("sex", "age")  # columns of index and manifest unless they are not wanted


def kept_columns(schema: pa.Schema, *, demographics: bool) -> pa.Schema:
    """The schema, or what it was before there were sex and age."""
    if demographics:
        return schema
    return pa.schema([field for field in schema if field.name not in DEMOGRAPHICS])


class ShardError(ValueError):
    """Shards that cannot be written or read; the message says what to do."""

    exit_code = 3


class Reference(NamedTuple):
    """One member, and as text what a manifest names it by; a tuple: one is made at every read."""

    shard: str  # path of the tar relative to the manifest's root
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.shard}#{self.offset}+{self.size}"


def parse_reference(text: str) -> Reference | None:
    """The parts of `path.tar#offset+size`, None for any other path."""
    match = _REFERENCE.match(text)
    if match is None:
        return None
    shard, offset, size = match.groups()
    return Reference(shard, int(offset), int(size))


class References:
    """The references of a manifest's image paths by row, parsed at the first read of each.

    Numbers in place of text: parsing and looking up the path had cost 9 us an image and epoch.
    Safe in threads; 20 bytes for every row that was read.
    """

    _made = itertools.count(1)

    def __init__(self, path_of: Callable[[int], str], rows: int) -> None:
        self.number = next(self._made)  # of the shards that its manifest was made with
        self._path_of = path_of
        self._shard = np.zeros(rows, np.int32)  # 0 = not looked at, 1 = no reference
        self._offset = np.zeros(rows, np.int64)
        self._size = np.zeros(rows, np.int64)
        self._names = ["", ""]
        self._numbers: dict[str, int] = {}
        self._lock = threading.Lock()

    def __getitem__(self, row: int) -> Reference | None:
        number = self._shard.item(row)
        if number == 0:
            number = self._parse(row)
        if number == 1:
            return None
        return Reference(self._names[number], self._offset.item(row), self._size.item(row))

    def _parse(self, row: int) -> int:
        reference = parse_reference(self._path_of(row))
        if reference is None:
            self._shard[row] = 1
            return 1
        with self._lock:
            number = self._numbers.setdefault(reference.shard, len(self._names))
            if number == len(self._names):
                self._names.append(reference.shard)
        self._offset[row], self._size[row] = reference.offset, reference.size
        self._shard[row] = number  # last: another thread may read as soon as it stands there
        return number


class _Descriptor:
    """A file descriptor that closes with its last reference: never under a thread that reads."""

    __slots__ = ("number",)

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        close(self.number)


class _Descriptors:
    """The most recently used shards' descriptors; safe in threads, os.pread shares no position.

    A manifest read anew is of other shards where the folder was made anew, under the same names.
    """

    def __init__(self) -> None:
        self._open: OrderedDict[tuple[int, str, str], _Descriptor] = OrderedDict()
        self._lock = threading.Lock()
        allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        if allowed == resource.RLIM_INFINITY:
            allowed = _OPEN_SHARE * _MOST_OPEN
        self._most = max(1, min(_MOST_OPEN, allowed // _OPEN_SHARE))

    def read(self, key: tuple[int, str, str], offset: int, size: int) -> tuple[bytes, bytes]:
        """A member's header and its content."""
        with self._lock:
            descriptor = self._open.get(key)
            if descriptor is None:
                descriptor = self._open[key] = _Descriptor(_open_inside(*key[1:]))
                while len(self._open) > self._most:
                    self._open.popitem(last=False)
            else:
                self._open.move_to_end(key)
        # another thread may drop it from the table in the meantime: the reference here keeps the
        # number from being closed and given to another file
        header = os.pread(descriptor.number, _BLOCK, offset - _BLOCK) if offset >= _BLOCK else b""
        return header, os.pread(descriptor.number, size, offset)

    def forget(self, key: tuple[int, str, str]) -> None:
        with self._lock:
            self._open.pop(key, None)


_descriptors = _Descriptors()


def _open_inside(root: str, shard: str) -> int:
    try:
        descriptor = os.open(os.path.join(root, shard), os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:
        if not os.path.isdir(root):
            raise DataError("the shard folder (data.root) is gone: mount or restore it") from None
        raise unreadable(error, "shard") from None
    # the descriptor's own path: no link can be swapped between this check and the read
    real = os.readlink(f"/proc/self/fd/{descriptor}")
    if not real.startswith(os.path.realpath(root).rstrip("/") + "/"):
        os.close(descriptor)
        raise DataError("its shard leads outside data.root through a link")
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise BadSample("not_a_file", "shard")
    return descriptor


def read_bytes(root: str, reference: str | Reference, references: int = 0) -> bytes:
    """The content of one member, by offset; threads and forked processes may share it.

    references  the number of the References it is from
    Raises:  BadSample (missing, no_permission, not_a_file, io_error, truncated, not_in_place,
             too_large, unsupported); DataError where the root is gone or a link leads out of it;
             LimitError.
    """
    parsed = parse_reference(reference) if isinstance(reference, str) else reference
    if parsed is None:
        raise BadSample("unsupported", "no shard reference of the form path.tar#offset+size")
    if parsed.size > MAX_MEMBER_BYTES:
        raise BadSample("too_large", f"{parsed.size} bytes")
    key = (references, root, parsed.shard)
    try:
        header, content = _descriptors.read(key, parsed.offset, parsed.size)
    except OSError as error:
        _descriptors.forget(key)
        raise unreadable(error, "shard") from None
    if len(content) != parsed.size:
        _descriptors.forget(key)
        raise BadSample("truncated", "the shard ends before the member does")
    if not _is_of_size(header, parsed.size):
        _descriptors.forget(key)
        raise BadSample("not_in_place", "the shard holds no member of this size at this place")
    return content


def _is_of_size(header: bytes, size: int) -> bool:
    """Whether a member's header says this size: of a shard that was made anew none is expected to
    stand where the manifest of before says."""
    field = header[124:136]
    if field == b"%011o\0" % size:  # as tarfile, GNU tar and bsdtar write it
        return True
    try:
        return int(field.strip(b" \0"), 8) == size
    except ValueError:
        return False


@dataclass(frozen=True)
class Member:
    offset: int
    size: int
    sha256: str


class ShardWriter:
    """The members of one tar file: equal ones in equal order give equal bytes, no owner, no clock.

    file  of synced_file
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._offset = 0

    def add(self, name: str, content: bytes) -> Member:
        """Where the content of the new member stands."""
        header = tarfile.TarInfo(name)
        header.size, header.mode = len(content), 0o644
        block = header.tobuf(tarfile.USTAR_FORMAT)
        padding = -len(content) % _BLOCK
        self._file.write(block + content + bytes(padding))
        offset = self._offset + len(block)
        self._offset = offset + len(content) + padding
        return Member(offset, len(content), hashlib.sha256(content).hexdigest())

    def finish(self) -> int:
        """Bytes of the whole archive."""
        return self._offset + self._file.write(bytes(2 * _BLOCK))


def remove_partials(folder: Path) -> None:
    """Removes what dead processes of this machine left half written."""
    for path in folder.glob(f".*.{socket.gethostname()}.*.part"):
        number = path.name.split(".")[-2]
        if number.isdecimal() and not is_alive(int(number)):
            path.unlink(missing_ok=True)


@contextmanager
def synced_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write that appears under its name, whole and synced, when the block ends well.

    Its owner alone may read it: manifests hold reports, shards images.
    """
    # two processes told to make the same file must not write into one
    partial = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.part")
    try:
        with os.fdopen(new_file(partial, 0o600), "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    sync(path.parent)


def write_table(table: pa.Table, path: Path) -> None:
    """A Parquet file that is complete or not there."""
    with synced_file(path) as file:
        pa.parquet.write_table(table, file, compression="zstd")


class TableWriter:
    """A Parquet file's tables as they come: the bytes that write_table gives of all of them."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._writer: pa.parquet.ParquetWriter | None = None
        self._waiting: list[pa.Table] = []

    def add(self, table: pa.Table) -> None:
        """Tables of one schema; at most _GROUP_ROWS rows wait in memory."""
        self._waiting.append(table)
        if sum(map(len, self._waiting)) >= _GROUP_ROWS:
            self._write(whole_groups=True)

    def close(self) -> None:
        self._write(whole_groups=False)
        if self._writer is not None:
            self._writer.close()

    def _write(self, *, whole_groups: bool) -> None:
        if not self._waiting:
            return
        table = pa.concat_tables(self._waiting)
        last = len(table) - len(table) % _GROUP_ROWS if whole_groups else len(table)
        self._waiting = [table.slice(last)] if last < len(table) else []
        if self._writer is None:
            self._writer = pa.parquet.ParquetWriter(self._file, table.schema, compression="zstd")
        self._writer.write_table(table.slice(0, last).combine_chunks(), _GROUP_ROWS)


def index_path(shard: Path) -> Path:
    return shard.with_suffix(".parquet")


def is_complete(shard: Path, fingerprint: str, *, verify: bool) -> bool:
    """Whether a shard stands there whole, made from the same sources with the same settings.

    verify=True reads every member and compares its hash.
    """
    try:
        index = pa.parquet.read_table(index_path(shard))
        metadata = index.schema.metadata or {}
        size = shard.stat().st_size
    except (OSError, pa.ArrowException):
        return False
    if metadata.get(b"fingerprint") != fingerprint.encode():
        return False
    if metadata.get(b"tar_bytes") != str(size).encode():
        return False
    if verify:
        with open(shard, "rb") as file:
            columns = (index.column(name).to_pylist() for name in ("offset", "size", "sha256"))
            for offset, length, sha256 in zip(*columns, strict=True):
                if offset < 0:
                    continue
                file.seek(offset)
                if hashlib.sha256(file.read(length)).hexdigest() != sha256:
                    return False
    return True
