"""check_phi finds every planted attribute by name and quotes none of their values."""

import io

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian

from mlip.dataloading.dicom.phi import _PROFILE, SEVERE
from mlip.dataloading.dicom.radiograph import (
    DicomError,
    check_phi,
    read_radiograph,
    write_radiograph,
)

CANARY = "CANARY7"


@pytest.fixture
def clean(tmp_path) -> Dataset:
    image = np.zeros((16, 16), np.uint16)
    write_radiograph(tmp_path / "a", image, patient_id="p", study_id="s")
    return pydicom.dcmread(tmp_path / "a")


def found(dataset: Dataset) -> dict[str, str]:
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, dataset)
    leftovers = check_phi(buffer.getvalue())
    assert CANARY not in repr(leftovers)
    return {leftover.attribute: leftover.reason for leftover in leftovers}


def test_a_generated_file_holds_nothing_but_its_own_ids(clean):
    assert found(clean) == {"PatientID": "profile", "StudyID": "profile"}
    assert not SEVERE & set(found(clean).values())


@pytest.mark.parametrize(
    "keyword, value, reason",
    [
        ("SourceApplicationEntityTitle", CANARY, "profile"),
        ("SendingApplicationEntityTitle", CANARY, "profile"),
        ("ReceivingApplicationEntityTitle", CANARY, "profile"),
        ("SourcePresentationAddress", CANARY, "profile"),
        ("SendingPresentationAddress", CANARY, "profile"),
        ("ReceivingPresentationAddress", CANARY, "profile"),
        ("PrivateInformation", CANARY.encode(), "private"),
        ("SourceApplicationEntityTitle", "  ", None),
    ],
)
def test_what_the_last_application_left_in_the_file_meta_is_found(clean, keyword, value, reason):
    setattr(clean.file_meta, keyword, value)
    if keyword == "PrivateInformation":
        clean.file_meta.PrivateInformationCreatorUID = "1.2.3"
    # an address has a length of four bytes, which moved the data set behind it out of place
    assert found(clean).get(keyword) == reason
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, clean)
    assert read_radiograph(buffer.getvalue())[0].shape == (16, 16)


@pytest.mark.parametrize(
    "keyword, value, reason",
    [
        ("PatientName", CANARY, "name"),
        ("ReferringPhysicianName", CANARY, "name"),
        ("OperatorsName", CANARY, "name"),
        ("PatientBirthDate", "19700101", "date"),
        ("StudyTime", "120000", "date"),
        ("AcquisitionDateTime", "20200101120000", "date"),
        ("AccessionNumber", CANARY, "profile"),
        ("InstitutionName", CANARY, "profile"),
        ("PatientAddress", CANARY, "profile"),
        ("DeviceSerialNumber", CANARY, "profile"),
        ("StudyDescription", CANARY, "profile"),
        ("PatientComments", CANARY, "profile"),
        ("ReasonForTheRequestedProcedure", CANARY, "profile"),
        ("PersonTelecomInformation", CANARY, "profile"),
        ("InterpretationDiagnosisDescription", CANARY, "profile"),
        ("AdmittingDiagnosesCodeSequence", [Dataset()], "profile"),
        ("StationAETitle", CANARY, "profile"),
        ("GPSLatitude", [1.0, 2.0, 3.0], "profile"),
        ("BurnedInAnnotation", "YES", "burned_in"),
        ("BurnedInAnnotation", None, "burned_in_unknown"),
        ("PatientIdentityRemoved", None, "not_yes"),
        ("PatientIdentityRemoved", "NO", "not_yes"),
    ],
)
def test_each_planted_attribute_is_found(clean, keyword, value, reason):
    if value is None:
        del clean[keyword]
    else:
        setattr(clean, keyword, value)
    assert found(clean)[keyword] == reason


def test_an_unreadable_answer_is_none_and_hides_no_other_attribute(clean):
    """Of a kind that DICOM lacks (damage), it made the whole file malformed: its name stayed
    untold."""
    buffer = io.BytesIO()
    clean.PatientName = CANARY
    pydicom.dcmwrite(buffer, clean)
    content = buffer.getvalue()
    for tag in (b"\x12\0\x62\0", b"\x28\0\x01\x03"):  # PatientIdentityRemoved, BurnedInAnnotation
        assert content.count(tag + b"CS") == 1
        content = content.replace(tag + b"CS", tag + b"C?")
    told = {(leftover.attribute, leftover.reason) for leftover in check_phi(content)}
    assert told >= {
        ("PatientName", "name"),
        ("0012,0062", "unreadable"),
        ("PatientIdentityRemoved", "not_yes"),
        ("BurnedInAnnotation", "burned_in_unknown"),
    }


def test_private_nested_and_overlay_attributes_are_found(clean):
    clean.private_block(0x0011, CANARY, create=True).add_new(1, "LO", CANARY)
    clean.add_new(0x60003000, "OW", b"\1\0")
    clean.add_new(0x60023000, "OW", b"\1\0")  # a film may have sixteen
    clean.add_new(0x50023000, "OW", b"\1\0")
    clean.add_new(0x00100013, "LT", CANARY)  # Name to Use Comment: newer than pydicom's dictionary
    item = Dataset()
    item.RequestedProcedureID = CANARY
    deeper = Dataset()
    deeper.PersonName = CANARY
    item.PersonIdentificationCodeSequence = [deeper]
    clean.RequestAttributesSequence = [item]
    result = found(clean)
    assert result["0011,0010"] == result["0011,1001"] == "private"
    assert result["6000,3000"] == result["6002,3000"] == "overlay"
    assert result["5002,3000"] == result["0010,0013"] == "profile"
    assert result["RequestedProcedureID"] == "profile" and result["PersonName"] == "name"


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
def test_private_attributes_are_found_whose_creator_was_taken_away(clean, syntax):
    """A file with one could not be checked at all: tools that clean a header leave them behind."""
    clean.file_meta.TransferSyntaxUID = syntax
    clean.add_new(0x00111001, "UN", CANARY.encode())
    assert found(clean)["0011,1001"] == "private"


@pytest.mark.parametrize("syntax", ["explicit", "jpegls"])
def test_what_stands_behind_the_pixels_is_found(tmp_path, syntax):
    image = np.zeros((16, 16), np.uint16)
    write_radiograph(tmp_path / "a", image, patient_id="p", study_id="s", syntax=syntax)
    dataset = pydicom.dcmread(tmp_path / "a")
    dataset.private_block(0x7FE1, CANARY, create=True).add_new(1, "LO", CANARY)
    dataset.DataSetTrailingPadding = CANARY.encode()
    result = found(dataset)
    assert result["7FE1,1001"] == "private" and result["DataSetTrailingPadding"] == "profile"
    del dataset.PixelData
    assert found(dataset) == result
    clean = (tmp_path / "a").read_bytes()
    assert check_phi(clean + bytes(1000)) == check_phi(clean)


def test_every_keyword_of_the_profile_is_one_of_the_standard():
    keywords = [name for name in _PROFILE if "," not in name]
    assert len(keywords) > 300
    assert not [name for name in keywords if pydicom.datadict.tag_for_keyword(name) is None]


@pytest.mark.parametrize(
    "preamble, reason",
    [(b"MZ", "executable"), (b"\x7fELF", "executable"), (CANARY.encode(), "not_empty")],
)
def test_a_preamble_that_is_a_program_is_found(clean, preamble, reason):
    clean.preamble = preamble.ljust(128, b"\0")
    assert found(clean)["preamble"] == reason


def test_a_file_that_cannot_be_parsed_is_an_error(tmp_path):
    (tmp_path / "a").write_bytes(b"x" * 200)
    with pytest.raises(DicomError, match="not_dicom"):
        check_phi(tmp_path / "a")
