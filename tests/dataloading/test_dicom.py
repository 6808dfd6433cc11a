"""read_radiograph on real files and every transfer syntax, pixel for pixel.

Oracles: the float64 path of dicom_golden.py over the pixels of another decoder (pydicom's own for
native and RLE frames, Pillow for JPEG and JPEG 2000), and the lossless copies of one image among
themselves.
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
from pydicom.encaps import get_frame

from mlip.dataloading.dicom.radiograph import DicomError, read_radiograph
from tests.dataloading.dicom_golden import assert_nearest, compressed, golden, htj2k

SHARED = Path(__file__).parents[3] / "shared" / "data" / "dicom"
LOSSLESS_COPIES = (
    "explicit_le",
    "rle",
    "j2k_lossless",
    "jpeg_lossless_sv1",
    "jpegls_lossless",
)
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is not here")


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
        ("1.2.840.10008.1.2.4.201", 12, lambda c: htj2k(c), 0),
        ("1.2.840.10008.1.2.4.202", 8, lambda c: htj2k(c), 0),
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
