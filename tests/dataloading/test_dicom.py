"""read_radiograph against a float64 NumPy path written here from DICOM PS3.3, pixel for pixel.

Oracles: the formulas of C.11.1 and C.11.2 on arrays; pydicom's own decoders for native and RLE
frames; Pillow for JPEG and JPEG 2000; the lossless copies of one image among themselves.
"""

import io
from pathlib import Path

import imagecodecs
import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate, get_frame

from mlip.dataloading.dicom import DicomError, read_radiograph, write_radiograph

SHARED = Path(__file__).parents[3] / "shared" / "data" / "dicom"
LOSSLESS_COPIES = (
    "explicit_le",
    "rle",
    "j2k_lossless",
    "jpeg_lossless_sv1",
    "jpegls_lossless",
)
ENCODING = {
    pydicom.uid.ImplicitVRLittleEndian: {"implicit_vr": True, "little_endian": True},
    pydicom.uid.ExplicitVRLittleEndian: {"implicit_vr": False, "little_endian": True},
    pydicom.uid.DeflatedExplicitVRLittleEndian: {"implicit_vr": False, "little_endian": True},
    pydicom.uid.ExplicitVRBigEndian: {"implicit_vr": False, "little_endian": False},
}
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is not here")


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


def stored_of(dataset: Dataset) -> np.ndarray:
    """Stored values by a decoder that is not the one under test."""
    syntax = dataset.file_meta.TransferSyntaxUID
    if not syntax.is_compressed or syntax.name.startswith(("RLE", "Deflated")):
        return dataset.pixel_array
    with Image.open(io.BytesIO(get_frame(dataset.PixelData, 0, number_of_frames=1))) as picture:
        scaled = np.asarray(picture)
    if picture.format == "JPEG":
        return scaled
    # Pillow spreads a J2K sample of n bits over 16
    siz = get_frame(dataset.PixelData, 0, number_of_frames=1).find(b"\xff\x51")
    precision = get_frame(dataset.PixelData, 0, number_of_frames=1)[siz + 40] + 1
    return scaled >> (16 - precision) if precision > 8 else scaled


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
        elif name == "PixelPaddingValue":
            dataset.add_new(name, "SS" if dataset.PixelRepresentation else "US", value)
        elif name == "syntax":
            dataset.file_meta.TransferSyntaxUID = value
        else:
            setattr(dataset, name, value)
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, dataset, **ENCODING[dataset.file_meta.TransferSyntaxUID])
    return dataset, buffer.getvalue()


def noise(bits: int, shape: tuple[int, int] = (37, 53), seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 1 << bits, shape).astype(np.uint16)


@needs_shared
@pytest.mark.parametrize(
    "name",
    [
        "derived/chest_explicit_le_mono1_15bit.dcm",
        "derived/chest_deflated_mono1_15bit.dcm",
        "derived/chest_rle_mono1_15bit.dcm",
        "derived/chest_rle_mono2_12bit.dcm",
        "original/highdicom_dx_image.dcm",
        "original/RG1_J2KI.dcm",
        "original/RG3_J2KI.dcm",
        "original/RG3_J2KR.dcm",
    ],
)
def test_real_radiograph_equals_the_float64_path(name):
    dataset = pydicom.dcmread(SHARED / name)
    image, info = read_radiograph(SHARED / name)
    # two JPEG 2000 decoders may round the irreversible wavelet differently: one stored step
    lossy = dataset.file_meta.TransferSyntaxUID.endswith(".91")
    slack = 65535 / (float(dataset.WindowWidth) - 1) if lossy else 0.0
    assert_nearest(image, golden(dataset, stored_of(dataset)), slack)
    assert info.inverted == (dataset.PhotometricInterpretation == "MONOCHROME1")
    assert (info.rows, info.columns) == image.shape


@needs_shared
@pytest.mark.parametrize("copy", LOSSLESS_COPIES)
def test_every_lossless_syntax_gives_the_pixels_of_the_uncompressed_file(copy):
    plain = SHARED / "derived" / "chest_explicit_le_mono1_15bit.dcm"
    expected = golden(pydicom.dcmread(plain), stored_of(pydicom.dcmread(plain)))
    image, info = read_radiograph(SHARED / "derived" / f"chest_{copy}_mono1_15bit.dcm")
    assert_nearest(image, expected)
    assert info.voi == "linear" and info.bits_stored == 15


@needs_shared
@pytest.mark.parametrize(
    "name, code",
    [
        ("broken_no_pixeldata.dcm", "no_pixels"),
        ("broken_no_preamble_no_meta.dcm", "not_dicom"),
        ("broken_truncated_j2k.dcm", "pixel_length"),
        ("chest_rle_multiframe2.dcm", "multi_frame"),
        ("chest_16bit.png", "not_dicom"),
    ],
)
def test_every_broken_file_is_refused_by_name(name, code):
    with pytest.raises(DicomError) as caught:
        read_radiograph(SHARED / "derived" / name)
    assert caught.value.code == code


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("syntax", ["explicit", "jpegls", "jpeg2000"])
@pytest.mark.parametrize("modality", ["DX", "CR"])
def test_a_written_image_comes_back_bit_for_bit(tmp_path, photometric, syntax, modality):
    image, path = noise(16), tmp_path / "a.dcm"
    write_radiograph(
        path,
        image,
        patient_id="p",
        study_id="s",
        view="AP",
        photometric=photometric,
        syntax=syntax,
        modality=modality,
    )
    back, info = read_radiograph(path)
    np.testing.assert_array_equal(back, image)
    assert (info.view, info.modality, info.inverted) == (
        "AP",
        modality,
        photometric == "MONOCHROME1",
    )
    assert [p.name for p in tmp_path.iterdir()] == ["a.dcm"]


@pytest.mark.parametrize("bits", [8, 10, 12, 15])
def test_fewer_bits_round_to_the_nearest_step(tmp_path, bits):
    image = noise(16)
    write_radiograph(tmp_path / "a", image, patient_id="p", study_id="s", bits_stored=bits)
    back, _ = read_radiograph(tmp_path / "a")
    steps = (1 << bits) - 1
    expected = np.floor(np.floor(image / 65535 * steps + 0.5) / steps * 65535 + 0.5)
    assert np.abs(back - expected).max() <= 1  # a tie may fall on either side
    assert back.min() >= 0 and np.abs(back.astype(int) - image).max() <= 65535 / steps / 2 + 1


def test_written_files_are_equal_byte_for_byte_and_valid_for_another_reader(tmp_path):
    for name in ("a", "b"):
        write_radiograph(tmp_path / name, noise(16), patient_id="p", study_id="s")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    dataset = pydicom.dcmread(tmp_path / "a")
    np.testing.assert_array_equal(dataset.pixel_array, noise(16))
    assert dataset.SOPClassUID.name.startswith("Digital X-Ray Image Storage")


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
    ],
    ids=lambda changes: "-".join(f"{k}={v}" for k, v in changes.items()),
)
@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("signed", [False, True])
def test_grey_scale_chain_equals_the_float64_path(tmp_path, changes, photometric, signed):
    if "PixelPaddingValue" in changes:
        changes = {**changes, "PixelPaddingValue": -2048 if signed else 0}
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
        **changes,
    )
    stored = noise(12).astype(np.int64) - 2048 if signed else noise(12).astype(np.int64)
    image, info = read_radiograph(data)
    assert_nearest(image, golden(dataset, stored))
    assert (info.voi == "own_range") == (changes.get("WindowWidth", 1) is None)
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
        image, info = read_radiograph(data)
        assert not image.any() and image.shape == (9, 7)
        assert info.own_range == (4321.0, 4321.0) and not info.inverted


@pytest.mark.parametrize("centre, width", [("nan", "10"), ("5", "0"), ("5", "-3"), ("x", "9")])
def test_unusable_window_is_replaced_by_the_own_range_and_noted(tmp_path, centre, width):
    _, plain = edited(tmp_path, noise(16), WindowCenter=None, WindowWidth=None)
    _, data = edited(tmp_path, noise(16))
    dataset = pydicom.dcmread(io.BytesIO(data))
    for name, value in (("WindowCenter", centre), ("WindowWidth", width)):
        raw = dataset.get_item(name)
        dataset._dict[raw.tag] = raw._replace(value=value.encode().ljust(4), length=4)
    buffer = io.BytesIO()
    dataset.save_as(buffer)
    image, info = read_radiograph(buffer.getvalue())
    np.testing.assert_array_equal(image, read_radiograph(plain)[0])
    assert info.voi == "own_range" and info.notes == ("unusable_window",)


def compressed(tmp_path: Path, cells: np.ndarray, frame: bytes, syntax: str, bits: int) -> bytes:
    dataset, _ = edited(tmp_path, noise(16), cells=cells, BitsStored=bits, HighBit=bits - 1)
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.PixelData = encapsulate([bytes(frame)])
    dataset["PixelData"].VR = "OB"
    dataset["PixelData"].is_undefined_length = True
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, dataset)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "syntax, bits, encode, tolerance",
    [
        ("1.2.840.10008.1.2.4.50", 8, lambda c: imagecodecs.jpeg8_encode(c, level=100), 2),
        (
            "1.2.840.10008.1.2.4.51",
            12,
            lambda c: imagecodecs.jpeg8_encode(c, level=100, bitspersample=12),
            3,
        ),
        (
            "1.2.840.10008.1.2.4.57",
            12,
            lambda c: imagecodecs.jpeg8_encode(c, lossless=True, predictor=4, bitspersample=12),
            0,
        ),
        (
            "1.2.840.10008.1.2.4.70",
            16,
            lambda c: imagecodecs.jpeg8_encode(c, lossless=True, predictor=1, bitspersample=16),
            0,
        ),
        ("1.2.840.10008.1.2.4.81", 12, lambda c: imagecodecs.jpegls_encode(c, level=2), 2),
        ("1.2.840.10008.1.2.4.201", 12, lambda c: imagecodecs.htj2k_encode(c, level=0), 0),
        ("1.2.840.10008.1.2.4.202", 8, lambda c: imagecodecs.htj2k_encode(c, level=0), 0),
    ],
    ids=["jpeg8", "jpeg12", "jpeg-lossless-12", "jpeg-lossless-16", "jpegls-near", "ht12", "ht8"],
)
def test_every_codec_stays_within_its_own_loss(tmp_path, syntax, bits, encode, tolerance):
    ramp = np.add.outer(np.arange(61) * 3, np.arange(83) * 2) * ((1 << bits) - 1) // 350
    cells = np.clip(ramp, 0, (1 << bits) - 1).astype(np.uint8 if bits == 8 else np.uint16)
    image, info = read_radiograph(compressed(tmp_path, cells, encode(cells), syntax, bits))
    dataset = Dataset()
    dataset.WindowCenter, dataset.WindowWidth = 32768, 65536  # what `edited` leaves in place
    dataset.PhotometricInterpretation = "MONOCHROME2"
    assert_nearest(image, golden(dataset, cells), slack=tolerance)
    assert info.transfer_syntax == syntax


@pytest.mark.parametrize(
    "name, twin",
    [
        ("MR_small.dcm", None),
        ("MR_small_implicit.dcm", None),
        ("MR_small_bigendian.dcm", None),
        ("MR_small_expb.dcm", None),
        ("CT_small.dcm", None),
        ("image_dfl.dcm", None),
        ("MR_small_RLE.dcm", "MR_small.dcm"),
        ("MR_small_jpeg_ls_lossless.dcm", "MR_small.dcm"),
        ("MR_small_jp2klossless.dcm", "MR_small.dcm"),
    ],
)
def test_files_of_other_makers_equal_the_float64_path(name, twin):
    path = get_testdata_file(name, download=False)
    assert path is not None, f"pydicom {pydicom.__version__} no longer ships {name}"
    dataset = pydicom.dcmread(path)
    source = pydicom.dcmread(get_testdata_file(twin, download=False)) if twin else dataset
    assert_nearest(read_radiograph(path)[0], golden(dataset, source.pixel_array))
