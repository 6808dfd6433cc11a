"""A colour picture made of a film, as a DICOM object of the film's own study: a Secondary Capture.

What was chosen, and why:

object      one single-frame Secondary Capture, RGB of 8 bits, uncompressed: the kind of colour
            picture that asks least of an archive and a viewer, where a multi-frame kind may be
            unknown to the one and played by the other. All that was asked at once stands side by
            side in one picture, because its maps share one scale.
library     pydicom, which is here already. highdicom 0.28's object parses dates and sex anew and
            refuses some that films have, needs an orientation, stamps the time, prints a warning
            that quotes the name of a patient where it has no caret, and brings a codec.
identity    copied as bytes, with the character set that they are written in: nothing is decoded,
            so nothing can be lost or read wrongly, and what de-identification wrote stays as it is.
UIDs        follow from all that the object holds: equal calls write equal bytes, which an archive
            takes for one object, and one UID never has two contents. So no time of making is
            written. Each object is a series of its own, which viewers list by its description.
modality    OT: it is no film to whoever goes by modality, and `mlip prepare folder` leaves
            secondary captures of OT out.
spacing     none: a distance across two pictures of a sheet is none of the patient. No frame of
            reference either, for a place on the sheet is not that place on the film. The rows run
            to the same side as the film's, so PatientOrientation and the laterality stay.
derivation  in words: DICOM's codes have none for a map of words (CID 7203).

Source:  DICOM PS3.3 A.8.1 (Secondary Capture Image), C.7.6.1, C.8.6, C.12.1.
"""

from __future__ import annotations

import copy
import hashlib
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pydicom
from pydicom.charset import convert_encodings, default_encoding, encode_string
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset
from pydicom.tag import BaseTag, Tag
from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

import mlip
from mlip.dataloading.dicom.source import (
    DicomError,
    error_wall,
    open_regular,
    read_dataset,
)
from mlip.dataloading.dicom.values import read_any_text, read_text

NOTICE = "Research only. Not for clinical use."
MAKER, TOOL = "MLIP", "mlip ground"  # Manufacturer, and by which our own objects are known
MAX_SIDE_PX = 65_535  # Rows and Columns have 16 bits
_SERIES_NUMBER = 9900  # behind the films in a viewer's list

_UIDS = ("StudyInstanceUID", "SOPClassUID", "SOPInstanceUID")  # without them no place to belong to
# type 2: they stand there empty where the film says nothing
_STATED = (
    "PatientName PatientID PatientBirthDate PatientSex StudyDate StudyTime ReferringPhysicianName "
    "StudyID AccessionNumber PatientOrientation"
).split()
_KEPT = (
    "SpecificCharacterSet TimezoneOffsetFromUTC IssuerOfPatientID "
    "IssuerOfPatientIDQualifiersSequence IssuerOfAccessionNumberSequence StudyDescription "
    "PatientIdentityRemoved DeidentificationMethod DeidentificationMethodCodeSequence "
    "LongitudinalTemporalInformationModified BurnedInAnnotation RecognizableVisualFeatures "
    "BodyPartExamined Laterality ImageLaterality "
    "LossyImageCompression LossyImageCompressionRatio LossyImageCompressionMethod"
).split()
# of which bytes mean the same in every transfer syntax
_TEXTS = frozenset("AE AS CS DA DS DT IS LO LT PN SH ST TM UC UI UR UT".split())
_LOSSY = {  # syntaxes of lossy codecs, and their names in PS3.3 C.7.6.1.1.5.1
    "1.2.840.10008.1.2.4.50": "ISO_10918_1",
    "1.2.840.10008.1.2.4.51": "ISO_10918_1",
    "1.2.840.10008.1.2.4.81": "ISO_14495_1",
    "1.2.840.10008.1.2.4.91": "ISO_15444_1",
    "1.2.840.10008.1.2.4.203": "ISO_15444_15",
}
_IS_UID = re.compile(r"[0-9.]{1,64}")


@dataclass(frozen=True)
class Film:
    """What an object made of a film says of its patient, study and film: never for a message."""

    carried: Dataset
    sop_class: str
    sop_instance: str


def read_film(source: bytes) -> Film:
    """What has to be carried over; asked for before the work that the object is made of.

    Raises:  DicomError: missing_tag or malformed with the attribute's name, and whatever keeps the
             header from being read; no value is told.
    """
    with error_wall("malformed"), open_regular(source) as (file, _):
        syntax, _, dataset = read_dataset(file, [*_UIDS, *_STATED, *_KEPT])
        # before pydicom is asked for a value, which it then keeps converted
        carried = _copied(dataset, [Tag(name) for name in [*_STATED, *_KEPT]])
        uids = {}
        for name in _UIDS:
            uids[name] = read_any_text(dataset, name)
            if not uids[name]:
                raise DicomError("missing_tag", name)
            if not _IS_UID.fullmatch(uids[name]):
                raise DicomError("malformed", f"{name} is no UID")
        for name in _KEPT:
            value = carried.get_item(name).value if name in carried else b""
            if not (value.strip(b" \0") if isinstance(value, bytes) else value):
                carried.pop(name, None)  # may be absent, and some may not be empty
        if "ImageLaterality" in carried:
            carried.pop("Laterality", None)  # one of them (C.7.3.1)
        elif "BodyPartExamined" not in carried and "Laterality" not in carried:
            carried.Laterality = None  # it may be one of a pair, which nobody said
        for name in _STATED:
            if name not in carried:
                setattr(carried, name, None)
        carried.StudyInstanceUID = uids["StudyInstanceUID"]
        _state_loss(carried, syntax)
        _require_known_charset(carried)
    return Film(carried, uids["SOPClassUID"], uids["SOPInstanceUID"])


def _copied(source: Dataset, tags: Sequence[BaseTag]) -> Dataset:
    """Attributes as their bytes are in the file; left out are those of another kind than text, and
    in items private ones and those that no dictionary has, lengths of groups among them."""
    made = Dataset()
    for tag in tags:
        element = source.get_item(tag)
        if element is None or tag.is_private or not pydicom.datadict.dictionary_has_tag(tag):
            continue
        representation = pydicom.datadict.dictionary_VR(tag)
        if representation == "SQ":
            found = element.value or []
            # text, or bytes that read_dataset could not open
            if not isinstance(found, list | pydicom.Sequence):
                raise DicomError("malformed", pydicom.datadict.keyword_for_tag(tag))
            items = [_copied(item, list(item.keys())) for item in found]
            made[tag] = pydicom.DataElement(tag, "SQ", items)
        elif representation in _TEXTS:
            made[tag] = _raw(tag, representation, element.value or b"")
    return made


def _keep_bytes(dataset: Dataset) -> None:
    """Mark a data set, items too, as read in the encoding that it is written in.

    What was read in another one pydicom decodes and encodes anew: a trailing escape of a Korean
    name was lost on the way.
    """
    dataset.set_original_encoding(False, True, dataset._character_set)
    for element in list(dataset.elements()):
        if element.VR == "SQ":
            for item in dataset[element.tag].value:
                _keep_bytes(item)


def _raw(tag: BaseTag, representation: str, value: bytes) -> RawDataElement:
    if len(value) > 65_534:  # what the length of most kinds has room for
        raise DicomError("malformed", f"{pydicom.datadict.keyword_for_tag(tag)} is too long")
    if len(value) % 2:
        value += b"\0" if representation == "UI" else b" "
    return RawDataElement(tag, representation, len(value), value, 0, False, True)


def _state_loss(carried: Dataset, syntax: str) -> None:
    """A picture of pixels that were once compressed with loss says so for good (C.7.6.1.1.5)."""
    if syntax in _LOSSY and read_text(carried, "LossyImageCompression") not in ("00", "01"):
        carried.LossyImageCompression = "01"
    if read_text(carried, "LossyImageCompression") != "01":
        for name in ("LossyImageCompressionRatio", "LossyImageCompressionMethod"):
            carried.pop(name, None)
    elif syntax in _LOSSY and "LossyImageCompressionMethod" not in carried:
        carried.LossyImageCompressionMethod = _LOSSY[syntax]


def capture(film: Film, pixels: np.ndarray, *, phrases: Sequence[str], model: str) -> bytes:
    """A DICOM file: the picture, in the study of its film.

    phrases  what was asked, for the descriptions; a character that the film's character set lacks
             stands there as "?"
    model    what tells its weights from others, at most 57 characters

    Shapes:  pixels [H, W, 3] uint8, red first
    Raises:  ValueError for pixels of another kind, or more than DICOM has room for
    """
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
        raise ValueError(f"expected pixels [H, W, 3] uint8, got {pixels.dtype} {pixels.shape}")
    if max(pixels.shape) > MAX_SIDE_PX:
        raise ValueError(
            f"a picture of {pixels.shape[1]} x {pixels.shape[0]} px: a DICOM image has at most "
            f"{MAX_SIDE_PX} rows and columns; ask of fewer phrases at once, or name a PNG file"
        )
    with error_wall("malformed"):
        dataset = _describe(film, phrases, model)
        dataset.Rows, dataset.Columns = pixels.shape[:2]
        dataset.add_new("PixelData", "OB", pixels.tobytes())
        _keep_bytes(dataset)
        # of all of it: what differs in anything is another object
        content = DicomBytesIO()
        content.is_little_endian, content.is_implicit_VR = True, False
        write_dataset(content, dataset)
        digest = hashlib.sha256(content.getvalue()).hexdigest()
        for name in ("SeriesInstanceUID", "SOPInstanceUID"):
            setattr(dataset, name, generate_uid(entropy_srcs=[name, digest]))
        dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
        file = io.BytesIO()
        dataset.save_as(file, enforce_file_format=True)
    return file.getvalue()


def _describe(film: Film, phrases: Sequence[str], model: str) -> FileDataset:
    """All but the pixels and the object's own UIDs."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    # its own copy: a data set that is made of another one shares its attributes
    dataset = FileDataset("", copy.deepcopy(film.carried), file_meta=meta, preamble=b"\0" * 128)
    dataset.SOPClassUID = SecondaryCaptureImageStorage
    dataset.Modality = "OT"
    dataset.ConversionType = "WSD"
    dataset.ImageType = ["DERIVED", "SECONDARY"]
    dataset.ContentQualification = "RESEARCH"
    dataset.Manufacturer, dataset.ManufacturerModelName = MAKER, TOOL
    dataset.SoftwareVersions = [f"mlip {mlip.__version__}", f"model {model}"]
    dataset.SeriesNumber, dataset.InstanceNumber = _SERIES_NUMBER, 1
    quoted = ", ".join(f'"{phrase}"' for phrase in phrases)
    for name, text, most in (
        ("SeriesDescription", f"MLIP, research only: {quoted}", 64),
        (
            "DerivationDescription",
            f"Heat maps by {TOOL} {mlip.__version__}, model {model}. {NOTICE} Asked: {quoted}",
            1024,
        ),
    ):
        tag = Tag(name)
        written = _encoded(text, most, dataset)
        dataset[tag] = _raw(tag, pydicom.datadict.dictionary_VR(tag), written)
    source, purpose = Dataset(), Dataset()
    source.ReferencedSOPClassUID = film.sop_class
    source.ReferencedSOPInstanceUID = film.sop_instance
    source.SpatialLocationsPreserved = "NO"
    purpose.CodeValue, purpose.CodingSchemeDesignator = "121322", "DCM"
    purpose.CodeMeaning = "Source image for image processing operation"
    source.PurposeOfReferenceCodeSequence = [purpose]
    dataset.SourceImageSequence = [source]
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 3, "RGB"
    dataset.PlanarConfiguration = dataset.PixelRepresentation = 0
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 8, 8, 7
    return dataset


def _require_known_charset(carried: Dataset) -> None:
    """Raises:  DicomError: pydicom takes the name of any codec of Python, of which some are of no
    text, and would refuse the description when the work is done"""
    try:
        _encoded("", 1, carried)
    except LookupError:
        raise DicomError("malformed", "SpecificCharacterSet") from None


def _encoded(text: str, most: int, dataset: Dataset) -> bytes:
    """A description in the data set's character set, cut to its room; "?" for what that lacks."""
    # a backslash parts values, control characters switch sets
    plain = "".join(c if c.isprintable() and c != "\\" else " " for c in text)
    plain = plain if len(plain) <= most else plain[: most - 3] + "..."
    sets = convert_encodings(dataset.get("SpecificCharacterSet"))
    # pydicom reads the default set, which is ASCII, as Latin-1, and would write that
    return encode_string(plain, ["ascii" if name == default_encoding else name for name in sets])


def is_capture(path: Path) -> bool:
    """Whether `capture` made this file, also where it went through an archive since."""
    if not path.is_file():
        return False
    try:
        # of any size, a film's bound does not hold: of many phrases it is over 512 MiB
        with error_wall("malformed"), path.open("rb") as file:
            said = read_dataset(file, ["SOPClassUID", "ManufacturerModelName"])[2]
            kind = read_text(said, "SOPClassUID"), read_text(said, "ManufacturerModelName")
    except DicomError:
        return False
    return kind == (SecondaryCaptureImageStorage, TOOL)
