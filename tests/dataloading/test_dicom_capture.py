"""A picture made of a film lies in the film's study, as its bytes say it, and nowhere else.

Oracles: the film's own bytes, pydicom's decoder, and where they are installed dcmtk's decoder and
the validator of dicom3tools.
"""

from __future__ import annotations

import io
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.data import get_charset_files
from pydicom.dataset import Dataset
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

from mlip.dataloading.datasets.folder import _left_out, _Rules
from mlip.dataloading.dicom import capture as dicom_capture
from mlip.dataloading.dicom.capture import NOTICE, capture, is_capture, read_film
from mlip.dataloading.dicom.radiograph import DicomError, read_identity, write_radiograph

PIXELS = np.random.default_rng(0).integers(0, 256, (31, 47, 3)).astype(np.uint8)  # odd length
IDENTITY = (
    "PatientName PatientID PatientBirthDate PatientSex StudyInstanceUID StudyDate StudyTime "
    "StudyID AccessionNumber ReferringPhysicianName"
).split()
FILLED = {
    "PatientName": "Doe^Jane",
    "PatientID": "ID-77",
    "IssuerOfPatientID": "HOSPITAL",
    "PatientBirthDate": "19500102",
    "PatientSex": "F",
    "StudyDate": "20240305",
    "StudyTime": "101112.5",
    "TimezoneOffsetFromUTC": "+0100",
    "StudyID": "S1",
    "StudyDescription": "CHEST PA",
    "AccessionNumber": "ACC9",
    "ReferringPhysicianName": "Who^Doctor",
    "PatientOrientation": ["L", "F"],
    "BurnedInAnnotation": "NO",
    "PatientIdentityRemoved": "YES",
    "DeidentificationMethod": "by hand",
    "BodyPartExamined": "CHEST",
}


def film(folder: Path) -> Dataset:
    path = folder / "film.dcm"
    write_radiograph(path, np.zeros((16, 16), np.uint16), patient_id="p", study_id="s")
    return pydicom.dcmread(path)


def content(dataset: Dataset) -> bytes:
    file = io.BytesIO()
    dataset.save_as(file, enforce_file_format=True)
    return file.getvalue()


def made_of(
    source: bytes, *, pixels: np.ndarray = PIXELS, phrases: Sequence[str] = ("effusion",)
) -> bytes:
    return capture(read_film(source), pixels, phrases=phrases, model="0123abcd")


def parsed(made: bytes) -> pydicom.FileDataset:
    return pydicom.dcmread(io.BytesIO(made))


def test_identity_and_study_are_the_films_and_the_rest_says_what_it_is(tmp_path: Path) -> None:
    source = film(tmp_path)
    for name, value in FILLED.items():
        setattr(source, name, value)
    found = parsed(made_of(content(source), phrases=["left pleural effusion", "a\\b"]))
    for name in [*FILLED, "StudyInstanceUID"]:
        assert found[name].value == source[name].value, name
    assert found.SOPInstanceUID != source.SOPInstanceUID
    assert found.SeriesInstanceUID not in (source.SeriesInstanceUID, found.SOPInstanceUID)
    (reference,) = found.SourceImageSequence
    assert reference.ReferencedSOPInstanceUID == source.SOPInstanceUID
    assert reference.ReferencedSOPClassUID == source.SOPClassUID
    assert found.SOPClassUID.name == "Secondary Capture Image Storage"
    assert list(found.ImageType) == ["DERIVED", "SECONDARY"]
    assert (found.Modality, found.ContentQualification) == ("OT", "RESEARCH")
    assert found.SeriesDescription == 'MLIP, research only: "left pleural effusion", "a b"'
    assert NOTICE in found.DerivationDescription and "0123abcd" in found.DerivationDescription
    # never wrong: a distance over a sheet of pictures is none
    for name in "PixelSpacing ImagerPixelSpacing FrameOfReferenceUID RescaleSlope".split():
        assert name not in found
    np.testing.assert_array_equal(found.pixel_array, PIXELS)
    assert PIXELS.size % 2 == 1 and len(found.PixelData) == PIXELS.size + 1


@pytest.mark.parametrize("name", [Path(path).name for path in get_charset_files("chr*Multi*.dcm")])
def test_names_keep_their_bytes_and_their_character_set(name: str) -> None:
    check_bytes(Path(get_charset_files(name)[0]).read_bytes())


@pytest.mark.parametrize("name", ["chrGreek", "chrH32", "chrX1", "chrX2", "chrH31", "chrFren"])
def test_other_character_sets_are_kept_too(name: str) -> None:
    check_bytes(Path(get_charset_files(f"{name}.dcm")[0]).read_bytes())


def check_bytes(source: bytes) -> None:
    before, after = parsed(source), parsed(made_of(source))
    for tag in IDENTITY:
        held = [bytes(d.get_item(tag).value or b"") if tag in d else b"" for d in (before, after)]
        assert held[0] + b" " * (len(held[0]) % 2) == held[1], tag
    assert before.get("SpecificCharacterSet") == after.get("SpecificCharacterSet")
    assert str(before.PatientName) == str(after.PatientName) != ""


@pytest.mark.parametrize(
    "syntax",
    [
        ImplicitVRLittleEndian,
        ExplicitVRLittleEndian,
        DeflatedExplicitVRLittleEndian,
        ExplicitVRBigEndian,
    ],
    ids=lambda uid: uid.keyword,
)
def test_a_films_transfer_syntax_changes_nothing_of_what_is_carried(
    syntax: pydicom.uid.UID, tmp_path: Path
) -> None:
    source = film(tmp_path)
    for name, value in FILLED.items():
        setattr(source, name, value)
    source.SpecificCharacterSet, source.PatientName = "ISO_IR 192", "Žižka^Jan"
    code = Dataset()
    code.CodeValue, code.CodingSchemeDesignator = "113100", "DCM"
    code.CodeMeaning = "Basic Application Confidentiality Profile, gekürzt"
    source.DeidentificationMethodCodeSequence = [code]
    plain = made_of(content(source))
    del source.PixelData  # of which pydicom cannot turn the bytes around
    source.file_meta.TransferSyntaxUID = syntax
    file = io.BytesIO()
    pydicom.dcmwrite(
        file,
        source,
        implicit_vr=syntax.is_implicit_VR,
        little_endian=syntax.is_little_endian,
        force_encoding=True,
    )
    made = made_of(file.getvalue())
    assert made == plain
    (item,) = parsed(made).DeidentificationMethodCodeSequence
    assert item.CodeMeaning == code.CodeMeaning and item.CodeValue == "113100"
    assert str(parsed(made).PatientName) == "Žižka^Jan"


def test_what_a_film_leaves_empty_or_out_is_empty_and_never_made_up(tmp_path: Path) -> None:
    source = film(tmp_path)
    for name in ("PatientName", "PatientBirthDate", "AccessionNumber"):
        if name in source:
            delattr(source, name)
    source.PatientID = source.Laterality = source.DeidentificationMethod = ""
    found = parsed(made_of(content(source)))
    for name in ("PatientName", "PatientBirthDate", "AccessionNumber", "PatientID"):
        assert name in found and not found[name].value, name
    assert "Laterality" not in found and "DeidentificationMethod" not in found
    assert "InstanceCreationDate" not in found


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        ({"BodyPartExamined": "CHEST"}, {}),
        ({}, {"Laterality": None}),  # required of one of a pair, empty where nobody said (C.7.3.1)
        ({"Laterality": "R"}, {"Laterality": "R"}),
        ({"Laterality": "R", "ImageLaterality": "R"}, {"ImageLaterality": "R"}),
        ({"BodyPartExamined": "CHEST", "ImageLaterality": "U"}, {"ImageLaterality": "U"}),
    ],
)
def test_the_side_is_stated_once_and_as_the_film_states_it(
    stated: dict[str, str], expected: dict[str, str | None], tmp_path: Path
) -> None:
    source = film(tmp_path)
    for name in ("BodyPartExamined", "ImageLaterality", "Laterality"):
        source.pop(name, None)
        if name in stated:
            setattr(source, name, stated[name])
    found = parsed(made_of(content(source)))
    sides = {n: found[n].value or None for n in ("Laterality", "ImageLaterality") if n in found}
    assert sides == expected


@pytest.mark.parametrize("name", ["StudyInstanceUID", "SOPInstanceUID", "SOPClassUID"])
@pytest.mark.parametrize("value", [None, "", "Doe^Jane", "1.2\\1.3"])
def test_a_film_that_names_no_study_or_itself_is_refused_by_attribute_not_value(
    name: str, value: str | None, tmp_path: Path
) -> None:
    source = film(tmp_path)
    source.PatientID = "SECRET"
    delattr(source, name)
    if value is not None:
        source.add_new(name, "LO", value)  # pydicom would not write it as a UID
    source.file_meta.MediaStorageSOPInstanceUID = "1.2"
    file: Any = io.BytesIO()
    pydicom.filewriter.write_file_meta_info(file, source.file_meta, enforce_standard=False)
    body = pydicom.filebase.DicomBytesIO()
    body.is_little_endian, body.is_implicit_VR = True, False
    pydicom.filewriter.write_dataset(body, source)
    whole = b"\0" * 128 + b"DICM" + file.getvalue() + body.getvalue()
    with pytest.raises(DicomError, match=name) as caught:
        read_film(whole)
    assert "Doe" not in str(caught.value) and "SECRET" not in str(caught.value)
    assert caught.value.code == ("malformed" if value else "missing_tag")


def test_equal_calls_write_equal_bytes_and_any_difference_is_another_object(
    tmp_path: Path,
) -> None:
    source = film(tmp_path)
    first = made_of(content(source))
    assert made_of(content(source)) == first
    other_pixels = PIXELS.copy()
    other_pixels[0, 0, 0] ^= 1
    renamed = film(tmp_path)
    renamed.PatientName = "Corrected^Name"
    others = [
        made_of(content(source), pixels=other_pixels),
        made_of(content(source), phrases=["pneumothorax"]),
        capture(read_film(content(source)), PIXELS, phrases=["effusion"], model="ffff"),
        made_of(content(renamed)),
    ]
    for level in ("SOPInstanceUID", "SeriesInstanceUID"):
        assert len({parsed(made)[level].value for made in [first, *others]}) == 5


@pytest.mark.parametrize(
    ("syntax", "stated", "expected"),
    [
        ("1.2.840.10008.1.2.4.50", {}, ("01", None, "ISO_10918_1")),
        ("1.2.840.10008.1.2.4.91", {"": "00"}, ("00", None, None)),
        ("1.2.840.10008.1.2.4.91", {"": "01", "Ratio": "30"}, ("01", 30, "ISO_15444_1")),
        ("1.2.840.10008.1.2.1", {"": "01", "Ratio": "9", "Method": "ISO_10918_1"}, None),
        ("1.2.840.10008.1.2.4.81", {}, ("01", None, "ISO_14495_1")),
        ("1.2.840.10008.1.2.1", {}, (None, None, None)),
        ("1.2.840.10008.1.2.1", {"": "00", "Ratio": "9"}, ("00", None, None)),
    ],
)
def test_what_was_once_lossy_stays_stated_as_lossy(
    syntax: str, stated: dict[str, str], expected: tuple | None, tmp_path: Path
) -> None:
    source = film(tmp_path)
    del source.LossyImageCompression, source.PixelData
    for name, value in stated.items():
        setattr(source, f"LossyImageCompression{name}", value)
    source.file_meta.TransferSyntaxUID = syntax
    found = parsed(made_of(content(source)))
    said = tuple(found.get(f"LossyImageCompression{name}") for name in ("", "Ratio", "Method"))
    assert said == (expected or ("01", 9, "ISO_10918_1"))


@pytest.mark.parametrize(
    ("charset", "expected"),
    [(None, "neumot?rax"), ("ISO_IR 100", "neumotórax"), ("ISO_IR 192", "neumotórax")]
    + [("ISO_IR 144", "neumot?rax"), (["", "ISO 2022 IR 87"], "neumot?rax")],
)
def test_phrases_are_written_in_the_films_character_set(
    charset: str | list[str] | None, expected: str, tmp_path: Path
) -> None:
    source = film(tmp_path)
    if charset:
        source.SpecificCharacterSet = charset
    found = parsed(made_of(content(source), phrases=["neumotórax"]))
    assert found.SeriesDescription.endswith(f'"{expected}"')
    assert f'"{expected}"' in found.DerivationDescription


def test_long_phrases_are_cut_to_their_room(tmp_path: Path) -> None:
    found = parsed(made_of(content(film(tmp_path)), phrases=["left pleural effusion"] * 80))
    assert len(found.SeriesDescription) == 64 and found.SeriesDescription.endswith("...")
    assert len(found.DerivationDescription) == 1024


@pytest.mark.parametrize("kind", ["grey", "float", "tall"])
def test_pixels_that_the_object_has_no_room_for_are_refused(kind: str, tmp_path: Path) -> None:
    wrong: np.ndarray = {
        "grey": np.zeros((4, 4), np.uint8),
        "float": np.zeros((4, 4, 3), np.float32),
        "tall": np.zeros((65_536, 1, 3), np.uint8),
    }[kind]
    with pytest.raises(ValueError, match="65535 rows" if kind == "tall" else "H, W, 3"):
        made_of(content(film(tmp_path)), pixels=wrong)


def test_our_objects_are_known_again_and_no_film_is_taken_for_one(tmp_path: Path) -> None:
    source = content(film(tmp_path))
    own, other = tmp_path / "own", tmp_path / "other"
    own.write_bytes(made_of(source))
    assert is_capture(own) and not is_capture(tmp_path / "film.dcm")
    through = pydicom.dcmread(own)  # as an archive gives it back
    through.file_meta = pydicom.dataset.FileMetaDataset()
    through.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
    through.save_as(other, implicit_vr=True, little_endian=True, force_encoding=True)
    assert is_capture(other)
    scan = pydicom.dcmread(own)
    scan.ManufacturerModelName = "another"
    scan.save_as(other)
    assert not is_capture(other)
    for junk in (b"", b"text", own.read_bytes()[:200]):
        other.write_bytes(junk)
        assert not is_capture(other)
    assert not is_capture(tmp_path) and not is_capture(tmp_path / "none")
    os.truncate(own, 600 << 20)  # larger than a film may be: of some 170 phrases, here of zeros
    assert is_capture(own)
    os.mkfifo(tmp_path / "pipe")
    assert not is_capture(tmp_path / "pipe")


def test_preparing_a_folder_leaves_a_map_beside_its_film_out(tmp_path: Path) -> None:
    source = film(tmp_path)
    source.Modality = "CR"
    identity = read_identity(made_of(content(source)))
    options = {"patient_level": "1", "keep": "", "views": "all"}
    for modalities, rule in (("DX,CR,OT", "secondary_capture"), ("DX,CR", "modality_ot")):
        assert _left_out(identity, _Rules.of({**options, "modalities": modalities})) == rule


def test_an_attribute_without_end_is_refused_by_its_name(tmp_path: Path) -> None:
    source = film(tmp_path)
    source.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
    source[0x00100020] = pydicom.DataElement(0x00100020, "LO", "x" * 70_000, validation_mode=0)
    file = io.BytesIO()
    source.save_as(file, implicit_vr=True, little_endian=True, force_encoding=True)
    with pytest.raises(DicomError, match="PatientID is too long"):
        read_film(file.getvalue())


def test_another_decoder_sees_the_same_colours(tmp_path: Path) -> None:
    if not (tool := shutil.which("dcm2pnm")):
        pytest.skip("needs dcm2pnm of dcmtk")
    made, picture = tmp_path / "map.dcm", tmp_path / "map.ppm"
    made.write_bytes(made_of(content(film(tmp_path))))
    subprocess.run([tool, str(made), str(picture)], check=True, timeout=60)
    data = picture.read_bytes()
    assert data.startswith(b"P6")
    np.testing.assert_array_equal(
        np.frombuffer(data[-PIXELS.size :], np.uint8).reshape(PIXELS.shape), PIXELS
    )


@pytest.mark.parametrize("stated", ["filled", "bare"])
def test_a_validator_finds_no_error(stated: str, tmp_path: Path) -> None:
    if not (tool := shutil.which("dciodvfy")):
        pytest.skip("needs dciodvfy of dicom3tools")
    source = film(tmp_path)
    for name, value in FILLED.items() if stated == "filled" else []:
        setattr(source, name, value)
    if stated == "bare":
        del source.BodyPartExamined, source.ImageLaterality, source.PatientOrientation
    made = tmp_path / "map.dcm"
    made.write_bytes(made_of(content(source)))
    said = subprocess.run([tool, str(made)], capture_output=True, text=True, timeout=60)
    lines = (said.stdout + said.stderr).splitlines()
    assert "SCImage" in lines and not [line for line in lines if line.startswith("Error")], lines


def test_the_tools_name_is_in_no_film_of_the_shared_data(shared_data: Path) -> None:
    films = sorted((shared_data / "dicom").rglob("*.dcm"))
    assert films and not [path.name for path in films if is_capture(path)]
    assert dicom_capture.TOOL == "mlip ground"
