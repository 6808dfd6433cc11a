"""Films as archives hold them, and not as the standard asks, get their map too.

Oracle: what was written into the film.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from pydicom.dataset import Dataset

from mlip.dataloading.dicom.capture import capture, read_film
from mlip.dataloading.dicom.radiograph import DicomError
from tests.dataloading.test_dicom_capture import PIXELS, content, film, made_of, parsed


def test_items_of_sequences_are_carried_without_what_has_no_place_in_them(tmp_path: Path) -> None:
    """Empty sequences, lengths of groups, private and unknown attributes are in films, and keep no
    film from its map."""
    source, issuer, inner = film(tmp_path), Dataset(), Dataset()
    inner.CodeValue, inner.EquivalentCodeSequence = "1", []
    issuer.LocalNamespaceEntityID = "HOSPITAL"
    issuer.private_block(0x0041, "ACME", create=True).add_new(1, "LO", "SECRET")
    issuer.add_new(0x00401239, "LO", "SECRET")  # of no dictionary
    issuer.add_new(0x00400000, "UL", 12)
    source.IssuerOfAccessionNumberSequence = [issuer]
    source.DeidentificationMethodCodeSequence = [inner]
    source.IssuerOfPatientIDQualifiersSequence = []
    source.StudyDescription = "  "  # may be absent, not blank
    made = made_of(content(source))
    found = parsed(made)
    (kept,) = found.IssuerOfAccessionNumberSequence
    assert [element.keyword for element in kept] == ["LocalNamespaceEntityID"]
    assert b"SECRET" not in made and "IssuerOfPatientIDQualifiersSequence" not in found
    (code,) = found.DeidentificationMethodCodeSequence
    assert code.CodeValue == "1" and len(code.EquivalentCodeSequence) == 0
    assert "StudyDescription" not in found


def test_a_character_set_that_is_none_is_refused_before_the_work(tmp_path: Path) -> None:
    source = film(tmp_path)
    source.SpecificCharacterSet = "ISO_IR 192"
    wrong = content(source).replace(b"ISO_IR 192", b"hex       ")
    with pytest.raises(DicomError, match="malformed.*SpecificCharacterSet"):
        read_film(wrong)
    other = content(source).replace(b"ISO_IR 192", b"UNHEARD OF")  # read as the default set
    assert parsed(made_of(other)).SpecificCharacterSet == "UNHEARD OF"


def test_two_maps_of_one_film_know_nothing_of_each_other(tmp_path: Path) -> None:
    source = read_film(content(film(tmp_path)))
    first, other, again = (
        capture(source, PIXELS, phrases=[phrase], model="0123abcd") for phrase in "aba"
    )
    assert first == again != other and "PixelData" not in source.carried
