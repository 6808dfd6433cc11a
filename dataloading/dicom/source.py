"""DICOM files as streams: reason codes, limits, opening, transfer syntax, bounded parsing.

Whatever pydicom can raise is turned into a DicomError here, and sizes are refused before they are
read.
"""

from __future__ import annotations

import io
import logging
import os
import stat
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pydicom
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.valuerep import EXPLICIT_VR_LENGTH_32

from mlip.dataloading.image_limits import MAX_FILE_BYTES
from mlip.system.own_mistake import own_mistake

# pydicom's warnings and log lines quote tag values, which may identify a patient.
warnings.filterwarnings("ignore", module=r"pydicom(\..*)?")
logging.getLogger("pydicom").setLevel(logging.CRITICAL)

MAX_INFLATED_BYTES = 96 << 20  # deflated syntax: 48 megapixels of 16 bits, 256 MiB in all
MAX_HEADER_READS = 200_000  # about 100,000 attributes and items; one second of parsing
MAX_HEADER_BYTES = 64 << 20
MAX_HEADER_VALUES = 100_000  # a name is split and decoded in 40 us, a number in 3
# value representations that are split at backslashes; that are never converted
_TEXTS = frozenset("AE AS CS DA DS DT IS LO PN SH TM UC UI".split())
_BYTES = frozenset("OB OD OF OL OV OW UN LT ST UR UT".split())
_ITEMS = (b"\xfe\xff\x00\xe0", b"\xff\xfe\xe0\x00")  # little and big endian
_LUT_DATA = 0x00283006  # a table a sequence's item, of which one is converted
_PIXELS = (0x7FE00008, 0x7FE00009, 0x7FE00010)  # tags: of float32, of float64, the usual ones

SUFFIXES = (".dcm", ".dicom", ".ima")  # of file names; most archives write none

CODES = {
    "missing": "no such file",
    "dangling_link": "a link to nothing",
    "directory": "a folder, not a file",
    "special_file": "a pipe, socket or device, not a file",
    "no_permission": "may not be read",
    "io_error": "the system could not read it",
    "empty": "the file has no bytes",
    "too_large": "larger than the limits on bytes, sides or pixels",
    "not_dicom": "no DICOM preamble and file meta information",
    "malformed": "the data set cannot be parsed",
    "unsupported_syntax": "a transfer syntax that is not on the list",
    "unsupported_photometric": "not MONOCHROME1 or MONOCHROME2",
    "multi_frame": "not exactly one frame",
    "missing_tag": "a required attribute is absent",
    "bad_shape": "rows or columns are not positive numbers",
    "non_square": "a pixel is not as high as it is wide: scale the image first",
    "bad_bits": "bits allocated, stored or high bit are not a valid combination",
    "bad_rescale": "rescale slope or intercept is not a usable number",
    "bad_lut": "a lookup table does not hold what its descriptor says",
    "no_pixels": "no pixel data",
    "pixel_length": "pixel data is shorter or longer than the header says",
    "syntax_mismatch": "pixel data is compressed where the syntax says native, or the reverse",
    "frame_mismatch": "the compressed frame is not of the size or depth the header says",
    "decode_failed": "the compressed frame cannot be decoded",
    "out_of_memory": "not enough memory",
    "internal_error": "an error of this program, not of the file: please report it",
}


class DicomError(ValueError):
    """A file that cannot be a radiograph, with a stable reason code out of CODES."""

    exit_code = 3

    def __init__(self, code: str, detail: str = "") -> None:
        super().__init__(f"{code}: {CODES[code]}{'; ' + detail if detail else ''}")
        self.code = code
        self.detail = detail

    def __reduce__(self) -> tuple[Any, ...]:
        return DicomError, (self.code, self.detail)


@contextmanager
def error_wall(code: str) -> Iterator[None]:
    """Turn every exception of a library into DicomError(code).

    StopIteration out of a decoder would end a DataLoader's epoch without an error, so the wall
    has to be total; the library's text is dropped because it may quote tag values. What arose in a
    line of ours is no fault of the file, and is not told as one.
    """
    try:
        yield
    except DicomError:
        raise
    except MemoryError as error:
        raise DicomError("out_of_memory") from error
    except Exception as error:
        if (place := own_mistake(error)) is not None:
            raise DicomError("internal_error", place) from error
        raise DicomError(code, type(error).__name__) from error


DEFLATED = "1.2.840.10008.1.2.1.99"
BIG_ENDIAN = "1.2.840.10008.1.2.2"
NATIVE_SYNTAXES = ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1", DEFLATED, BIG_ENDIAN)
COMPRESSED_SYNTAXES = {
    "1.2.840.10008.1.2.5": "rle",
    "1.2.840.10008.1.2.4.50": "jpeg",
    "1.2.840.10008.1.2.4.51": "jpeg",
    "1.2.840.10008.1.2.4.57": "jpeg",
    "1.2.840.10008.1.2.4.70": "jpeg",
    "1.2.840.10008.1.2.4.80": "jpegls",
    "1.2.840.10008.1.2.4.81": "jpegls",
    "1.2.840.10008.1.2.4.90": "jpeg2000",
    "1.2.840.10008.1.2.4.91": "jpeg2000",
    "1.2.840.10008.1.2.4.201": "htj2k",
    "1.2.840.10008.1.2.4.202": "htj2k",
    "1.2.840.10008.1.2.4.203": "htj2k",
}


@contextmanager
def open_regular(source: str | os.PathLike[str] | bytes) -> Iterator[tuple[BinaryIO, int]]:
    """The opened file and its size; never blocks on a pipe and never follows to a device."""
    if isinstance(source, bytes | bytearray | memoryview):
        if not source:
            raise DicomError("empty")
        if len(source) > MAX_FILE_BYTES:
            raise DicomError("too_large", f"{len(source)} bytes, at most {MAX_FILE_BYTES}")
        yield io.BytesIO(source), len(source)
        return
    if not isinstance(source, str | os.PathLike):
        # a pydicom data set, an open file: nothing is wrong with the file itself
        kind = type(source).__name__
        raise DicomError("io_error", f"expected a path or the bytes of a file, got {kind}")
    path = Path(source)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except FileNotFoundError as error:
        raise DicomError("dangling_link" if path.is_symlink() else "missing") from error
    except PermissionError as error:
        raise DicomError("no_permission") from error
    except (OSError, ValueError) as error:
        raise DicomError("io_error", type(error).__name__) from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise DicomError("directory" if stat.S_ISDIR(status.st_mode) else "special_file")
    with os.fdopen(descriptor, "rb") as file:
        if status.st_size == 0:
            raise DicomError("empty")
        if status.st_size > MAX_FILE_BYTES:
            raise DicomError("too_large", f"{status.st_size} bytes, at most {MAX_FILE_BYTES}")
        yield file, status.st_size


def read_file_meta(file: BinaryIO) -> tuple[dict[int, bytes], int]:
    """Values by element number of group 0002, and the offset of the data set behind them."""
    file.seek(0)
    if file.read(132)[128:] != b"DICM":
        raise DicomError("not_dicom")
    values: dict[int, bytes] = {}
    offset = 132
    for _ in range(64):  # group 2 has at most 20 attributes
        head = file.read(8)
        if len(head) < 8 or head[:2] != b"\x02\x00":
            break
        length, value_at = struct.unpack("<H", head[6:])[0], offset + 8
        if head[4:6].decode("ascii", "replace") in EXPLICIT_VR_LENGTH_32:
            length, value_at = struct.unpack("<I", file.read(4).ljust(4, b"\0"))[0], offset + 12
        if length > 1 << 20:
            raise DicomError("malformed", "file meta information")
        values[struct.unpack("<H", head[2:4])[0]] = file.read(length)
        offset = value_at + length
    return values, offset


def _read_transfer_syntax(file: BinaryIO) -> tuple[str, int]:
    """Transfer syntax UID and the offset of the data set."""
    values, offset = read_file_meta(file)
    syntax = values.get(0x0010, b"").decode("ascii", "replace").strip(" \0")
    if not syntax:
        raise DicomError("not_dicom", "no transfer syntax")
    if syntax not in NATIVE_SYNTAXES and syntax not in COMPRESSED_SYNTAXES:
        raise DicomError("unsupported_syntax", _uid(syntax))
    return syntax, offset


def _uid(text: str) -> str:
    """A UID fit for a message: only digits and dots, at most 64."""
    return "".join(c for c in text[:64] if c in "0123456789.") or "not a UID"


def _inflated(file: BinaryIO, offset: int) -> BinaryIO:
    """The data set of a deflated file, refused once it grows past MAX_INFLATED_BYTES."""
    file.seek(offset)
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    plain = io.BytesIO()
    while not inflater.eof:
        block = file.read(1 << 16)
        if not block:
            break
        while block:
            plain.write(inflater.decompress(block, 1 << 20))
            if plain.tell() > MAX_INFLATED_BYTES:
                raise DicomError("too_large", f"inflates past {MAX_INFLATED_BYTES} bytes")
            block = inflater.unconsumed_tail
    plain.seek(0)
    return plain


class _Meter:
    """What has been read of a file's header, in all streams over it: more than the limits is none.

    Tiny nested items would cost hours, and so would one attribute of a million values.
    """

    def __init__(self) -> None:
        self._reads = self._bytes = self._values = 0

    def add(self, *, reads: int = 0, size: int = 0, values: int = 0) -> None:
        self._reads += reads
        self._bytes += size
        self._values += values
        if (
            self._reads > MAX_HEADER_READS
            or self._bytes > MAX_HEADER_BYTES
            or self._values > MAX_HEADER_VALUES
        ):
            raise DicomError("too_large", "header")


class _Metered:
    """A stream that refuses to be read without end."""

    def __init__(self, file: BinaryIO, meter: _Meter) -> None:
        self._file, self._meter = file, meter
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        # a data set is made of each item of a sequence, which takes ten times as long
        self._meter.add(reads=10 if data[:4] in _ITEMS else 1, size=len(data))
        return data


def read_dataset(file: BinaryIO, tags: list[str] | None) -> tuple[str, BinaryIO, Dataset]:
    """Transfer syntax, the stream at the pixel data element, the chosen tags (None = all)."""
    with error_wall("malformed"):
        syntax, offset = _read_transfer_syntax(file)
        if syntax == DEFLATED:
            file = _inflated(file, offset)
        else:
            file.seek(offset)
        return syntax, file, _parsed(file, syntax, tags, lambda tag: tag >= _PIXELS[0])


def _parsed(
    file: BinaryIO, syntax: str, tags: list[str] | None, ends_at: Callable[[int], bool]
) -> Dataset:
    meter = _Meter()
    try:
        dataset = pydicom.filereader.read_dataset(
            _Metered(file, meter),  # type: ignore[arg-type]
            is_implicit_VR=syntax == NATIVE_SYNTAXES[0],
            is_little_endian=syntax != BIG_ENDIAN,
            stop_when=lambda tag, vr, length: ends_at(int(tag)),
            specific_tags=[pydicom.tag.Tag(tag) for tag in tags] if tags else None,
        )
    except Exception:
        meter.add()  # over the limits: pydicom may have made another error of that
        raise
    _bound(dataset, meter)
    return dataset


def _bound(dataset: Dataset, meter: _Meter) -> None:
    """Counts the values that pydicom makes of an attribute when it is asked for, and opens
    sequences under the meter: pydicom itself reads those of a stated length later, without end.

    Raises:  DicomError where they are over the limits
    """
    for tag in list(dataset.keys()):
        element: Any = dataset.get_item(tag)
        if isinstance(element, RawDataElement) and element.value:
            representation = _representation(dataset, element)
            if representation in _TEXTS:
                meter.add(values=1 + element.value.count(b"\\"))
            elif representation == "SQ":
                _open_sequence(dataset, element, meter)
            elif representation not in _BYTES and tag != _LUT_DATA:
                meter.add(values=len(element.value) // 16)  # a number costs little
        opened: Any = dataset.get_item(tag)
        if not isinstance(opened, RawDataElement) and opened.VR == "SQ":
            for item in opened.value:
                _bound(item, meter)


def _representation(dataset: Dataset, element: RawDataElement) -> str:
    """As pydicom decides on it: by its dictionaries where the file does not say."""
    tag = element.tag
    if element.VR not in (None, "UN") or len(element.value or b"") >= 0xFFFF and element.VR == "UN":
        return str(element.VR)
    try:
        if tag.is_private_creator:
            return "LO"
        if not tag.is_private:
            return str(pydicom.datadict.dictionary_VR(tag))
        named = dataset.get_item((tag.group, tag.element >> 8))
        if named is None:  # private attributes whose creator a de-identification took away
            return "UN"
        creator = named.value or b""
        name = creator.decode("ascii", "replace") if isinstance(creator, bytes) else str(creator)
        return str(pydicom.datadict.private_dictionary_VR(tag, name.strip(" \0")))
    except KeyError:
        return "UN"


def _open_sequence(dataset: Dataset, element: RawDataElement, meter: _Meter) -> None:
    """One that cannot be parsed stays as it is: only who asks for it meets the error."""
    value = element.value or b""
    stream = _Metered(io.BytesIO(value), meter)
    try:
        items = pydicom.filereader.read_sequence(
            stream,  # type: ignore[arg-type]
            element.is_implicit_VR,
            element.is_little_endian,
            len(value),
            ["iso8859"],
        )
    except MemoryError:
        raise
    except Exception:
        meter.add()  # as in _parsed
        return
    dataset[element.tag] = pydicom.DataElement(element.tag, "SQ", items)


def read_everything_but_pixels(file: BinaryIO) -> Dataset:
    """All attributes, behind the pixels too, identifying ones also: for phi.py alone."""
    syntax, stream, dataset = read_dataset(file, None)
    _skip_pixels(stream, syntax)
    # zeros at the end of a file are padding of a tape or disk, no attributes
    dataset.update(_parsed(stream, syntax, None, lambda tag: tag == 0))
    return dataset


def _tag(head: bytes, order: str) -> int:
    group, element = struct.unpack(f"{order}HH", head[:4])
    return group << 16 | element


def _skip_pixels(stream: BinaryIO, syntax: str) -> None:
    """Moves the stream from the pixel data element, if it stands at one, to what follows."""
    order = ">" if syntax == BIG_ENDIAN else "<"
    start, head = stream.tell(), stream.read(8)
    if len(head) < 8 or _tag(head, order) not in _PIXELS:
        stream.seek(start)
        return
    length = struct.unpack(f"{order}I", head[4:])[0]
    if syntax != NATIVE_SYNTAXES[0] and head[4:6] in (b"OB", b"OW", b"OF", b"OD", b"UN"):
        length = struct.unpack(f"{order}I", stream.read(4).ljust(4, b"\0"))[0]
    if length != 0xFFFFFFFF:
        stream.seek(length, io.SEEK_CUR)
        return
    items = _Metered(stream, _Meter())
    while len(head := items.read(8)) == 8:
        mark, length = head[:4], struct.unpack("<I", head[4:])[0]
        if mark == b"\xfe\xff\xdd\xe0":
            return
        if mark != b"\xfe\xff\x00\xe0":
            raise DicomError("malformed", "no item where a fragment should start")
        stream.seek(length, io.SEEK_CUR)
