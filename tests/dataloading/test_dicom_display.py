"""Headers that are sound by the letter and would show another picture, or none.

Oracle: the same pixels with the same values where plain radiographs keep them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from mlip.dataloading.dicom.notes import NOTES
from mlip.dataloading.dicom.radiograph import (
    CODES,
    DicomError,
    explain,
    read_radiograph,
    write_radiograph,
)
from mlip.dataloading.ledger import REASONS

ROOT = Path(__file__).parents[2]


def film(path: Path, change: Callable[[Dataset], None]) -> Path:
    """A film of 4096 to 36863, without window or rescale, after the change."""
    smooth = np.random.default_rng(0).random((6, 6))
    wide = cv2.resize(smooth, (70, 80), interpolation=cv2.INTER_CUBIC).clip(0, 1)
    write_radiograph(path, (4096 + wide * 32767).astype(np.uint16), patient_id="p", study_id="s")
    dataset = pydicom.dcmread(path)
    for name in ("WindowCenter", "WindowWidth", "RescaleSlope", "RescaleIntercept"):
        if name in dataset:
            delattr(dataset, name)
    change(dataset)
    pydicom.dcmwrite(path, dataset)
    return path


def at_top(**values: Any) -> Callable[[Dataset], None]:
    def change(dataset: Dataset) -> None:
        for name, value in values.items():
            setattr(dataset, name, value)

    return change


def item(**values: Any) -> Sequence:
    inner = Dataset()
    at_top(**values)(inner)
    return Sequence([inner])


def lut(first: int, bits: int, values: np.ndarray) -> Sequence:
    sequence = item(LUTDescriptor=[len(values), first, bits], LUTData=values.tobytes())
    sequence[0]["LUTDescriptor"].VR, sequence[0]["LUTData"].VR = "US", "OW"
    return sequence


VOI = {"WindowCenter": 21_000, "WindowWidth": 9_000, "VOILUTFunction": "SIGMOID"}
RESCALE = {"RescaleSlope": 2.0, "RescaleIntercept": -10_000}
EXPONENTS = np.arange(256, dtype="<u2") * 257


@pytest.mark.parametrize("kind", ["Shared", "PerFrame"])
@pytest.mark.parametrize(
    "values, named",
    [
        ({"FrameVOILUTSequence": VOI}, VOI),
        (
            {"FrameVOILUTSequence": VOI, "PixelValueTransformationSequence": RESCALE},
            VOI | RESCALE,
        ),
        (
            {"FrameVOILUTSequence": {"VOILUTSequence": lut(9000, 16, EXPONENTS)}},
            {"VOILUTSequence": lut(9000, 16, EXPONENTS)},
        ),
    ],
    ids=["window", "window and rescale", "lut"],
)
def test_an_enhanced_image_is_shown_as_its_functional_groups_say(
    tmp_path: Path, kind: str, values: dict[str, Any], named: dict[str, Any]
) -> None:
    """They were not read: the film was stretched over its own extremes in their place."""
    groups = item(**{sequence: item(**inner) for sequence, inner in values.items()})
    enhanced = film(
        tmp_path / "a.dcm", at_top(NumberOfFrames=1, **{f"{kind}FunctionalGroupsSequence": groups})
    )
    plain = film(tmp_path / "b.dcm", at_top(**named))
    image, info = read_radiograph(enhanced)
    expected, expected_info = read_radiograph(plain)
    np.testing.assert_array_equal(image, expected)
    assert info == expected_info and info.own_range is None and len(np.unique(image)) > 20


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("centre", [100, 60_000])
def test_a_window_that_shows_nothing_of_the_film_counts_as_none(
    tmp_path: Path, centre: int, photometric: str
) -> None:
    """An 8-bit window on 16-bit pixels: the film was one white, or black, sheet."""
    kind = at_top(PhotometricInterpretation=photometric, PresentationLUTShape="")
    wrong = film(tmp_path / "a.dcm", at_top(WindowCenter=centre, WindowWidth=200))
    dataset = pydicom.dcmread(wrong)
    kind(dataset)
    pydicom.dcmwrite(wrong, dataset)
    expected, _ = read_radiograph(film(tmp_path / "b.dcm", kind))
    image, info = read_radiograph(wrong)
    np.testing.assert_array_equal(image, expected)
    assert info.own_range is not None and info.notes == ("unusable_window",)
    assert "unusable_window" in explain(wrong)[-1]


def test_a_lookup_table_that_shows_nothing_gives_way_to_the_window(tmp_path: Path) -> None:
    flat = {"VOILUTSequence": lut(60_000, 16, EXPONENTS)}
    image, info = read_radiograph(film(tmp_path / "a.dcm", at_top(**flat, **VOI)))
    expected, _ = read_radiograph(film(tmp_path / "b.dcm", at_top(**VOI)))
    np.testing.assert_array_equal(image, expected)
    assert info.voi == "sigmoid" and info.notes == ("unusable_voi_lut",)


def test_a_film_of_one_value_stays_what_its_window_makes_of_it(tmp_path: Path) -> None:
    write_radiograph(tmp_path / "a.dcm", np.full((40, 40), 999, np.uint16), patient_id="p",
                     study_id="s")  # fmt: skip
    image, info = read_radiograph(tmp_path / "a.dcm")
    assert (image == 999).all() and info.own_range is None and not info.notes


def test_twelve_bit_entries_called_sixteen_bit_ones_are_refused(tmp_path: Path) -> None:
    """The film came out under a sixteenth of white: nearly black, without a word."""
    for bits, code in ((16, "bad_lut"), (12, "")):
        path = film(tmp_path / "a.dcm", at_top(VOILUTSequence=lut(4096, bits, EXPONENTS >> 4)))
        if code:
            with pytest.raises(DicomError, match="an eighth of what 16 bits hold") as caught:
                read_radiograph(path)
            assert caught.value.code == code
        else:
            assert read_radiograph(path)[0].max() == 65_535


@pytest.mark.parametrize(
    "values, refused",
    [
        ({"PixelAspectRatio": [2, 1]}, True),
        ({"PixelAspectRatio": [1, 1], "ImagerPixelSpacing": [0.1, 0.1]}, False),
        ({"ImagerPixelSpacing": [0.1, 0.2]}, True),
        ({"ImagerPixelSpacing": [0.1, 0.101]}, False),
    ],
)
def test_pixels_that_are_not_square_are_refused(
    tmp_path: Path, values: dict[str, Any], refused: bool
) -> None:
    """A chest twice as wide as it is was trained on in silence."""
    path = film(tmp_path / "a.dcm", at_top(**values))
    if not refused:
        read_radiograph(path)
        return
    with pytest.raises(DicomError, match="2.00 to 1") as caught:
        read_radiograph(path)
    assert caught.value.code == "non_square"


@pytest.mark.parametrize(
    "orientation, view, notes",
    [
        (["L", "F"], "PA", ()),
        (["R", "F"], "PA", ("mirrored",)),
        (["R", "F"], "", ("mirrored",)),
        (["RP", "F"], "LLD", ("mirrored",)),
        (["L", "H"], "AP", ("upside_down",)),
        (["R", "H"], "AP", ("mirrored", "upside_down")),
        (["F", "L"], "AP", ("on_its_side",)),
        (["A", "F"], "LL", ()),
        (["P", "F"], "", ()),
        (["R", "F"], "LATERAL", ()),
        (["P", "H"], "RL", ("upside_down",)),
        (["L", "R"], "PA", ()),
        ("", "PA", ()),
        ("R", "PA", ()),
        (["R", ""], "PA", ()),
        (["R", "F", "F"], "PA", ()),
    ],
    ids=str,
)
def test_a_film_that_hangs_otherwise_is_noted_and_not_flipped(
    tmp_path: Path, orientation: object, view: str, notes: tuple[str, ...]
) -> None:
    """A mirrored film, told by its tag, was taken like any other without a word."""
    plain = film(tmp_path / "a.dcm", at_top(PatientOrientation=["L", "F"], ViewPosition="PA"))
    other = film(tmp_path / "b.dcm", at_top(PatientOrientation=orientation, ViewPosition=view))
    image, info = read_radiograph(other)
    np.testing.assert_array_equal(image, read_radiograph(plain)[0])
    assert info.notes == notes
    told = [line for line in explain(other) if line.startswith("note")]
    assert told == [f"note {code}: {NOTES[code]}" for code in notes]


def test_a_flip_that_the_maker_already_applied_makes_no_note(tmp_path: Path) -> None:
    done = at_top(FieldOfViewHorizontalFlip="YES", FieldOfViewRotation=180)
    assert read_radiograph(film(tmp_path / "a.dcm", done))[1].notes == ()


@pytest.mark.parametrize(
    ("high_bits", "signed", "noted"),
    [(0, False, False), (0x1000, False, True), (0xF000, True, False), (0x1000, True, True)],
)
def test_bits_over_those_stored_are_noted_unless_they_are_a_sign(
    tmp_path: Path, high_bits: int, signed: bool, noted: bool
) -> None:
    """10-bit films of which 12 were filled were garbled without a word; high_bits are set where
    the number's highest stored bit is."""
    cells = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    cells |= np.where(cells & 0x800, high_bits, 0).astype(np.uint16)
    path = tmp_path / "film.dcm"
    write_radiograph(path, cells, patient_id="P", study_id="S")
    dataset = pydicom.dcmread(path)
    dataset.PixelData = cells.tobytes()
    dataset.BitsStored, dataset.HighBit = 12, 11
    dataset.PixelRepresentation = int(signed)
    pydicom.dcmwrite(path, dataset)
    image, info = read_radiograph(path)
    assert ("bits_over_stored" in info.notes) == noted
    # masked, as before: the same picture as without them
    dataset.PixelData = (cells & 0xFFF).tobytes()
    pydicom.dcmwrite(path, dataset)
    again, info = read_radiograph(path)
    assert (image == again).all() and "bits_over_stored" not in info.notes


@pytest.mark.parametrize(
    ("photometric", "shape", "noted"),
    [
        ("MONOCHROME1", "IDENTITY", True),
        ("MONOCHROME2", "INVERSE", True),
        ("MONOCHROME1", "INVERSE", False),
        ("MONOCHROME2", "IDENTITY", False),
        ("MONOCHROME1", None, False),
    ],
)
def test_a_presentation_shape_that_says_the_opposite_is_noted_and_not_followed(
    tmp_path: Path, photometric: str, shape: str | None, noted: bool
) -> None:
    path = tmp_path / "film.dcm"
    write_radiograph(
        path, np.arange(4096, dtype=np.uint16).reshape(64, 64), patient_id="P", study_id="S"
    )
    dataset = pydicom.dcmread(path)
    dataset.PhotometricInterpretation = photometric
    if shape is not None:
        dataset.PresentationLUTShape = shape
    elif "PresentationLUTShape" in dataset:
        del dataset.PresentationLUTShape
    pydicom.dcmwrite(path, dataset)
    image, info = read_radiograph(path)
    assert ("unsure_polarity" in info.notes) == noted
    assert (image[0, 0] > image[-1, -1]) == (photometric == "MONOCHROME1")


def test_every_code_has_words_and_stands_on_its_page() -> None:
    dicom, data = ((ROOT / "docs" / name).read_text("utf-8") for name in ("dicom.md", "data.md"))
    for title, page, codes in (
        ("## Notes", dicom, NOTES),
        ("## Reason codes", dicom, CODES),
        ("## The ledger", data, REASONS),
    ):
        rows = [x for x in page.split(title)[1].split("\n## ")[0].splitlines() if x[:2] == "| "]
        cells = [cell for row in rows for cell in row.split("|")[1:-1:2]]
        assert {code for cell in cells for code in re.findall("`([a-z_]+)`", cell)} == set(codes)
