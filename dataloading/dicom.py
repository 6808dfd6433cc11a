"""DICOM radiographs in and out: read_radiograph, explain, write_radiograph, DicomError.

The parts: dicom_header.py (bytes -> checked values), dicom_frame.py (codecs), dicom_tone.py
(arithmetic), dicom_write.py (writer), dicom_phi.py (what de-identification left behind).
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np

from mlip.dataloading.dicom_frame import read_cells
from mlip.dataloading.dicom_header import (
    CODES,
    DicomError,
    Header,
    error_wall,
    open_regular,
    read_header,
)
from mlip.dataloading.dicom_tone import apply_table, build_tone, needs_range, seen_cells
from mlip.dataloading.dicom_write import write_radiograph

__all__ = ["CODES", "DicomError", "RadiographInfo", "read_radiograph", "write_radiograph"]


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
    view: str  # ViewPosition, upper case; empty where absent
    intent: str  # PresentationIntentType
    spacing_mm: tuple[float, float] | None  # between rows, between columns
    modality_step: str  # "none", "rescale" or "lut"
    voi: str  # "lut", "linear", "linear_exact", "sigmoid" or "own_range"
    window: tuple[float, float] | None  # centre and width that were used
    own_range: tuple[float, float] | None  # the image's own extremes, where nothing else was given
    notes: tuple[str, ...]  # for example "unusable_window", "first_of_several_windows"


def read_radiograph(source: str | os.PathLike[str] | bytes) -> tuple[np.ndarray, RadiographInfo]:
    """The displayed grey values of a one-frame radiograph, brighter = denser tissue.

    Order: modality LUT or rescale; VOI LUT, else the first window; MONOCHROME1 inversion; scaled
    from [0, 1] to 0..65535 without any stretch of the single image. Where there is neither VOI
    LUT nor usable window, the image's own minimum and maximum take its place (padding left out),
    which `own_range` records; such an image of one value becomes black.

    Shapes:  image [H, W] uint16
    Raises:  DicomError, and nothing else, with a reason code out of CODES.
    Source:  DICOM PS3.3 C.7.6.3.1, C.11.1, C.11.2; order checked against PS3.4 N.2.
    """
    with error_wall("malformed"), open_regular(source) as (file, _):
        header, stream = read_header(file)
        cells = read_cells(header, stream)
        tone = build_tone(header, seen_cells(cells) if needs_range(header) else None)
        image = apply_table(cells, tone.table)
    return image, _info(header, tone.voi, tone.own_range)


def _info(header: Header, voi: str, own_range: tuple[float, float] | None) -> RadiographInfo:
    constant = own_range is not None and own_range[0] == own_range[1]
    windowed = voi in ("linear", "linear_exact", "sigmoid") and header.window is not None
    return RadiographInfo(
        rows=header.rows,
        columns=header.columns,
        transfer_syntax=header.transfer_syntax,
        bits_stored=header.bits_stored,
        signed=header.signed,
        photometric=header.photometric,
        inverted=header.photometric == "MONOCHROME1" and not constant,
        modality=header.modality,
        view=header.view,
        intent=header.intent,
        spacing_mm=header.spacing_mm,
        modality_step="lut" if header.modality_lut else "rescale" if header.rescale else "none",
        voi=voi,
        window=header.window[:2] if windowed and header.window else None,
        own_range=own_range,
        notes=header.notes,
    )
