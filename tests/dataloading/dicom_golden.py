"""The displayed values of a radiograph in float64 NumPy, from DICOM PS3.3 C.11.1 and C.11.2.

And files with attributes replaced to hold against it; shared by the tests of the DICOM reader.
"""

import io
from pathlib import Path

import imagecodecs
import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate

from mlip.dataloading.dicom.radiograph import write_radiograph

ENCODING = {
    pydicom.uid.ImplicitVRLittleEndian: {"implicit_vr": True, "little_endian": True},
    pydicom.uid.ExplicitVRLittleEndian: {"implicit_vr": False, "little_endian": True},
    pydicom.uid.DeflatedExplicitVRLittleEndian: {"implicit_vr": False, "little_endian": True},
    pydicom.uid.ExplicitVRBigEndian: {"implicit_vr": False, "little_endian": False},
}


def golden(dataset: Dataset, stored: np.ndarray) -> np.ndarray:
    """Displayed values of a stored array, in plain float64, step by step."""
    values = stored.astype(np.float64)
    if "ModalityLUTSequence" in dataset:
        values = _lut(dataset.ModalityLUTSequence[0], values)[0]
    elif "RescaleSlope" in dataset:
        values = values * float(dataset.RescaleSlope) + float(dataset.RescaleIntercept)
    if "VOILUTSequence" in dataset:
        values, white = _lut(dataset.VOILUTSequence[0], values)
        unit = values / white
    elif "WindowWidth" in dataset:
        centre, width = (
            float(np.atleast_1d(np.asarray(dataset[name].value, dtype=object))[0])
            for name in ("WindowCenter", "WindowWidth")
        )
        function = dataset.get("VOILUTFunction", "LINEAR")
        unit = np.empty_like(values)
        if function == "SIGMOID":
            unit = 1 / (1 + np.exp(-4 * (values - centre) / width))
        else:
            left, right = (
                (centre - 0.5 - (width - 1) / 2, centre - 0.5 + (width - 1) / 2)
                if function == "LINEAR"
                else (centre - width / 2, centre + width / 2)
            )
            above, below = values > right, values <= left
            unit[below], unit[above] = 0.0, 1.0
            ramp = ~above & ~below
            unit[ramp] = (values[ramp] - left) / max(right - left, 1e-300)
    else:
        image = values
        if "PixelPaddingValue" in dataset:
            image = values[stored != dataset.PixelPaddingValue]
        unit = np.clip((values - image.min()) / (image.max() - image.min()), 0, 1)
    if dataset.PhotometricInterpretation == "MONOCHROME1":
        unit = 1.0 - unit
    if "PixelPaddingValue" in dataset:
        unit[stored == dataset.PixelPaddingValue] = 0.0
    return unit * 65535


def assert_nearest(image: np.ndarray, expected: np.ndarray, slack: float = 0.0) -> None:
    """Every pixel is the whole number nearest to the real one (both, at an exact half)."""
    assert image.dtype == np.uint16 and image.shape == expected.shape
    assert np.abs(image - expected).max() <= 0.5 + 1e-6 + slack


def _lut(item: Dataset, values: np.ndarray) -> tuple[np.ndarray, int]:
    count, first, bits = item.LUTDescriptor
    table = np.asarray(item.LUTData, np.float64)
    assert len(table) == count
    return table[np.clip(values - first, 0, count - 1).astype(int)], 2**bits - 1


def edited(tmp_path: Path, image: np.ndarray, **changes: object) -> tuple[Dataset, bytes]:
    """A written file with attributes replaced; None deletes one, `cells` are raw pixel cells."""
    path = tmp_path / "base.dcm"
    write_radiograph(path, image, patient_id="p", study_id="s")
    dataset = pydicom.dcmread(path)
    for name, value in changes.items():
        if name == "cells":
            cells = np.asarray(value)
            dataset.Rows, dataset.Columns = cells.shape
            dataset.BitsAllocated = 8 * cells.dtype.itemsize
            data = cells.tobytes()
            dataset.PixelData = data + b"\0" * (len(data) % 2)
        elif value is None:
            del dataset[name]
        elif name.startswith("PixelPadding"):
            dataset.add_new(name, "SS" if dataset.PixelRepresentation else "US", value)
        elif name == "syntax":
            dataset.file_meta.TransferSyntaxUID = value
        else:
            setattr(dataset, name, value)
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, dataset, **ENCODING[dataset.file_meta.TransferSyntaxUID])
    return dataset, buffer.getvalue()


def compressed(
    tmp_path: Path, cells: np.ndarray, frame: bytes, syntax: str, bits: int, **changes: object
) -> bytes:
    """A file around a code stream; `cells` give shape and allocated bits, `changes` as above."""
    changes = {"BitsStored": bits, "HighBit": bits - 1} | changes
    dataset, _ = edited(tmp_path, noise(16), cells=cells, **changes)
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.PixelData = encapsulate([bytes(frame)])
    dataset["PixelData"].VR = "OB"
    dataset["PixelData"].is_undefined_length = True
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, dataset)
    return buffer.getvalue()


def htj2k(cells: np.ndarray) -> bytes:
    """A lossless HTJ2K code stream; every imagecodecs that setup.py takes reads one."""
    if not hasattr(imagecodecs, "htj2k_encode"):
        pytest.skip("imagecodecs before 2026.1 cannot write HTJ2K")
    return bytes(imagecodecs.htj2k_encode(cells))


def noise(bits: int, shape: tuple[int, int] = (37, 53), seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 1 << bits, shape).astype(np.uint16)
