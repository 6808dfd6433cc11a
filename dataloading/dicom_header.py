"""The header of a DICOM file as checked plain values, and the raw bytes of its one frame.

Whatever pydicom can raise is turned into a DicomError here, sizes are refused before pixels are
read, and nothing keeps a patient's identity: the pixel path never sees those tags.
"""

from __future__ import annotations

import io
import logging
import os
import stat
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pydicom
from pydicom.dataset import Dataset

# pydicom's warnings and log lines quote tag values, which may identify a patient.
warnings.filterwarnings("ignore", module=r"pydicom(\..*)?")
logging.getLogger("pydicom").setLevel(logging.CRITICAL)

MAX_FILE_BYTES = 512 << 20
MAX_INFLATED_BYTES = 96 << 20  # deflated syntax: 48 megapixels of 16 bits, 256 MiB in all
MAX_SIDE_PX = 16_384
MAX_PIXELS = 100_000_000

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
    "bad_bits": "bits allocated, stored or high bit are not a valid combination",
    "bad_rescale": "rescale slope or intercept is not a usable number",
    "bad_lut": "a lookup table does not hold what its descriptor says",
    "no_pixels": "no pixel data",
    "pixel_length": "pixel data is shorter or longer than the header says",
    "syntax_mismatch": "pixel data is compressed where the syntax says native, or the reverse",
    "frame_mismatch": "the compressed frame is not of the size or depth the header says",
    "decode_failed": "the compressed frame cannot be decoded",
    "out_of_memory": "not enough memory",
}


class DicomError(ValueError):
    """A file that cannot be a radiograph, with a stable reason code out of CODES."""

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
    has to be total; the library's text is dropped because it may quote tag values.
    """
    try:
        yield
    except DicomError:
        raise
    except MemoryError as error:
        raise DicomError("out_of_memory") from error
    except Exception as error:
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

_TAGS = (
    "Modality ViewPosition PresentationIntentType SamplesPerPixel PhotometricInterpretation "
    "NumberOfFrames Rows Columns BitsAllocated BitsStored HighBit PixelRepresentation "
    "PixelPaddingValue PixelPaddingRangeLimit WindowCenter WindowWidth VOILUTFunction "
    "RescaleIntercept RescaleSlope ModalityLUTSequence VOILUTSequence ImagerPixelSpacing "
    "PixelSpacing SpecificCharacterSet"
).split()

_PIXEL_TAGS = {0x7FE00008: "float", 0x7FE00009: "double", 0x7FE00010: "integer"}


@dataclass(frozen=True)
class Lut:
    """A modality or VOI lookup table: input `first` and below gives values[0]."""

    first: int
    bits: int
    values: np.ndarray  # [n] uint16


@dataclass(frozen=True)
class Header:
    """What the pixel chain needs, checked; no attribute that identifies anybody."""

    transfer_syntax: str
    rows: int
    columns: int
    bits_allocated: int
    bits_stored: int
    signed: bool
    photometric: str
    modality: str
    view: str
    intent: str
    spacing_mm: tuple[float, float] | None
    padding: tuple[int, int] | None  # lowest and highest stored value that is no image
    rescale: tuple[float, float] | None  # slope, intercept
    modality_lut: Lut | None
    window: tuple[float, float, str] | None  # centre, width, function
    voi_lut: Lut | None
    notes: tuple[str, ...]


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
    path = Path(source)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise DicomError("dangling_link" if path.is_symlink() else "missing") from error
    except PermissionError as error:
        raise DicomError("no_permission") from error
    except (OSError, ValueError) as error:
        raise DicomError("io_error", type(error).__name__) from error
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode):
            raise DicomError("directory")
        if not stat.S_ISREG(status.st_mode):
            raise DicomError("special_file")
        if status.st_size == 0:
            raise DicomError("empty")
        if status.st_size > MAX_FILE_BYTES:
            raise DicomError("too_large", f"{status.st_size} bytes, at most {MAX_FILE_BYTES}")
        yield file, status.st_size


def read_transfer_syntax(file: BinaryIO) -> tuple[str, int]:
    """Transfer syntax UID and the offset of the data set behind the file meta information."""
    file.seek(0)
    if file.read(132)[128:] != b"DICM":
        raise DicomError("not_dicom")
    syntax, offset = "", 132
    for _ in range(64):  # group 2 has at most 20 attributes
        head = file.read(8)
        if len(head) < 8 or head[:2] != b"\x02\x00":
            break
        length, value_at = struct.unpack("<H", head[6:])[0], offset + 8
        if head[4:6] in (b"OB", b"OW", b"UN", b"SQ", b"UT"):
            length, value_at = struct.unpack("<I", file.read(4).ljust(4, b"\0"))[0], offset + 12
        if length > 1 << 20:
            raise DicomError("malformed", "file meta information")
        value = file.read(length)
        if head[:4] == b"\x02\x00\x10\x00":
            syntax = value.decode("ascii", "replace").strip(" \0")
        offset = value_at + length
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


def read_dataset(file: BinaryIO, tags: list[str]) -> tuple[str, BinaryIO, Dataset]:
    """Transfer syntax, the stream standing at the pixel data element, and the chosen tags."""
    with error_wall("malformed"):
        syntax, offset = read_transfer_syntax(file)
        implicit, little = syntax == NATIVE_SYNTAXES[0], syntax != BIG_ENDIAN
        if syntax == DEFLATED:
            file = _inflated(file, offset)
        else:
            file.seek(offset)
        dataset = pydicom.filereader.read_dataset(
            file,
            is_implicit_VR=implicit,
            is_little_endian=little,
            stop_when=lambda tag, vr, length: int(tag) >= 0x7FE00008,
            specific_tags=[pydicom.tag.Tag(tag) for tag in tags],  # type: ignore[misc]
        )
    return syntax, file, dataset


def read_header(file: BinaryIO) -> tuple[Header, BinaryIO]:
    """The checked Header and the stream standing at the pixel data element.

    Raises:  DicomError for the first thing that is wrong.
    """
    syntax, stream, dataset = read_dataset(file, list(_TAGS))
    with error_wall("malformed"):
        return _checked(syntax, dataset), stream


def _checked(syntax: str, dataset: Dataset) -> Header:
    rows = _integer(dataset, "Rows", "bad_shape")
    columns = _integer(dataset, "Columns", "bad_shape")
    if rows < 1 or columns < 1:
        raise DicomError("bad_shape", f"{rows} x {columns}")
    if max(rows, columns) > MAX_SIDE_PX or rows * columns > MAX_PIXELS:
        raise DicomError("too_large", f"{rows} x {columns} pixels")
    frames = _integer(dataset, "NumberOfFrames", "multi_frame", default=1)
    if frames != 1:
        raise DicomError("multi_frame", f"{frames} frames")
    photometric = _text(dataset, "PhotometricInterpretation")
    if not photometric:
        raise DicomError("missing_tag", "PhotometricInterpretation")
    samples = _integer(dataset, "SamplesPerPixel", "unsupported_photometric", default=1)
    if photometric not in ("MONOCHROME1", "MONOCHROME2") or samples != 1:
        raise DicomError("unsupported_photometric", f"{samples} samples a pixel")
    allocated = _integer(dataset, "BitsAllocated", "bad_bits")
    stored = _integer(dataset, "BitsStored", "bad_bits")
    high = _integer(dataset, "HighBit", "bad_bits", default=stored - 1)
    representation = _integer(dataset, "PixelRepresentation", "bad_bits", default=0)
    if (
        allocated not in (8, 16)
        or not 1 <= stored <= allocated
        or high != stored - 1
        or representation not in (0, 1)
    ):
        raise DicomError(
            "bad_bits",
            f"allocated {allocated}, stored {stored}, high {high}, sign {representation}",
        )
    notes: list[str] = []
    modality_lut = _lut(dataset, "ModalityLUTSequence", representation == 1, notes)
    voi_lut = _lut(dataset, "VOILUTSequence", representation == 1, notes)
    spacing = _numbers(dataset, "ImagerPixelSpacing") or _numbers(dataset, "PixelSpacing")
    valid_spacing = spacing is not None and len(spacing) == 2 and min(spacing) > 0
    return Header(
        transfer_syntax=syntax,
        rows=rows,
        columns=columns,
        bits_allocated=allocated,
        bits_stored=stored,
        signed=representation == 1,
        photometric=photometric,
        modality=_code(dataset, "Modality"),
        view=_code(dataset, "ViewPosition"),
        intent=_code(dataset, "PresentationIntentType"),
        spacing_mm=(spacing[0], spacing[1]) if spacing and valid_spacing else None,
        padding=_padding(dataset, stored, representation == 1),
        rescale=_rescale(dataset),
        modality_lut=modality_lut,
        window=_window(dataset, notes),
        voi_lut=voi_lut,
        notes=tuple(notes),
    )


def _value(dataset: Dataset, name: str) -> Any:
    """The attribute's value, None where absent, empty or not convertible."""
    try:
        value = dataset.get(name)
    except (ValueError, TypeError, ArithmeticError, struct.error, NotImplementedError):
        return None
    return None if value is None or value == "" else value


def _is_empty(dataset: Dataset, name: str) -> bool:
    """Whether the attribute stands there without a value; a word for a number is not empty."""
    value = dataset.get_item(name).value
    return value is None or (isinstance(value, bytes | str) and not value.strip())


def _integer(dataset: Dataset, name: str, code: str, default: int | None = None) -> int:
    if name not in dataset:
        if default is None:
            raise DicomError("missing_tag", name)
        return default
    value = _value(dataset, name)
    if value is None and default is not None and _is_empty(dataset, name):
        return default
    if isinstance(value, bool) or not isinstance(value, int):
        raise DicomError(code, f"{name} is not one whole number")
    return int(value)


def _numbers(dataset: Dataset, name: str) -> list[float] | None:
    value = _value(dataset, name)
    if value is None:
        return None
    values = value if isinstance(value, list | pydicom.multival.MultiValue) else [value]
    try:
        numbers = [float(v) for v in values]
    except (TypeError, ValueError, OverflowError):
        return None
    return numbers if numbers and np.isfinite(numbers).all() else None


def _text(dataset: Dataset, name: str) -> str:
    value = _value(dataset, name)
    return value.strip(" \0") if isinstance(value, str) else ""


def _code(dataset: Dataset, name: str) -> str:
    """A code string; anything that is none, free text for instance, is dropped."""
    text = _text(dataset, name)
    valid = len(text) <= 16 and all(c.isascii() and (c.isalnum() or c in " _") for c in text)
    return text.upper() if valid else ""


def _padding(dataset: Dataset, stored: int, signed: bool) -> tuple[int, int] | None:
    value = _value(dataset, "PixelPaddingValue")
    limit = _value(dataset, "PixelPaddingRangeLimit")
    if not isinstance(value, int):
        return None
    ends = [value, limit if isinstance(limit, int) else value]
    if signed:  # the attribute's US or SS depends on a tag that some writers ignore
        ends = [e - (1 << 16) if e >= 1 << 15 else e for e in ends]
    return min(ends), max(ends)


def _rescale(dataset: Dataset) -> tuple[float, float] | None:
    if "RescaleSlope" not in dataset and "RescaleIntercept" not in dataset:
        return None
    given = []
    for name, default in (("RescaleSlope", 1.0), ("RescaleIntercept", 0.0)):
        if name not in dataset or _is_empty(dataset, name):
            given.append(default)
            continue
        numbers = _numbers(dataset, name)
        if numbers is None:
            raise DicomError("bad_rescale", f"{name} is not finite")
        given.append(numbers[0])
    if given[0] == 0.0:
        raise DicomError("bad_rescale", "slope 0")
    return given[0], given[1]


def _window(dataset: Dataset, notes: list[str]) -> tuple[float, float, str] | None:
    if "WindowCenter" not in dataset and "WindowWidth" not in dataset:
        return None
    centre, width = _numbers(dataset, "WindowCenter"), _numbers(dataset, "WindowWidth")
    function = _text(dataset, "VOILUTFunction").upper() or "LINEAR"
    if function not in ("LINEAR", "LINEAR_EXACT", "SIGMOID"):
        notes.append("unknown_voi_function")
        function = "LINEAR"
    if centre is None or width is None or width[0] <= 0 or (function == "LINEAR" and width[0] < 1):
        notes.append("unusable_window")
        return None
    if len(centre) > 1:
        notes.append("first_of_several_windows")
    return centre[0], width[0], function


def _lut(dataset: Dataset, name: str, signed: bool, notes: list[str]) -> Lut | None:
    sequence = _value(dataset, name)
    if not sequence:
        return None
    if len(sequence) > 1:
        notes.append(f"first_of_several_{'voi' if name.startswith('VOI') else 'modality'}_luts")
    with error_wall("bad_lut"):
        item = sequence[0]
        count, first, bits = (int(v) for v in item["LUTDescriptor"].value)
        count = (count & 0xFFFF) or 1 << 16
        if signed and first >= 1 << 15:
            first -= 1 << 16
        if not 8 <= bits <= 16:
            raise DicomError("bad_lut", f"{bits} bits")
        data = item["LUTData"].value
        if isinstance(data, bytes):
            little = dataset.original_encoding[1] is not False
            if len(data) >= 2 * count:
                values = np.frombuffer(data, "<u2" if little else ">u2", count=count)
            elif bits == 8 and len(data) >= count:
                values = np.frombuffer(data, np.uint8, count=count)
            else:
                raise DicomError("bad_lut", f"{len(data)} bytes for {count} entries")
        else:
            values = np.atleast_1d(np.asarray(data, np.int64)) & 0xFFFF
            if len(values) < count:
                raise DicomError("bad_lut", f"{len(values)} of {count} entries")
            values = values[:count]
        values = values.astype(np.uint16)
        if int(values.max()) >> bits:
            raise DicomError("bad_lut", f"an entry over {bits} bits")
    return Lut(first, bits, values)
