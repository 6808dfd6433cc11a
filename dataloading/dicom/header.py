"""The header of a DICOM file as checked plain values; it holds nothing that identifies anybody."""

from __future__ import annotations

from dataclasses import dataclass
from typing import BinaryIO

import pydicom
from pydicom.dataset import Dataset

from mlip.dataloading.demographics import age_between, read_age, read_sex
from mlip.dataloading.dicom.lut import Lut, read_luts
from mlip.dataloading.dicom.source import DicomError, error_wall, read_dataset
from mlip.dataloading.dicom.values import (
    is_empty,
    read_any_text,
    read_code,
    read_entries,
    read_integer,
    read_items,
    read_numbers,
    read_text,
    value_of,
)
from mlip.dataloading.dicom.view import VIEW_TAGS, read_view
from mlip.dataloading.image_limits import MAX_PIXELS, MAX_SIDE_PX
from mlip.dataloading.view_position import projection

_TAGS = (
    "Modality PatientOrientation PresentationIntentType PresentationLUTShape "
    "SamplesPerPixel "
    "PhotometricInterpretation "
    "NumberOfFrames Rows Columns BitsAllocated BitsStored HighBit PixelRepresentation "
    "PixelPaddingValue PixelPaddingRangeLimit WindowCenter WindowWidth VOILUTFunction "
    "RescaleIntercept RescaleSlope ModalityLUTSequence VOILUTSequence ImagerPixelSpacing "
    "PixelSpacing PixelAspectRatio SpecificCharacterSet SharedFunctionalGroupsSequence "
    "PerFrameFunctionalGroupsSequence PatientSex PatientAge PatientBirthDate StudyDate"
).split() + list(VIEW_TAGS)

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
    rows = read_integer(dataset, "Rows", "bad_shape")
    columns = read_integer(dataset, "Columns", "bad_shape")
    if rows < 1 or columns < 1:
        raise DicomError("bad_shape", f"{rows} x {columns}")
    if max(rows, columns) > MAX_SIDE_PX or rows * columns > MAX_PIXELS:
        raise DicomError("too_large", f"{rows} x {columns} pixels")
    frames = read_integer(dataset, "NumberOfFrames", "multi_frame", default=1)
    if frames != 1:
        raise DicomError("multi_frame", f"{frames} frames")
    _lift_groups(dataset)
    photometric = read_text(dataset, "PhotometricInterpretation")
    if not photometric:
        raise DicomError("missing_tag", "PhotometricInterpretation")
    samples = read_integer(dataset, "SamplesPerPixel", "unsupported_photometric", default=1)
    if photometric not in ("MONOCHROME1", "MONOCHROME2") or samples != 1:
        # the standard's own words only: anything else may be somebody's text
        found = photometric if photometric in _COLOURS else "another value"
        raise DicomError("unsupported_photometric", f"{found}, {samples} samples a pixel")
    allocated = read_integer(dataset, "BitsAllocated", "bad_bits")
    stored = read_integer(dataset, "BitsStored", "bad_bits")
    high = read_integer(dataset, "HighBit", "bad_bits", default=stored - 1)
    representation = read_integer(dataset, "PixelRepresentation", "bad_bits", default=0)
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
    view = read_view(dataset)
    notes = _turned(dataset, view) + ["several_views"] * ("\\" in view)
    if read_text(dataset, "PresentationLUTShape").upper() == _OTHER_SHAPE[photometric]:
        notes.append("unsure_polarity")
    sex, age = _demographics(dataset, notes)
    rescale = _rescale(dataset)
    modality_lut, voi_lut = read_luts(dataset, stored, representation == 1, rescale, notes)
    spacing = read_numbers(dataset, "ImagerPixelSpacing") or read_numbers(dataset, "PixelSpacing")
    valid_spacing = spacing is not None and len(spacing) == 2 and min(spacing) > 0
    sides = read_numbers(dataset, "PixelAspectRatio") or (spacing if valid_spacing else None)
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
        modality=read_code(dataset, "Modality"),
        view=view,
        sex=sex,
        age=age,
        intent=read_code(dataset, "PresentationIntentType"),
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
            for item in read_items(dataset, name, "malformed")[:1]:
                for inner in read_items(item, group, "malformed")[:1]:
                    for tag in tags:
                        if tag in inner and tag not in dataset:
                            dataset[tag] = inner[tag]


def _turned(dataset: Dataset, view: str) -> list[str]:
    """Notes on a film that is stored otherwise than films are hung: patient's left on the right.

    PatientOrientation names where rows and columns run to: L, F for a frontal film as it hangs.
    """
    value = value_of(dataset, "PatientOrientation")
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
    sex = read_sex(read_any_text(dataset, "PatientSex"))
    age = read_age(read_any_text(dataset, "PatientAge"), zero_years="")
    if not age:
        birth, study = (read_any_text(dataset, name) for name in ("PatientBirthDate", "StudyDate"))
        by_dates = age_between(birth, study)
        age = by_dates if by_dates or age == "" else age
    notes += [note for note, told in (("unread_sex", sex), ("unread_age", age)) if told is None]
    return sex or "", age or ""


def _padding(dataset: Dataset, signed: bool) -> tuple[int, int] | None:
    value = value_of(dataset, "PixelPaddingValue")
    limit = value_of(dataset, "PixelPaddingRangeLimit")
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
        if name not in dataset or is_empty(dataset, name):
            given.append(default)
            continue
        numbers = read_numbers(dataset, name)
        if numbers is None:
            raise DicomError("bad_rescale", f"{name} is not finite")
        given.append(numbers[0])
    if given[0] == 0.0:
        raise DicomError("bad_rescale", "slope 0")
    return given[0], given[1]


def _window(dataset: Dataset, notes: list[str]) -> tuple[float, float, str] | None:
    if "WindowCenter" not in dataset and "WindowWidth" not in dataset:
        return None
    centres, widths = (
        read_entries(dataset, name) or [] for name in ("WindowCenter", "WindowWidth")
    )
    windows = [
        (centre, width)
        for centre, width in zip(centres, widths, strict=False)
        if centre is not None and width is not None
    ]
    function = read_text(dataset, "VOILUTFunction").upper() or "LINEAR"
    if function not in ("LINEAR", "LINEAR_EXACT", "SIGMOID"):
        notes.append("unknown_voi_function")
        function = "LINEAR"
    if not windows or windows[0][1] <= 0 or (function == "LINEAR" and windows[0][1] < 1):
        notes.append("unusable_window")
        return None
    if sum(centre is not None for centre in centres) > 1:
        notes.append("first_of_several_windows")
    return *windows[0], function
