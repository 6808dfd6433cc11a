"""read_radiograph's grey-scale chain: rescale, lookup tables, window, inversion, pixel for pixel.

Oracle: the formulas of DICOM PS3.3 C.11.1 and C.11.2 in float64 (dicom_golden.py).
"""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset

from mlip.dataloading.dicom.radiograph import explain, read_radiograph
from tests.dataloading.dicom_golden import ENCODING, assert_nearest, edited, golden, noise


@pytest.mark.parametrize(
    "changes",
    [
        {"WindowCenter": 1000, "WindowWidth": 777},
        {"WindowCenter": 1000.25, "WindowWidth": 1},
        {"WindowCenter": 2047.5, "WindowWidth": 100.5, "VOILUTFunction": "LINEAR_EXACT"},
        {"WindowCenter": 900, "WindowWidth": 0.5, "VOILUTFunction": "LINEAR_EXACT"},
        {"WindowCenter": 1500, "WindowWidth": 600, "VOILUTFunction": "SIGMOID"},
        {"WindowCenter": [1800, 10], "WindowWidth": [1200, 20]},
        {"RescaleSlope": 0.37, "RescaleIntercept": -211.5, "WindowCenter": 300, "WindowWidth": 800},
        {
            "RescaleSlope": -2.5,
            "RescaleIntercept": 4000,
            "WindowCenter": -90,
            "WindowWidth": 5000,
        },
        {"WindowCenter": None, "WindowWidth": None},
        {
            "WindowCenter": None,
            "WindowWidth": None,
            "RescaleSlope": -3,
            "RescaleIntercept": 7,
        },
        {"WindowCenter": None, "WindowWidth": None, "PixelPaddingValue": "lowest"},
        {"WindowCenter": None, "WindowWidth": None, "PixelPaddingValue": "highest"},
        {"WindowCenter": 100, "WindowWidth": 6000, "PixelPaddingValue": "lowest"},
        {"WindowCenter": 100, "WindowWidth": 6000, "PixelPaddingValue": "highest"},
    ],
    ids=lambda changes: "-".join(f"{k}={v}" for k, v in changes.items()),
)
@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("signed", [False, True])
def test_grey_scale_chain_equals_the_float64_path(tmp_path, changes, photometric, signed):
    if "PixelPaddingValue" in changes:
        end = 4095 * (changes["PixelPaddingValue"] == "highest") - 2048 * signed
        changes = {**changes, "PixelPaddingValue": end}
    cells = noise(12)
    if signed:
        cells = (cells.astype(np.int16) - 2048) & 0x0FFF  # 12-bit two's complement, top bits 0
    dataset, data = edited(
        tmp_path,
        noise(16),
        cells=cells.astype(np.uint16),
        BitsStored=12,
        HighBit=11,
        PixelRepresentation=int(signed),
        PhotometricInterpretation=photometric,
        PresentationLUTShape=None,
        **changes,
    )
    stored = noise(12).astype(np.int64) - 2048 if signed else noise(12).astype(np.int64)
    image, info = read_radiograph(data)
    assert_nearest(image, golden(dataset, stored))
    assert (info.voi == "own_range") == (changes.get("WindowWidth", 1) is None)
    assert info.inverted == (photometric == "MONOCHROME1")
    if isinstance(changes.get("WindowCenter"), list):
        assert info.notes == ("first_of_several_windows",)


def lookup(count: int, first: int, bits: int, seed: int, vr: str = "US") -> Dataset:
    item = Dataset()
    item.add_new("LUTDescriptor", vr, [count, first, bits])
    table = np.random.default_rng(seed).integers(0, 1 << bits, count)
    table[-1] = (1 << bits) - 1
    item.add_new("LUTData", "US", [int(v) for v in table])
    return item


@pytest.mark.parametrize("syntax", list(ENCODING), ids=lambda uid: uid.name)
@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_modality_and_voi_lookup_tables_equal_the_float64_path(tmp_path, photometric, syntax):
    big = syntax == pydicom.uid.ExplicitVRBigEndian
    dataset, data = edited(
        tmp_path,
        noise(16),
        syntax=syntax,
        cells=noise(12).astype(">u2" if big else "<u2"),
        BitsStored=12,
        HighBit=11,
        PhotometricInterpretation=photometric,
        RescaleSlope=None,
        RescaleIntercept=None,
        ModalityLUTSequence=[lookup(3000, 500, 16, 1)],
        VOILUTSequence=[lookup(1024, 20000, 10, 2)],
    )
    image, info = read_radiograph(data)
    assert_nearest(image, golden(dataset, noise(12)))
    # both a LUT and a window are there: the LUT wins
    assert (info.modality_step, info.voi, info.window) == ("lut", "lut", None)
    lines = explain(data)
    assert "(3000 entries of 16 bits from 500)" in lines[3] and lines[3].startswith("modality LUT:")
    assert "(1024 entries of 10 bits from 20000)" in lines[4] and lines[4].startswith("VOI lut:")


@pytest.mark.parametrize("syntax", list(ENCODING), ids=lambda uid: uid.name)
def test_a_signed_lookup_table_starts_below_zero(tmp_path, syntax):
    cells = (noise(12).astype(np.int16) - 2048) & 0x0FFF
    big = syntax == pydicom.uid.ExplicitVRBigEndian
    dataset, data = edited(
        tmp_path,
        noise(16),
        syntax=syntax,
        cells=cells.astype(">u2" if big else "<u2"),
        BitsStored=12,
        HighBit=11,
        PixelRepresentation=1,
        RescaleSlope=None,
        RescaleIntercept=None,
        VOILUTSequence=[lookup(4096, -2048, 12, 3, vr="SS")],
    )
    image, _ = read_radiograph(data)
    assert_nearest(image, golden(dataset, noise(12).astype(int) - 2048))


@pytest.mark.parametrize(
    "first, fields",
    [
        (-1024, {"RescaleSlope": 1, "RescaleIntercept": -1024}),
        (-1024, {"RescaleSlope": -1, "RescaleIntercept": 3071}),
        (40_000, {"RescaleSlope": 1, "RescaleIntercept": 40_000, "signed": True}),
        (40_000, {"RescaleSlope": 1, "RescaleIntercept": 40_000}),
        (-100, {"RescaleSlope": 1, "RescaleIntercept": 0}),
        (-2048, {"RescaleSlope": None, "RescaleIntercept": None, "signed": True}),
    ],
    ids=str,
)
@pytest.mark.parametrize("vr", ["US", "SS"])
@pytest.mark.parametrize("syntax", list(ENCODING)[:2], ids=lambda uid: uid.name)
def test_a_voi_table_begins_where_the_values_in_front_of_it_lie(
    tmp_path, syntax, vr, first, fields
):
    """Written as US, or by implicit VR, -1024 was read as 64512 and the table was dropped."""
    fields = dict(fields)
    signed = fields.pop("signed", False)
    stored = noise(12).astype(int) - (2048 if signed else 0)
    held = first % 65536 if vr == "US" else (first + 32768) % 65536 - 32768
    dataset, data = edited(
        tmp_path,
        noise(16),
        syntax=syntax,
        cells=(stored & 0x0FFF).astype("<u2"),
        BitsStored=12,
        HighBit=11,
        PixelRepresentation=int(signed),
        VOILUTSequence=[lookup(4096, held, 12, 3, vr=vr)],
        **fields,
    )
    image, info = read_radiograph(data)
    dataset.VOILUTSequence = [lookup(4096, 0, 12, 3)]
    values = stored * (fields["RescaleSlope"] or 1) + (fields["RescaleIntercept"] or 0) - first
    for name in ("RescaleSlope", "RescaleIntercept"):
        dataset.pop(name, None)
    assert_nearest(image, golden(dataset, values))
    assert info.voi == "lut" and not info.notes


def test_bits_above_the_stored_ones_are_not_part_of_the_value(tmp_path):
    _, clean = edited(tmp_path, noise(16), cells=noise(12), BitsStored=12, HighBit=11)
    overlay = noise(12) | np.uint16(0x8000)  # a retired overlay bit in an unused position
    _, data = edited(tmp_path, noise(16), cells=overlay, BitsStored=12, HighBit=11)
    np.testing.assert_array_equal(read_radiograph(data)[0], read_radiograph(clean)[0])


def test_constant_image_is_black_without_a_window(tmp_path):
    for photometric in ("MONOCHROME1", "MONOCHROME2"):
        _, data = edited(
            tmp_path,
            np.full((9, 7), 4321, np.uint16),
            WindowCenter=None,
            WindowWidth=None,
            PhotometricInterpretation=photometric,
        )
        with np.errstate(all="raise"):  # what a processor makes of NaN is its own affair
            image, info = read_radiograph(data)
        assert not image.any() and image.shape == (9, 7)
        assert info.own_range == (4321.0, 4321.0) and not info.inverted


def windowed(tmp_path: Path, centre: str, width: str) -> bytes:
    """A file with the window written byte for byte."""
    dataset = pydicom.dcmread(io.BytesIO(edited(tmp_path, noise(16))[1]))
    for name, text in (("WindowCenter", centre), ("WindowWidth", width)):
        raw: Any = dataset.get_item(name)
        value = text.encode() + b" " * (len(text) % 2)
        dataset._dict[raw.tag] = raw._replace(value=value, length=len(value))
    buffer = io.BytesIO()
    dataset.save_as(buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("centre, width", [("nan", "10"), ("5", "0"), ("5", "-3"), ("x", "9")])
def test_unusable_window_is_replaced_by_the_own_range_and_noted(tmp_path, centre, width):
    _, plain = edited(tmp_path, noise(16), WindowCenter=None, WindowWidth=None)
    image, info = read_radiograph(windowed(tmp_path, centre, width))
    np.testing.assert_array_equal(image, read_radiograph(plain)[0])
    assert info.voi == "own_range" and info.notes == ("unusable_window",)


@pytest.mark.parametrize(
    "centre, width, used, notes",
    [
        ("2000\\", "1000\\", (2000, 1000), ()),
        ("2000\\", "1000", (2000, 1000), ()),
        ("\\2000", "\\1000", (2000, 1000), ()),
        ("\\2000", "900\\1000", (2000, 1000), ()),
        ("2000\\ \\300", "1000\\\\400", (2000, 1000), ("first_of_several_windows",)),
        ("\\", "\\", None, ("unusable_window",)),
        ("2000\\", "\\1000", None, ("unusable_window",)),
    ],
)
def test_a_blank_entry_of_a_window_is_passed_over(tmp_path, centre, width, used, notes):
    """A trailing backslash cost the film its window."""
    data = windowed(tmp_path, centre, width)
    _, info = read_radiograph(data)
    assert (info.window, info.notes) == (used, notes)


def padded(tmp_path: Path, value: int, **changes: object) -> tuple[np.ndarray, bytes]:
    """(where a film has its border, its file): values of 500 to 3498 inside."""
    cells = noise(12) % 3000 + 500
    border = np.ones(cells.shape, bool)
    border[4:-4, 4:-4] = False
    cells = np.where(border, value, cells).astype(np.uint16)
    data = edited(tmp_path, noise(16), cells=cells, BitsStored=12, HighBit=11, **changes)[1]
    return border, data


@pytest.mark.parametrize("window", [{}, {"WindowCenter": None, "WindowWidth": None}])
@pytest.mark.parametrize("value", [0, 4000])
@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_padding_is_black_on_either_side_of_the_films_values(tmp_path, photometric, value, window):
    """Below the values of a MONOCHROME1 film it became a white frame around the chest."""
    limit = {"PixelPaddingValue": value + 50, "PixelPaddingRangeLimit": max(value - 50, 0)}
    fields = {"PhotometricInterpretation": photometric, "PresentationLUTShape": None, **window}
    border, data = padded(tmp_path, value, **fields, **limit)
    image, info = read_radiograph(data)
    expected, _ = read_radiograph(padded(tmp_path, 1000, **fields)[1])
    assert not image[border].any() and info.notes == ()
    np.testing.assert_array_equal(image[~border], expected[~border])


@pytest.mark.parametrize(
    "padding, noted", [({"PixelPaddingValue": 1000}, True), ({"PixelPaddingValue": 4095}, False)]
)
def test_a_padding_value_that_is_none_makes_no_hole(tmp_path, padding, noted):
    """Among the film's own values it would be black spots; one that does not occur is no matter."""
    _, plain = padded(tmp_path, 1000)
    _, data = padded(tmp_path, 1000, **padding)
    image, info = read_radiograph(data)
    np.testing.assert_array_equal(image, read_radiograph(plain)[0])
    assert info.notes == (("unusable_padding",) if noted else ())


def test_a_film_of_nothing_but_padding_is_shown_as_it_is(tmp_path):
    fields = {"PixelPaddingValue": 0, "PixelPaddingRangeLimit": 4095}
    image, info = read_radiograph(padded(tmp_path, 0, **fields)[1])
    np.testing.assert_array_equal(image, read_radiograph(padded(tmp_path, 0)[1])[0])
    assert info.notes == ("unusable_padding",)


def test_a_window_that_shows_only_where_the_padding_is_counts_as_none(tmp_path):
    window = {"WindowCenter": 300, "WindowWidth": 100}
    image, info = read_radiograph(padded(tmp_path, 0, PixelPaddingValue=0, **window)[1])
    assert info.notes == ("unusable_window",) and info.own_range == (500, 3498)
    assert len(np.unique(image)) > 200


def test_explain_says_what_is_padding(tmp_path):
    fields = {"PixelPaddingValue": 0, "PhotometricInterpretation": "MONOCHROME1"}
    fields["PresentationLUTShape"] = "INVERSE"
    lines = explain(padded(tmp_path, 0, **fields)[1])
    assert lines[-2] == "padding: 0 .. 0.99237 (stored 0 to 0 is black)"
