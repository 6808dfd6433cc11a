"""The lookup tables of a DICOM file: modality and VOI, checked."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from pydicom.dataset import Dataset

from mlip.dataloading.dicom.source import DicomError, error_wall
from mlip.dataloading.dicom.values import read_items, read_numbers


@dataclass(frozen=True)
class Lut:
    """A modality or VOI lookup table: input `first` and below gives values[0]."""

    first: int
    bits: int
    values: np.ndarray  # [n] uint16


def read_luts(
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
    sequence = read_items(dataset, name, "bad_lut")
    if not sequence:
        return None
    if len(sequence) > 1:
        is_voi = name.startswith("VOI")
        notes.append("first_of_several_voi_luts" if is_voi else "first_of_several_modality_luts")
    with error_wall("bad_lut"):
        item = sequence[0]
        descriptor = read_numbers(item, "LUTDescriptor") or []
        if len(descriptor) != 3:
            raise DicomError("bad_lut", "its descriptor is not three numbers")
        count, first, bits = map(int, descriptor)
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
            try:
                values = np.atleast_1d(np.asarray(data, np.int64)) & 0xFFFF
            except (TypeError, ValueError, OverflowError):
                raise DicomError("bad_lut", "entries that are no whole numbers") from None
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
