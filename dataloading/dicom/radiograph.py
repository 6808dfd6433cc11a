"""DICOM radiographs in and out: read_radiograph, explain, write_radiograph, DicomError.

The parts: source.py (streams, limits, codes), values.py (single attributes), view.py, lut.py
(tables), header.py (checked values), frame.py (codecs), tone.py (arithmetic), write.py, capture.py
(a picture made of a film), phi.py.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

import numpy as np
from pydicom.uid import UID

from mlip.dataloading.dicom.frame import read_cells
from mlip.dataloading.dicom.header import Header, read_header
from mlip.dataloading.dicom.lut import Lut
from mlip.dataloading.dicom.notes import NOTES
from mlip.dataloading.dicom.phi import Leftover, check_phi
from mlip.dataloading.dicom.source import (
    CODES,
    SUFFIXES,
    DicomError,
    error_wall,
    open_regular,
    read_dataset,
)
from mlip.dataloading.dicom.tone import (
    Tone,
    apply_table,
    build_tone,
    drop_useless_padding,
    has_stray_bits,
    image_cells,
    needs_range,
    seen_cells,
)
from mlip.dataloading.dicom.view import VIEW_TAGS, read_view_as_written
from mlip.dataloading.dicom.write import write_radiograph

__all__ = [
    "CODES",
    "SUFFIXES",
    "DicomError",
    "Identity",
    "Leftover",
    "RadiographInfo",
    "check_phi",
    "explain",
    "read_identity",
    "read_radiograph",
    "write_radiograph",
]


@dataclass(frozen=True)
class RadiographInfo:
    """How the pixels came about; nothing in it identifies a patient."""

    rows: int
    columns: int
    transfer_syntax: str
    bits_stored: int
    signed: bool
    photometric: str
    inverted: bool
    modality: str
    view: str  # by view.py, upper case; empty where absent
    sex: str  # as demographics.py writes it; "" = not stated
    age: str  # whole years at the study, "90" for all over 89
    intent: str  # PresentationIntentType
    spacing_mm: tuple[float, float] | None  # between rows, between columns
    modality_step: str  # "none", "rescale" or "lut"
    voi: str  # "lut", "linear", "linear_exact", "sigmoid" or "own_range"
    window: tuple[float, float] | None  # centre and width that were used
    own_range: tuple[float, float] | None  # the image's own extremes, where nothing else was given
    notes: tuple[str, ...]  # for example "unusable_window", "first_of_several_windows"


def read_radiograph(source: str | os.PathLike[str] | bytes) -> tuple[np.ndarray, RadiographInfo]:
    """The displayed grey values of a one-frame radiograph, brighter = denser tissue.

    Order: modality LUT or rescale; VOI LUT, else the first window; MONOCHROME1 inversion; padding
    black; scaled from [0, 1] to 0..65535 without any stretch of the single image. Where there is
    neither VOI LUT nor usable window, the image's own minimum and maximum take its place (padding
    left out), which `own_range` records; such an image of one value becomes black. One under
    which an image of several values shows a single one counts as unusable.

    Shapes:  image [H, W] uint16
    Raises:  DicomError, and nothing else, with a reason code out of CODES.
    Source:  DICOM PS3.3 C.7.5.1.1.2, C.7.6.3.1, C.11.1, C.11.2; order checked against PS3.4 N.2.
    """
    with error_wall("malformed"), open_regular(source) as (file, _):
        header, stream = read_header(file)
        cells = read_cells(header, stream)
        header, tone, image = _displayed(header, cells)
    return image, _info(header, tone)


def _displayed(header: Header, cells: np.ndarray) -> tuple[Header, Tone, np.ndarray]:
    """The image, and the header without what shows nothing of it or pads nothing."""
    if has_stray_bits(header, cells):
        header = replace(header, notes=(*header.notes, "bits_over_stored"))
    seen = None
    if needs_range(header) or header.padding is not None:
        seen = seen_cells(cells)
        header = drop_useless_padding(header, seen)
    while True:
        tone = build_tone(header, seen)
        image = apply_table(cells, tone.table)
        if needs_range(header) or (header.padding is None and not _is_flat(image)):
            return header, tone, image
        seen = seen_cells(cells) if seen is None else seen
        shown = tone.table[image_cells(header, seen)]
        if len(shown) == 1 or (shown != shown[0]).any():
            return header, tone, image
        if header.voi_lut is not None:
            header = replace(header, voi_lut=None, notes=(*header.notes, "unusable_voi_lut"))
        else:
            header = replace(header, window=None, notes=(*header.notes, "unusable_window"))


def _is_flat(image: np.ndarray) -> bool:
    """Whether all pixels are equal; a few rows tell of nearly every image that they are not."""
    few = image[:: max(1, len(image) // 16)]
    return bool((few == image[0, 0]).all() and (image == image[0, 0]).all())


@dataclass(frozen=True)
class Identity:
    """Who a file belongs to: for grouping while a data set is collected, never for output."""

    patient: str
    study: str
    image: str
    modality: str  # DX, CR, CT ..., "" where absent
    accession: str  # the order's number, by which a RIS names a study
    sop_class: str  # UID of the kind of object
    burned_in: str  # BurnedInAnnotation: YES, NO or ""
    view: str  # as the header states it, for view_position.py


def read_identity(source: str | os.PathLike[str] | bytes) -> Identity:
    """The attributes of Identity, "" where absent.

    Raises:  DicomError where the header cannot be parsed.
    """
    names = (
        "PatientID StudyInstanceUID SOPInstanceUID Modality AccessionNumber SOPClassUID "
        "BurnedInAnnotation"
    ).split()
    with error_wall("malformed"), open_regular(source) as (file, _):
        dataset = read_dataset(file, [*names, *VIEW_TAGS])[2]
        said = [str(dataset.get(name) or "").strip(" \0") for name in names]
        return Identity(*[*said, read_view_as_written(dataset)])


def explain(source: str | os.PathLike[str] | bytes) -> list[str]:
    """One line a step of read_radiograph, with the lowest and highest value after it; the notes.

    Raises:  DicomError as read_radiograph.
    """
    with error_wall("malformed"), open_regular(source) as (file, size):
        header, stream = read_header(file)
        cells = read_cells(header, stream)
        seen = seen_cells(cells)
        header, tone, _ = _displayed(header, cells)
    info = _info(header, tone)
    sign = "signed" if header.signed else "unsigned"
    lines = [
        f"file: {size} bytes, transfer syntax {header.transfer_syntax} "
        f"({UID(header.transfer_syntax).name})",
        f"frame: {header.rows} x {header.columns}, {header.bits_stored} of "
        f"{header.bits_allocated} bits, {sign}, {header.photometric}",
    ]
    detail = {
        "rescale": f"slope {header.rescale[0]:g}, intercept {header.rescale[1]:g}"
        if header.rescale
        else "",
        "modality LUT": _describe_lut(header.modality_lut),
        "lut": _describe_lut(header.voi_lut),
        "own_range": "no VOI LUT and no usable window: the image's own extremes",
    }
    if tone.own_range is not None:
        detail["own_range"] += f", {tone.own_range[0]:g} and {tone.own_range[1]:g}"
    if header.padding is not None:
        detail["padding"] = "stored {:g} to {:g} is black".format(*header.padding)
    if info.window:
        detail[tone.voi] = f"centre {info.window[0]:g}, width {info.window[1]:g}"
    for name, values in tone.steps:
        low, high = values[seen].min(), values[seen].max()
        label = f"VOI {name}" if name == tone.voi else name
        extra = f" ({detail[name]})" if detail.get(name) else ""
        lines.append(f"{label}: {low:g} .. {high:g}{extra}")
    return lines + [f"note {code}: {NOTES[code]}" for code in header.notes]


def _describe_lut(lut: Lut | None) -> str:
    return f"{len(lut.values)} entries of {lut.bits} bits from {lut.first}" if lut else ""


def _info(header: Header, tone: Tone) -> RadiographInfo:
    """What became of the header that the tone was built from."""
    return RadiographInfo(
        rows=header.rows,
        columns=header.columns,
        transfer_syntax=header.transfer_syntax,
        bits_stored=header.bits_stored,
        signed=header.signed,
        photometric=header.photometric,
        inverted=any(name == "inverted" for name, _ in tone.steps),
        modality=header.modality,
        view=header.view,
        sex=header.sex,
        age=header.age,
        intent=header.intent,
        spacing_mm=header.spacing_mm,
        modality_step="lut" if header.modality_lut else "rescale" if header.rescale else "none",
        voi=tone.voi,
        window=header.window[:2] if header.window and not header.voi_lut else None,
        own_range=tone.own_range,
        notes=header.notes,
    )
