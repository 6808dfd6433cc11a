"""A JPEG 2000 code stream's headers: its size, and whether a decoder could hold its parts.

OpenJPEG makes an object of every tile, precinct and code block before it reads a pixel: 140 bytes
that claim precincts of two pixels took 6 GiB and two minutes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from mlip.dataloading.dicom.source import DicomError

MAX_TILES = 4096
# of 4,096 pixels by default: 24,000 of a 100-megapixel film
MAX_BLOCKS = 400_000
_SIZ, _COD, _COC, _SOT, _SOD, _EOC = 0xFF51, 0xFF52, 0xFF53, 0xFF90, 0xFF93, 0xFFD9


def code_stream(frame: bytes) -> bytes:
    """The frame without what stands in front of the stream: JP2 boxes may, with another's header.

    Raises:  DicomError(decode_failed) where there is no stream.
    """
    start = frame.find(b"\xff\x4f\xff\x51", 0, 4096)
    if start < 0:
        raise DicomError("decode_failed", "no JPEG 2000 code stream")
    return frame[start:]


def checked_size(stream: bytes) -> tuple[int, int, int, int]:
    """Rows, columns, components and precision of a code stream whose parts are few enough.

    Raises:  DicomError(decode_failed); struct.error, IndexError where a header is cut off
    Source:  ISO/IEC 15444-1 Annex A
    """
    width, height, left, top, tile_width, tile_height = struct.unpack(">6I", stream[8:32])
    components, depth = struct.unpack(">HB", stream[40:43])
    if not tile_width or not tile_height:
        raise DicomError("decode_failed", "tiles without a size")
    columns, rows = -(-width // tile_width), -(-height // tile_height)
    if columns * rows > MAX_TILES:
        raise DicomError("decode_failed", f"{columns * rows} tiles")
    for marker, body in _segments(stream):
        if marker in (_COD, _COC):
            # style, progression, layers and transform of all, or number and style of one component
            style, at = body[0], 5
            if marker == _COC:
                wide = 1 + (components > 256)
                style, at = body[wide], wide + 1
            block = [body[at + 1] + 2, body[at + 2] + 2]
            for sizes in body[at + 5 : at + 6 + body[at]] if style & 1 else b"":
                block = [min(block[0], (sizes & 15) - 1), min(block[1], (sizes >> 4) - 1)]
            layers = struct.unpack(">H", body[2:4])[0] if marker == _COD else 1
            # each tile begins a block anew
            across = (width >> max(0, block[0])) + columns
            down = (height >> max(0, block[1])) + rows
            if across * down > MAX_BLOCKS or layers * columns * rows > 64 * MAX_TILES:
                raise DicomError("decode_failed", "too many code blocks")
    return height - top, width - left, components, (depth & 0x7F) + 1


def _segments(stream: bytes) -> Iterator[tuple[int, bytes]]:
    """(marker, content) of the segments of the main header and of every part of a tile."""
    at, part, end = 2, 0, 0
    while at + 4 <= len(stream):
        marker, length = struct.unpack(">HH", stream[at : at + 4])
        if marker == _EOC or marker < 0xFF00:
            return
        if marker == _SOT:
            part, (size,) = at, struct.unpack(">I", stream[at + 6 : at + 10])
            end = part + size if size else len(stream)
        if marker == _SOD:
            if end <= at:
                return  # damaged: the decoder says so
            at = end
            continue
        yield marker, stream[at + 4 : at + 2 + length]
        at += 2 + length
