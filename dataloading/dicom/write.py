"""A valid DX or CR file from a 16-bit image: what the phantoms and the tests write."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import imagecodecs
import numpy as np
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    ComputedRadiographyImageStorage,
    DigitalXRayImageStorageForPresentation,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    generate_uid,
)

_SYNTAXES = {
    "explicit": ExplicitVRLittleEndian,
    "jpegls": JPEGLSLossless,
    "jpeg2000": JPEG2000Lossless,
}


def write_radiograph(
    path: str | os.PathLike[str],
    image: np.ndarray,
    *,
    patient_id: str,
    study_id: str,
    image_id: str = "1",
    view: str = "PA",
    photometric: Literal["MONOCHROME1", "MONOCHROME2"] = "MONOCHROME2",
    modality: Literal["DX", "CR"] = "DX",
    bits_stored: int = 16,
    syntax: Literal["explicit", "jpegls", "jpeg2000"] = "explicit",
    spacing_mm: float = 0.14,
) -> None:
    """Write `image` so that read_radiograph gives it back: exactly at 16 bits, else rounded.

    The window spans the whole range of the stored bits. UIDs follow from the three ids, that of the
    series from the modality too, so equal calls write equal files; the file appears at `path`
    complete or not at all.

    Shapes:  image [H, W] uint16, brighter = denser
    Raises:  ValueError for another dtype or shape, or a setting outside its list.
    Source:  DICOM PS3.3 A.26 (DX), A.2 (CR).
    """
    if image.dtype != np.uint16 or image.ndim != 2 or 0 in image.shape:
        raise ValueError(f"expected a uint16 image [H, W], got {image.dtype} {image.shape}")
    for name, value, allowed in (
        ("photometric", photometric, ("MONOCHROME1", "MONOCHROME2")),
        ("modality", modality, ("DX", "CR")),
        ("syntax", syntax, tuple(_SYNTAXES)),
    ):
        if value not in allowed:
            raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {value!r}")
    if not 8 <= bits_stored <= 16:
        raise ValueError(f"bits_stored: expected 8 to 16, got {bits_stored}")
    white = (1 << bits_stored) - 1
    stored = (image.astype(np.uint32) * white + 32_767) // 65_535
    if photometric == "MONOCHROME1":
        stored = white - stored
    cells = stored.astype(np.uint8 if bits_stored == 8 else np.uint16)

    dataset = _describe(patient_id, study_id, image_id, modality)
    dataset.ViewPosition = view
    dataset.PhotometricInterpretation = photometric
    dataset.PresentationLUTShape = "INVERSE" if photometric == "MONOCHROME1" else "IDENTITY"
    dataset.PixelIntensityRelationshipSign = 1 if photometric == "MONOCHROME1" else -1
    dataset.Rows, dataset.Columns = image.shape
    dataset.SamplesPerPixel = 1
    dataset.BitsAllocated = 8 * cells.dtype.itemsize
    dataset.BitsStored = bits_stored
    dataset.HighBit = bits_stored - 1
    dataset.PixelRepresentation = 0
    dataset.ImagerPixelSpacing = [spacing_mm, spacing_mm]
    # centre and width for which the LINEAR function is stored / white
    dataset.WindowCenter, dataset.WindowWidth = (white + 1) // 2, white + 1
    if syntax == "explicit":
        data = cells.astype(cells.dtype.newbyteorder("<"), copy=False).tobytes()
        dataset.PixelData = data + b"\0" * (len(data) % 2)
    elif syntax == "jpegls":
        room = 2 * cells.nbytes + 1024  # noise grows; imagecodecs' own estimate is too small
        dataset.PixelData = encapsulate([bytes(imagecodecs.jpegls_encode(cells, out=room))])
    else:
        code = imagecodecs.jpeg2k_encode(cells, level=0, codecformat="J2K", reversible=True)
        dataset.PixelData = encapsulate([bytes(code)])
    dataset["PixelData"].VR = "OB" if cells.dtype == np.uint8 or syntax != "explicit" else "OW"
    dataset["PixelData"].is_undefined_length = syntax != "explicit"
    dataset.file_meta.TransferSyntaxUID = _SYNTAXES[syntax]

    target = Path(path)
    partial = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        dataset.save_as(partial, enforce_file_format=True)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def _describe(patient_id: str, study_id: str, image_id: str, modality: str) -> FileDataset:
    """Every type 1 and 2 attribute of the object that does not depend on the pixels."""
    meta = FileMetaDataset()
    uid = {
        # joined by what no id holds: patient 1, study 11 is not patient 11, study 1
        level: generate_uid(entropy_srcs=["\0".join(("mlip", level, patient_id, study_id, *more))])
        for level, more in (("study", ()), ("series", (modality,)), ("image", (image_id,)))
    }
    digital = modality == "DX"
    meta.MediaStorageSOPClassUID = (
        DigitalXRayImageStorageForPresentation if digital else ComputedRadiographyImageStorage
    )
    meta.MediaStorageSOPInstanceUID = uid["image"]
    dataset = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    dataset.SOPClassUID = meta.MediaStorageSOPClassUID
    dataset.SOPInstanceUID = uid["image"]
    dataset.StudyInstanceUID = uid["study"]
    dataset.SeriesInstanceUID = uid["series"]
    dataset.PatientID = patient_id
    dataset.StudyID = study_id[:16]
    dataset.Modality = modality
    dataset.BodyPartExamined = "CHEST"
    dataset.ImageType = ["ORIGINAL", "PRIMARY"] + ([""] if digital else [])
    dataset.SeriesNumber = 1
    dataset.InstanceNumber = 1
    dataset.BurnedInAnnotation = "NO"
    dataset.LossyImageCompression = "00"
    dataset.PatientIdentityRemoved = "YES"
    dataset.DeidentificationMethod = "generated, no patient"
    dataset.RescaleIntercept, dataset.RescaleSlope, dataset.RescaleType = 0, 1, "US"
    for name in (
        "PatientName PatientBirthDate PatientSex StudyDate StudyTime ReferringPhysicianName "
        "AccessionNumber Manufacturer PatientOrientation KVP"
    ).split():
        setattr(dataset, name, None)
    if digital:
        dataset.PresentationIntentType = "FOR PRESENTATION"
        dataset.PixelIntensityRelationship = "LOG"
        dataset.ImageLaterality = "U"
        dataset.DetectorType = None
        dataset.AcquisitionContextSequence = []
        chest = Dataset()
        chest.CodeValue, chest.CodingSchemeDesignator = "51185008", "SCT"
        chest.CodeMeaning = "Chest"
        dataset.AnatomicRegionSequence = [chest]
    return dataset
