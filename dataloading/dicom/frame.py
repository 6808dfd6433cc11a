"""One frame's stored cells [H, W], from native or compressed pixel data.

The size in a compressed frame's own header is compared with the data set before a codec sees it,
so that a codec never allocates what the caps did not allow.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import BinaryIO

import imagecodecs
import numpy as np

from mlip.dataloading.dicom.header import Header
from mlip.dataloading.dicom.jpeg2000 import checked_size, code_stream
from mlip.dataloading.dicom.source import BIG_ENDIAN, COMPRESSED_SYNTAXES, DicomError, error_wall
from mlip.dataloading.image_limits import MAX_SCANS

_MAX_FRAGMENTS = 65_536  # a 100-megapixel frame in fragments of 4 KiB; walking them takes 0.1 s


def read_cells(header: Header, stream: BinaryIO) -> np.ndarray:
    """The stored cells as written: uint8 or uint16 [H, W], sign and unused bits not interpreted.

    Raises:  DicomError: a code from no_pixels to out_of_memory, malformed or too_large.
    """
    with error_wall("malformed"):
        length, swap_pairs = _pixel_element(header, stream)
    kind = COMPRESSED_SYNTAXES.get(header.transfer_syntax)
    undefined = length == 0xFFFFFFFF
    if undefined != (kind is not None):
        raise DicomError("syntax_mismatch")
    if kind is None:
        return _native(header, stream, length, swap_pairs)
    with error_wall("malformed"):
        frame = _joined_fragments(stream)
    return _rle(header, frame) if kind == "rle" else _codec(header, frame, kind)


def _pixel_element(header: Header, stream: BinaryIO) -> tuple[int, bool]:
    """Length of the pixel data element, and whether 8-bit cells come as swapped byte pairs."""
    order = ">" if header.transfer_syntax == BIG_ENDIAN else "<"
    head = stream.read(8)
    if len(head) < 8:
        raise DicomError("no_pixels")
    group, element = struct.unpack(f"{order}HH", head[:4])
    if (group, element) != (0x7FE0, 0x0010):
        raise DicomError("no_pixels", "another element stands in its place")
    representation = head[4:6]
    if representation in (b"OB", b"OW", b"UN"):
        length = struct.unpack(f"{order}I", stream.read(4))[0]
        return length, order == ">" and representation == b"OW" and header.bits_allocated == 8
    return struct.unpack(f"{order}I", head[4:])[0], False


def _joined_fragments(stream: BinaryIO) -> bytes:
    """The one frame of encapsulated pixel data: all fragments behind the offset table, joined."""
    fragments: list[bytes] = []
    for index in range(_MAX_FRAGMENTS):
        head = stream.read(8)
        # a missing sequence delimiter at the end of the file loses no pixel
        if head == b"" or head[:4] == b"\xfe\xff\xdd\xe0":
            break
        if len(head) < 8 or head[:4] != b"\xfe\xff\x00\xe0":
            raise DicomError("malformed", "no item where a fragment should start")
        length = struct.unpack("<I", head[4:])[0]
        fragment = stream.read(length) if length != 0xFFFFFFFF else b""
        if len(fragment) != length:
            raise DicomError("pixel_length", "a fragment runs past the end of the file")
        if index > 0:
            fragments.append(fragment)
    else:
        raise DicomError("too_large", f"more than {_MAX_FRAGMENTS} fragments")
    if not any(fragments):
        raise DicomError("no_pixels", "no fragment")
    return b"".join(fragments)


def _native(header: Header, stream: BinaryIO, length: int, swap_pairs: bool) -> np.ndarray:
    expected = header.rows * header.columns * (header.bits_allocated // 8)
    if length == 0:
        raise DicomError("no_pixels", "empty")
    if length not in (expected, expected + expected % 2):
        raise DicomError("pixel_length", f"{length} bytes, expected {expected}")
    with error_wall("out_of_memory"):
        data = stream.read(length)
    if len(data) < expected:
        raise DicomError("pixel_length", f"{len(data)} bytes left, expected {expected}")
    if header.bits_allocated == 8:
        cells = np.frombuffer(data, np.uint8)
        if swap_pairs:
            cells = cells[: len(cells) // 2 * 2].reshape(-1, 2)[:, ::-1].reshape(-1)
        return cells[:expected].reshape(header.rows, header.columns)
    big = header.transfer_syntax == BIG_ENDIAN
    cells = np.frombuffer(data, ">u2" if big else "<u2", count=header.rows * header.columns)
    return cells.astype(np.uint16, copy=False).reshape(header.rows, header.columns)


def _rle(header: Header, frame: bytes) -> np.ndarray:
    """PackBits segments, most significant byte first (PS3.5 Annex G)."""
    planes = header.bits_allocated // 8
    size = header.rows * header.columns
    with error_wall("decode_failed"):
        count, *offsets = struct.unpack("<16I", frame[:64])
        if count != planes:
            raise DicomError("frame_mismatch", f"{count} RLE segments, expected {planes}")
        ends = [*offsets[1:count], len(frame)]
        cells = np.zeros((size, planes), np.uint8)
        for plane in range(planes):
            start, end = offsets[plane], ends[plane]
            if not 64 <= start < end <= len(frame):
                raise DicomError("decode_failed", "RLE segment offsets")
            # an odd segment carries one pad byte, which may decode to nothing or to little; to more
            # than that nothing is unpacked: one byte may be 64
            decoded = imagecodecs.packbits_decode(frame[start:end], out=size + 256)
            if len(decoded) < size:
                raise DicomError("frame_mismatch", f"{len(decoded)} RLE bytes, expected {size}")
            cells[:, planes - 1 - plane] = np.frombuffer(decoded, np.uint8, count=size)
    joined = cells.reshape(-1).view("<u2" if planes == 2 else np.uint8)
    native = joined.astype(joined.dtype.newbyteorder("="), copy=False)
    return native.reshape(header.rows, header.columns)


def _codec(header: Header, frame: bytes, kind: str) -> np.ndarray:
    with error_wall("decode_failed"):
        if kind in ("jpeg2000", "htj2k"):
            frame = code_stream(frame)
            found = checked_size(frame)
        else:
            found = _jpeg_size(frame)
    rows, columns, components, bits = found
    if (rows, columns, components) != (header.rows, header.columns, 1):
        raise DicomError(
            "frame_mismatch",
            f"{rows} x {columns} x {components}, expected {header.rows} x {header.columns} x 1",
        )
    if bits > header.bits_allocated:
        raise DicomError("frame_mismatch", f"{bits} bits in {header.bits_allocated} allocated")
    with error_wall("decode_failed"):
        if kind in ("jpeg", "jpegls"):
            _check_jpeg_scans(frame)
        if kind == "jpeg":
            cells = imagecodecs.jpeg_decode(frame, bitspersample=bits if bits > 8 else None)
        elif kind == "jpegls":
            cells = imagecodecs.jpegls_decode(frame)
        else:
            cells = imagecodecs.jpeg2k_decode(frame, numthreads=1)
    fits = 8 * cells.dtype.itemsize <= header.bits_allocated
    if cells.shape != (header.rows, header.columns) or not fits:
        raise DicomError("frame_mismatch", "decoded shape")
    if cells.dtype.kind == "u" and bits > header.bits_stored:
        if int(cells.max()) >> header.bits_stored:
            raise DicomError("frame_mismatch", f"a value over {header.bits_stored} bits")
    return np.ascontiguousarray(_stored_pattern(header, cells, bits, kind))


def _stored_pattern(header: Header, cells: np.ndarray, bits: int, kind: str) -> np.ndarray:
    """A codec's numbers as the allocated cells would hold them; 8 bits may come for 16 allocated.

    Where the data set and the code stream differ in sign, the data set is right and the stream
    tells how many bits the number has, as in pydicom; JPEG-LS knows no sign at all.
    """
    signed = cells.dtype.kind == "i"
    cells = cells.astype(f"u{header.bits_allocated // 8}", copy=False)  # keeps the sign's bits
    unused = header.bits_allocated - bits
    if kind == "jpeg" or signed == header.signed or unused == 0:
        return cells
    number = f"{'i' if header.signed else 'u'}{cells.itemsize}"
    return ((cells << unused).view(number) >> unused).view(cells.dtype)


def _jpeg_size(frame: bytes) -> tuple[int, int, int, int]:
    """Rows, columns, components and precision from the first start-of-frame marker."""
    for marker, at in _jpeg_segments(frame):
        # start of frame: SOF0-3, 5-7, 9-11, 13-15 of JPEG and SOF55 of JPEG-LS
        if marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            bits, rows, columns, components = struct.unpack(">BHHB", frame[at + 4 : at + 10])
            return rows, columns, components, bits
    raise DicomError("decode_failed", "no JPEG frame header")


def _check_jpeg_scans(frame: bytes) -> None:
    """Refuses a cut frame: libjpeg fills what is missing with grey and only warns, and CharLS 2.4
    looks for bits of JPEG-LS behind the last byte for 7 s before it gives up, however small the
    film. And one of more scans than a picture has: each goes over all pixels.

    Looked for behind the first scan's header: an embedded thumbnail has an end marker of its own,
    and in the coded pixels a byte FF is always followed by one below 80 or a restart marker.
    """
    for marker, at in _jpeg_segments(frame):
        if marker == 0xDA:
            if frame.count(b"\xff\xda", at) > MAX_SCANS:
                raise DicomError("decode_failed", f"more than {MAX_SCANS} scans")
            if frame.find(b"\xff\xd9", at + 4) < 0:
                raise DicomError("decode_failed", "no JPEG end marker")
            return
    raise DicomError("decode_failed", "no JPEG scan")


def _jpeg_segments(frame: bytes) -> Iterator[tuple[int, int]]:
    """(marker, offset) of the segments in front of the coded pixels; the scan header is last."""
    if frame[:2] != b"\xff\xd8":
        raise DicomError("decode_failed", "no JPEG start marker")
    at, marker = 2, 0
    while at + 4 <= len(frame) and marker != 0xDA:
        if frame[at] != 0xFF:
            raise DicomError("decode_failed", "no JPEG marker")
        marker = frame[at + 1]
        if marker == 0xFF:
            at += 1
            continue
        yield marker, at
        at += 2 + struct.unpack(">H", frame[at + 2 : at + 4])[0]
