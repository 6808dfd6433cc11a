"""The header of a DICOM file as checked plain values; it holds nothing that identifies anybody."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import pydicom
from pydicom.dataset import Dataset

from mlip.dataloading.demographics import age_between, read_age, read_sex
from mlip.dataloading.dicom_source import (
    MAX_PIXELS,
    MAX_SIDE_PX,
    DicomError,
    error_wall,
    read_dataset,
)
from mlip.dataloading.view_position import projection

_TAGS = (
    "Modality ViewPosition PatientOrientation PresentationIntentType PresentationLUTShape "
    "SamplesPerPixel "
    "PhotometricInterpretation "
    "NumberOfFrames Rows Columns BitsAllocated BitsStored HighBit PixelRepresentation "
    "PixelPaddingValue PixelPaddingRangeLimit WindowCenter WindowWidth VOILUTFunction "
    "RescaleIntercept RescaleSlope ModalityLUTSequence VOILUTSequence ImagerPixelSpacing "
    "PixelSpacing PixelAspectRatio SpecificCharacterSet SharedFunctionalGroupsSequence "
    "PerFrameFunctionalGroupsSequence PatientSex PatientAge PatientBirthDate StudyDate"
).split()

# Where the enhanced image objects keep what others have at the top (PS3.3 C.7.6.16).
_GROUPS = {
    "FrameVOILUTSequence": ("WindowCenter", "WindowWidth", "VOILUTFunction", "VOILUTSequence"),
    "PixelValueTransformationSequence": ("RescaleSlope", "RescaleIntercept"),
    "PixelMeasuresSequence": ("PixelSpacing",),
}
# what PS3.3 C.8.11.3.1.2 excludes: one says that high values are white, the other black
_OTHER_SHAPE = {"MONOCHROME1": "IDENTITY", "MONOCHROME2": "INVERSE"}
_SQUARE = 1.05  # a larger ratio of a pixel's sides would squash the chest visibly

UNREAD = frozenset({"unread_sex", "unread_age"})  # notes on what stands there and tells nothing

_COLOURS = frozenset(
    "MONOCHROME1|MONOCHROME2|PALETTE COLOR|RGB|HSV|ARGB|CMYK|YBR_FULL|YBR_FULL_422|"
    "YBR_PARTIAL_422|YBR_PARTIAL_420|YBR_ICT|YBR_RCT|XYB".split("|")
)


@dataclass(frozen=True)
class Lut:
    """A modality or VOI lookup table: input `first` and below gives values[0]."""

    first: int
    bits: int
    values: np.ndarray  # [n] uint16


@dataclass(frozen=True)
class Header:
    """What the pixel chain needs, view, sex and age, checked: nothing that identifies anybody."""

    transfer_syntax: str
    rows: int
    columns: int
    bits_allocated: int
    bits_stored: int
    signed: bool
    photometric: str
    modality: str
    view: str
    sex: str
    age: str
    intent: str
    spacing_mm: tuple[float, float] | None
    padding: tuple[int, int] | None  # lowest and highest stored value that is no image
    rescale: tuple[float, float] | None  # slope, intercept
    modality_lut: Lut | None
    window: tuple[float, float, str] | None  # centre, width, function
    voi_lut: Lut | None
    notes: tuple[str, ...]


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
    _lift_groups(dataset)
    photometric = _text(dataset, "PhotometricInterpretation")
    if not photometric:
        raise DicomError("missing_tag", "PhotometricInterpretation")
    samples = _integer(dataset, "SamplesPerPixel", "unsupported_photometric", default=1)
    if photometric not in ("MONOCHROME1", "MONOCHROME2") or samples != 1:
        # the standard's own words only: anything else may be somebody's text
        found = photometric if photometric in _COLOURS else "another value"
        raise DicomError("unsupported_photometric", f"{found}, {samples} samples a pixel")
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
    view = _codes(dataset, "ViewPosition")
    notes = _turned(dataset, view) + ["several_views"] * ("\\" in view)
    if _text(dataset, "PresentationLUTShape").upper() == _OTHER_SHAPE[photometric]:
        notes.append("unsure_polarity")
    sex, age = _demographics(dataset, notes)
    rescale = _rescale(dataset)
    modality_lut, voi_lut = _luts(dataset, stored, representation == 1, rescale, notes)
    spacing = _numbers(dataset, "ImagerPixelSpacing") or _numbers(dataset, "PixelSpacing")
    valid_spacing = spacing is not None and len(spacing) == 2 and min(spacing) > 0
    sides = _numbers(dataset, "PixelAspectRatio") or (spacing if valid_spacing else None)
    if sides and len(sides) == 2 and min(sides) > 0 and max(sides) > _SQUARE * min(sides):
        raise DicomError("non_square", f"{max(sides) / min(sides):.2f} to 1")
    return Header(
        transfer_syntax=syntax,
        rows=rows,
        columns=columns,
        bits_allocated=allocated,
        bits_stored=stored,
        signed=representation == 1,
        photometric=photometric,
        modality=_code(dataset, "Modality"),
        view=view,
        sex=sex,
        age=age,
        intent=_code(dataset, "PresentationIntentType"),
        spacing_mm=(spacing[0], spacing[1]) if spacing and valid_spacing else None,
        padding=_padding(dataset, representation == 1),
        rescale=rescale,
        modality_lut=modality_lut,
        window=_window(dataset, notes),
        voi_lut=voi_lut,
        notes=tuple(notes),
    )


def _lift_groups(dataset: Dataset) -> None:
    """Copies what the one frame's functional groups say to the top, unless it stands there."""
    for name in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"):
        for group, tags in _GROUPS.items():
            for item in (_value(dataset, name) or [])[:1]:
                for inner in (_value(item, group) or [])[:1]:
                    for tag in tags:
                        if tag in inner and tag not in dataset:
                            dataset[tag] = inner[tag]


def _turned(dataset: Dataset, view: str) -> list[str]:
    """Notes on a film that is stored otherwise than films are hung: patient's left on the right.

    PatientOrientation names where rows and columns run to: L, F for a frontal film as it hangs.
    """
    value = _value(dataset, "PatientOrientation")
    if not isinstance(value, pydicom.multival.MultiValue) or len(value) != 2:
        return []
    rows, columns = (str(end).strip().upper()[:1] or "-" for end in value)
    if rows in "HF" and columns in "LRAP":
        return ["on_its_side"]
    if rows not in "LRAP" or columns not in "HF":
        return []
    notes = ["mirrored"] if rows == "R" and projection(view) != "LATERAL" else []
    return [*notes, "upside_down"] if columns == "H" else notes


def _demographics(dataset: Dataset, notes: list[str]) -> tuple[str, str]:
    """Sex and age at the study; the dates that may tell the age go no further than this.

    000Y, and 0 without a unit, are what devices write for a gap: infants are told in days to
    months, or by their birth date.
    """
    sex = read_sex(_said(dataset, "PatientSex"))
    age = read_age(_said(dataset, "PatientAge"), zero_years="")
    if not age:
        birth, study = (_said(dataset, name) for name in ("PatientBirthDate", "StudyDate"))
        by_dates = age_between(birth, study)
        age = by_dates if by_dates or age == "" else age
    notes += [note for note, told in (("unread_sex", sex), ("unread_age", age)) if told is None]
    return sex or "", age or ""


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
    """The numbers that are there; None where there is none, or one that is not finite."""
    entries = _entries(dataset, name)
    return [entry for entry in entries or [] if entry is not None] or None


def _entries(dataset: Dataset, name: str) -> list[float | None] | None:
    """As _numbers, with None where an entry is blank, so that two attributes stay side by side."""
    value = _value(dataset, name)
    if value is None:
        return None
    values = value if isinstance(value, list | pydicom.multival.MultiValue) else [value]
    try:
        entries = [None if v is None or str(v).strip() == "" else float(v) for v in values]
    except (TypeError, ValueError, OverflowError):
        return None
    return entries if all(entry is None or np.isfinite(entry) for entry in entries) else None


def _text(dataset: Dataset, name: str) -> str:
    value = _value(dataset, name)
    return value.strip(" \0") if isinstance(value, str) else ""


def _said(dataset: Dataset, name: str) -> str:
    """As _text, of a number or of several values too: those tell nothing, and are no gap."""
    value = _value(dataset, name)
    return "" if value is None else str(value).strip(" \0")


def _codes(dataset: Dataset, name: str) -> str:
    """As _code; several values, where one is allowed, with the backslash of the file between."""
    value = _value(dataset, name)
    if not isinstance(value, pydicom.multival.MultiValue):
        return _code(dataset, name)
    codes = [_as_code(str(part).strip(" \0")) for part in value if str(part).strip(" \0")]
    return "\\".join(dict.fromkeys(codes)) if all(codes) else ""


def _code(dataset: Dataset, name: str) -> str:
    """A code string; anything that is none, free text for instance, is dropped."""
    return _as_code(_text(dataset, name))


def _as_code(text: str) -> str:
    valid = len(text) <= 16 and all(c.isascii() and (c.isalnum() or c in " _") for c in text)
    return text.upper() if valid else ""


def _padding(dataset: Dataset, signed: bool) -> tuple[int, int] | None:
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
    centres, widths = (_entries(dataset, name) or [] for name in ("WindowCenter", "WindowWidth"))
    windows = [
        (centre, width)
        for centre, width in zip(centres, widths, strict=False)
        if centre is not None and width is not None
    ]
    function = _text(dataset, "VOILUTFunction").upper() or "LINEAR"
    if function not in ("LINEAR", "LINEAR_EXACT", "SIGMOID"):
        notes.append("unknown_voi_function")
        function = "LINEAR"
    if not windows or windows[0][1] <= 0 or (function == "LINEAR" and windows[0][1] < 1):
        notes.append("unusable_window")
        return None
    if sum(centre is not None for centre in centres) > 1:
        notes.append("first_of_several_windows")
    return *windows[0], function


def _luts(
    dataset: Dataset,
    stored: int,
    signed: bool,
    rescale: tuple[float, float] | None,
    notes: list[str],
) -> tuple[Lut | None, Lut | None]:
    """Modality and VOI table; the second begins among what the modality step gives."""
    lowest = -float(1 << stored - 1) if signed else 0.0
    inputs = [lowest, lowest + (1 << stored) - 1]
    modality = _lut(dataset, "ModalityLUTSequence", inputs, notes)
    if modality is not None:
        inputs = [0.0, float((1 << modality.bits) - 1)]
    elif rescale is not None:
        inputs = sorted(value * rescale[0] + rescale[1] for value in inputs)
    return modality, _lut(dataset, "VOILUTSequence", inputs, notes)


def _lut(dataset: Dataset, name: str, inputs: list[float], notes: list[str]) -> Lut | None:
    """The first table of a sequence, None where there is none; inputs: lowest, highest."""
    sequence = _value(dataset, name)
    if not sequence:
        return None
    if len(sequence) > 1:
        notes.append(f"first_of_several_{'voi' if name.startswith('VOI') else 'modality'}_luts")
    with error_wall("bad_lut"):
        item = sequence[0]
        count, first, bits = (int(v) for v in item["LUTDescriptor"].value)
        count = (count & 0xFFFF) or 1 << 16
        first = _first_input(first & 0xFFFF, count, inputs)
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
        if name == "VOILUTSequence" and int(values.max()) < (1 << bits) >> 3:
            # 12-bit entries called 16-bit ones: the film would be nearly black
            raise DicomError("bad_lut", f"no entry over an eighth of what {bits} bits hold")
    return Lut(first, bits, values)


def _first_input(first: int, count: int, inputs: list[float]) -> int:
    """Where a table begins, from the 16 bits that its descriptor holds.

    By PS3.3 C.11.2.1.1 the number is signed where an input may be: writers and implicit VR go by
    the pixels' sign instead, so a table that would miss every input is read in the other way.
    """
    lowest, highest = inputs
    readings = [first - (1 << 16), first] if first >= 1 << 15 else [first]
    if lowest >= 0:
        readings.reverse()
    hits = [start for start in readings if start <= highest and start + count > lowest]
    return (hits or readings)[0]
