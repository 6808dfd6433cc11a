"""Small files that ask for hours or gigabytes: refused in seconds, in the memory of a large film.

Oracles: processor time and the peak of a process of its own; each file took minutes before.
"""

from __future__ import annotations

import gzip
import os
import resource
import signal
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import imagecodecs
import numpy as np
import pytest

from mlip.dataloading.datasets import rows
from mlip.dataloading.datasets.rows import DatasetError
from mlip.dataloading.dicom.jpeg2000 import checked_size
from mlip.dataloading.dicom.radiograph import check_phi, read_identity
from mlip.dataloading.images.image_file import decode_grey, read_header

BIG = 16 << 20
IMPLICIT, RLE = "1.2.840.10008.1.2", "1.2.840.10008.1.2.5"
JPEG, JPEG2000 = "1.2.840.10008.1.2.4.51", "1.2.840.10008.1.2.4.90"


def element(group: int, number: int, value: bytes) -> bytes:
    return struct.pack("<HHI", group, number, len(value)) + value


def item(content: bytes) -> bytes:
    return element(0xFFFE, 0xE000, content)


def film(front: bytes = b"", **changes: bytes) -> bytes:
    """A film of 16 x 16 pixels in implicit VR; `front` stands among its attributes."""
    short = {"Rows": (16, 0x10), "Columns": (16, 0x11), "Allocated": (8, 0x100)}
    short |= {"Stored": (8, 0x101), "High": (7, 0x102), "Sign": (0, 0x103)}
    body = element(0x28, 2, b"\1\0") + element(0x28, 4, b"MONOCHROME2 ")
    for name, (value, number) in short.items():
        body += element(0x28, number, changes.get(name, struct.pack("<H", value)))
    return _meta(IMPLICIT) + body + front + element(0x7FE0, 0x10, bytes(range(256)))


def compressed(frame: bytes, side: int, syntax: str) -> bytes:
    """A film of one compressed frame, 8 bits deep."""
    numbers = {2: 1, 0x10: side, 0x11: side, 0x100: 8, 0x101: 8, 0x102: 7, 0x103: 0}
    body = struct.pack("<HH2sH", 0x28, 4, b"CS", 12) + b"MONOCHROME2 "
    for number, value in numbers.items():
        body += struct.pack("<HH2sHH", 0x28, number, b"US", 2, value)
    frame += bytes(len(frame) % 2)
    end = element(0xFFFE, 0xE0DD, b"")
    pixels = struct.pack("<HH2sHI", 0x7FE0, 0x10, b"OB", 0, 0xFFFFFFFF)
    return _meta(syntax) + body + pixels + item(b"") + item(frame) + end


def _meta(syntax: str) -> bytes:
    value = syntax.encode() + b"\0" * (len(syntax) % 2)
    return bytes(128) + b"DICM" + struct.pack("<HH2sH", 2, 0x10, b"UI", len(value)) + value


def told(work: Callable[[bytes], Any], content: bytes) -> tuple[str, float, float]:
    """What came of it in a process of its own, its processor seconds, and MiB above its start."""
    ends = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(120)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        begin = time.process_time()
        try:
            came = str(work(content))
        except Exception as error:
            came = str(error)
        seconds = time.process_time() - begin
        mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        os.write(ends[1], f"{seconds}\n{mib}\n{came[:200]}".encode())
        os._exit(0)
    os.close(ends[1])
    with open(ends[0]) as answer:
        lines = answer.read().split("\n", 2)
    os.waitpid(child, 0)
    assert len(lines) == 3, "killed: it took longer than two minutes"
    return lines[2], float(lines[0]), float(lines[1])


def decoded(content: bytes) -> Any:
    return decode_grey(content, read_header(content)).shape


TABLE = item(element(0x28, 0x3002, b"\1\0" * (BIG // 2)) + element(0x28, 0x3006, b"\1\1" * 256))
MANY_VALUES = {
    "numbers of a window": film(element(0x28, 0x1050, b"1\\" * (BIG // 2))),
    "rows": film(Rows=b"\1\0" * (BIG // 2)),
    "values of padding": film(element(0x28, 0x120, b"\1\0" * (BIG // 2))),
    "numbers of a table's descriptor": film(element(0x28, 0x3010, TABLE)),
    "items of a sequence": film(element(0x28, 0x3010, item(b"") * (BIG // 8))),
}


@pytest.mark.parametrize("name", MANY_VALUES)
def test_one_attribute_of_a_million_values_is_refused(name: str) -> None:
    """pydicom makes an object of each: a PatientID of 40 MB, 40 KB when deflated, took minutes."""
    came, seconds, mib = told(decoded, MANY_VALUES[name])
    assert came.startswith("too_large") and seconds < 8 and mib < 256, (came, seconds, mib)


def test_who_a_file_belongs_to_is_told_in_seconds_too() -> None:
    """prepare asks that of every file in its own process, which nothing ends."""
    parts = {0x20: b"\\" * BIG, 0x10: b"a\\" * (BIG // 2)}
    for work in (read_identity, check_phi):
        content = film(b"", Rows=b"\1\0")
        place = content.index(element(0x28, 2, b"\1\0"))
        number = 0x20 if work is read_identity else 0x10
        whole = content[:place] + element(0x10, number, parts[number]) + content[place:]
        came, seconds, mib = told(work, whole)
        assert came.startswith("too_large") and seconds < 8 and mib < 256, (came, seconds, mib)


def test_tables_and_names_of_a_usual_length_are_read() -> None:
    table = element(0x28, 0x3002, struct.pack("<HHH", 0, 0, 16))
    table += element(0x28, 0x3006, np.arange(1 << 16, dtype="<u2").tobytes())
    assert decoded(film(element(0x28, 0x3010, item(table) * 8))) == (16, 16)
    nested = item(element(0x40, 0x275, item(element(0x10, 0x10, b"A^B "))))
    found = {(entry.attribute, entry.reason) for entry in check_phi(film(element(9, 0x40, nested)))}
    assert ("PatientIdentityRemoved", "not_yes") in found


def test_a_table_that_unpacks_to_one_endless_line_is_refused_in_little_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "MAX_TABLE_BYTES", 64 << 20)
    path = tmp_path / "a.csv.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(b"id,split\n")
        for _ in range(40):
            file.write(bytes(8 << 20).replace(b"\0", b"x"))

    def read(_: bytes) -> Any:
        return list(rows.read_csv(path, ["id", "split"], "nobody"))

    came, seconds, mib = told(read, b"")
    assert str(path) in came and mib < 200 and seconds < 20, (came, seconds, mib)
    with pytest.raises(DatasetError):
        read(b"")


def progressive(scans: int, side: int = 2048) -> bytes:
    """A picture whose last scan, of some 30 bytes, is there again and again."""
    options = [cv2.IMWRITE_JPEG_PROGRESSIVE, 1]
    whole = cv2.imencode(".jpg", np.zeros((side, side), np.uint8), options)[1].tobytes()
    last = whole[whole.rindex(b"\xff\xda") : -2]
    return whole[:-2] + last * scans + b"\xff\xd9"


def test_a_jpeg_of_a_thousand_scans_is_refused() -> None:
    """Each goes over all pixels: 200 of them held 418 KB for 98 s, and a loader has no limit."""
    assert decoded(progressive(4, 256)) == (256, 256)
    for content in (progressive(1000), compressed(progressive(1000), 2048, JPEG)):
        came, seconds, _ = told(decoded, content)
        assert came.startswith(("undecodable: more than", "decode_failed")) and seconds < 2


def test_run_lengths_are_not_unpacked_beyond_the_film() -> None:
    frame = struct.pack("<16I", 1, 64, *[0] * 14) + b"\x81\x00" * (BIG // 2)
    came, seconds, mib = told(decoded, compressed(frame, 16, RLE))
    assert came.startswith("decode_failed") and seconds < 2 and mib < 256, (came, seconds, mib)


def jpeg2000(side: int, tile: int, style: bytes = b"") -> bytes:
    """The stream of an empty picture whose headers claim these sizes; style: what COD holds."""
    stream = bytearray(imagecodecs.jpeg2k_encode(np.zeros((64, 64), np.uint8), codecformat="j2k"))
    struct.pack_into(">II", stream, 8, side, side)
    struct.pack_into(">II", stream, 24, tile, tile)
    at = stream.index(b"\xff\x52")
    end = at + 2 + int.from_bytes(stream[at + 2 : at + 4], "big")
    if style:
        stream[at:end] = struct.pack(">HH", 0xFF52, 2 + len(style)) + style
    return bytes(stream)


# style, progression, layers, transform; levels, block sides less 2 as powers of two, two more
SMALL_BLOCKS = bytes.fromhex("00 00 0001 00 05 00 00 00 01")
SMALL_PRECINCTS = bytes.fromhex("01 00 0001 00 05 04 04 00 01 111111111111")


@pytest.mark.parametrize(
    "stream",
    [
        jpeg2000(10_000, 40),
        jpeg2000(10_000, 10_000, SMALL_BLOCKS),
        jpeg2000(10_000, 10_000, SMALL_PRECINCTS),
    ],
)
def test_a_jpeg_2000_of_millions_of_parts_is_refused(stream: bytes) -> None:
    """140 bytes that claim precincts of two pixels took 6 GiB and two minutes."""
    came, seconds, mib = told(decoded, compressed(stream, 10_000, JPEG2000))
    assert came.startswith("decode_failed") and seconds < 2 and mib < 256, (came, seconds, mib)


def test_the_part_of_a_tile_cannot_bring_smaller_blocks() -> None:
    stream = jpeg2000(10_000, 10_000)
    at = stream.index(b"\xff\x90") + 12
    hidden = struct.pack(">HH", 0xFF52, 2 + len(SMALL_BLOCKS)) + SMALL_BLOCKS
    part = stream[:at] + hidden + stream[at:]
    came, seconds, mib = told(decoded, compressed(part, 10_000, JPEG2000))
    assert came.startswith("decode_failed") and seconds < 2 and mib < 256, (came, seconds, mib)


def test_the_size_that_is_checked_is_that_of_the_picture_that_is_decoded() -> None:
    """Of a JP2 file a box in front may hold the header of another picture."""
    pictures = [np.zeros((side, side), np.uint8) for side in (64, 200)]
    small, large = (
        bytes(imagecodecs.jpeg2k_encode(picture, codecformat=form))
        for picture, form in zip(pictures, ("j2k", "jp2"), strict=True)
    )
    at = 12 + int.from_bytes(large[12:16], "big")
    box = struct.pack(">I4s", 8 + len(small), b"free") + small
    content = compressed(large[:at] + box + large[at:], 64, JPEG2000)
    assert decoded(content) == (64, 64)
    assert decoded(compressed(large, 200, JPEG2000)) == (200, 200)


def test_parts_of_a_usual_size_are_read() -> None:
    size = (4000, 4000, 1, 8)
    for tile in (128, 256, 4000):
        assert checked_size(jpeg2000(4000, tile)) == size
    precincts = bytes.fromhex("01 00 0001 00 05 04 04 00 01 777777888888")
    assert checked_size(jpeg2000(4000, 1000, precincts)) == size
