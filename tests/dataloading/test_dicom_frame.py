"""One frame's cells out of a code stream: cut streams, and 8 bits where 16 are allocated.

Oracles: pydicom's own decoding where it has one, else the array that was encoded.
"""

import io
import time
from collections.abc import Callable
from typing import Any

import imagecodecs
import numpy as np
import pydicom
import pytest
from pydicom.encaps import encapsulate
from pydicom.pixels.encoders import RLELosslessEncoder

from mlip.dataloading.dicom.frame import read_cells
from mlip.dataloading.dicom.header import read_header
from mlip.dataloading.dicom.radiograph import DicomError, read_radiograph
from mlip.dataloading.dicom.tone import stored_values
from tests.dataloading.dicom_golden import ENCODING, compressed, edited, htj2k, noise

UID = "1.2.840.10008.1.2.4."
FILM = (np.add.outer(np.arange(96) ** 2, np.arange(128) * 40) // 4 + noise(5, (96, 128))) % 4096
FILM = FILM.astype(np.uint16)
BYTES = (FILM >> 4).astype(np.uint8)
THUMBNAIL = b"\xff\xe1\x00\x0cExif\0\0\xff\xd8\xff\xd9"  # a whole JPEG in an application segment


def jpeg12(**options: Any) -> bytes:
    return bytes(imagecodecs.jpeg8_encode(FILM, bitspersample=12, **options))


CODE_STREAMS: dict[str, tuple[np.ndarray, Callable[[], bytes]]] = {
    f"{UID}50": (BYTES, lambda: imagecodecs.jpeg8_encode(BYTES, level=90)),
    f"{UID}51": (FILM, lambda: jpeg12(level=95)),
    f"{UID}57": (FILM, lambda: jpeg12(lossless=True, predictor=4)),
    f"{UID}70": (FILM, lambda: jpeg12(lossless=True, predictor=1)),
    f"{UID}80": (FILM, lambda: imagecodecs.jpegls_encode(FILM)),
    f"{UID}81": (FILM, lambda: imagecodecs.jpegls_encode(FILM, level=2)),
    f"{UID}90": (FILM, lambda: imagecodecs.jpeg2k_encode(FILM, level=0, codecformat="j2k")),
    f"{UID}91": (FILM, lambda: imagecodecs.jpeg2k_encode(FILM, level=60, codecformat="j2k")),
    f"{UID}201": (FILM, lambda: htj2k(FILM)),
    "1.2.840.10008.1.2.5": (
        FILM,
        lambda: RLELosslessEncoder.encode(
            FILM, rows=96, columns=128, samples_per_pixel=1, number_of_frames=1, bits_allocated=16,
            bits_stored=16, pixel_representation=0, photometric_interpretation="MONOCHROME2",
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("syntax", CODE_STREAMS)
def test_a_cut_code_stream_is_refused_and_never_filled_with_grey(tmp_path, syntax):
    """libjpeg only warned: a film of which a third had arrived was read, two thirds of it grey.
    The codec of JPEG-LS took 7 s of the processor to refuse one of 7 KB."""
    cells, encode = CODE_STREAMS[syntax]
    whole, bits = bytes(encode()), 8 * cells.itemsize
    assert read_radiograph(compressed(tmp_path, cells, whole, syntax, bits))[0].std() > 0
    for share in (0.98, 0.7, 0.3):
        cut = whole[: int(len(whole) * share)]
        start = time.thread_time()
        with pytest.raises(DicomError) as caught:
            read_radiograph(compressed(tmp_path, cells, cut, syntax, bits))
        assert time.thread_time() - start < 1.0
        assert caught.value.code in ("decode_failed", "frame_mismatch"), share


def test_the_end_mark_of_a_thumbnail_is_not_the_films(tmp_path):
    whole = jpeg12(lossless=True, predictor=1)
    expected = read_radiograph(compressed(tmp_path, FILM, whole, f"{UID}70", 12))[0]
    scan = whole.index(b"\xff\xda")
    for at in (2, scan):  # in front of the frame header, and between it and the scan
        frame = whole[:at] + THUMBNAIL + whole[at:]
        found = read_radiograph(compressed(tmp_path, FILM, frame, f"{UID}70", 12))[0]
        np.testing.assert_array_equal(found, expected)
        cut = compressed(tmp_path, FILM, frame[: len(frame) // 2], f"{UID}70", 12)
        with pytest.raises(DicomError, match="no JPEG end marker"):
            read_radiograph(cut)


@pytest.mark.parametrize("syntax", [f"{UID}70", f"{UID}80"])
def test_any_number_of_fill_bytes_may_stand_in_front_of_a_marker(tmp_path, syntax):
    """ITU-T T.81 B.1.1.2."""
    whole = bytes(CODE_STREAMS[syntax][1]())
    expected = read_radiograph(compressed(tmp_path, FILM, whole, syntax, 12))[0]
    for at in (2, whole.index(b"\xff\xda")):
        frame = whole[:at] + b"\xff\xff" + whole[at:]
        found = read_radiograph(compressed(tmp_path, FILM, frame, syntax, 12))[0]
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("fragments", [1, 7])
@pytest.mark.parametrize("padding", [b"", b"\0", b"\0" * 5001, b"\xff" * 9])
def test_padding_and_fragments_hide_no_end_mark(tmp_path, padding, fragments):
    """The end marker may stand across two fragments, or far in front of the last byte."""
    whole = jpeg12(lossless=True, predictor=1)
    data = compressed(tmp_path, FILM, whole, f"{UID}70", 12)
    dataset = pydicom.dcmread(io.BytesIO(data))
    dataset.PixelData = encapsulate([whole + padding], fragments_per_frame=fragments)
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, dataset)
    np.testing.assert_array_equal(read_radiograph(buffer.getvalue())[0], read_radiograph(data)[0])


def stored(data: bytes) -> np.ndarray:
    """The numbers the reader sees, before rescale and window."""
    header, stream = read_header(io.BytesIO(data))
    return stored_values(header)[read_cells(header, stream)].astype(int)


@pytest.mark.parametrize("representation", ["OB", "OW"])
@pytest.mark.parametrize("shape", [(36, 52), (37, 53)])
def test_8_bit_cells_in_big_endian_words_come_in_swapped_pairs(tmp_path, representation, shape):
    syntax = pydicom.uid.ExplicitVRBigEndian
    cells = noise(8, shape).astype(np.uint8)
    dataset, _ = edited(tmp_path, noise(16), syntax=syntax, cells=cells, BitsStored=8, HighBit=7)
    dataset["PixelData"].VR = representation
    if representation == "OW":
        dataset["PixelData"].value = np.frombuffer(dataset.PixelData, "<u2").byteswap().tobytes()
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, dataset, **ENCODING[syntax])
    np.testing.assert_array_equal(stored(buffer.getvalue()), cells)
    buffer.seek(0)
    np.testing.assert_array_equal(pydicom.dcmread(buffer).pixel_array, cells)


@pytest.mark.parametrize("stored_bits", [8, 12, 16])
@pytest.mark.parametrize("header_signed", [0, 1])
@pytest.mark.parametrize("kind", [np.uint8, np.int8])
def test_an_8_bit_code_stream_in_16_bits_equals_pydicom(tmp_path, kind, header_signed, stored_bits):
    """It was refused as malformed, and -1 read as 255 where a window was given."""
    frame = bytes(imagecodecs.jpeg2k_encode(BYTES.view(kind), level=0, codecformat="j2k"))
    fields = {"PixelRepresentation": header_signed}
    data = compressed(tmp_path, FILM, frame, f"{UID}90", stored_bits, **fields)
    expected = BYTES.view(np.int8 if header_signed else np.uint8).astype(int)
    np.testing.assert_array_equal(stored(data), expected)
    if kind == np.uint8 or header_signed:  # pydicom's way over Pillow adds 128 to the others
        np.testing.assert_array_equal(pydicom.dcmread(io.BytesIO(data)).pixel_array, expected)
    assert read_radiograph(data)[0].shape == FILM.shape


@pytest.mark.parametrize("window", [{}, {"WindowCenter": None, "WindowWidth": None}])
@pytest.mark.parametrize(
    "syntax, encode",
    [
        (f"{UID}50", lambda: imagecodecs.jpeg8_encode(BYTES, level=100)),
        (f"{UID}70", lambda: imagecodecs.jpeg8_encode(BYTES, lossless=True, predictor=1)),
        (f"{UID}80", lambda: imagecodecs.jpegls_encode(BYTES)),
        (f"{UID}201", lambda: htj2k(BYTES)),
    ],
)
def test_other_8_bit_code_streams_in_16_bits_keep_their_numbers(tmp_path, syntax, encode, window):
    data = compressed(tmp_path, FILM, encode(), syntax, 12, **window)
    assert np.abs(stored(data) - BYTES.astype(int)).max() <= (2 if syntax.endswith("50") else 0)
    assert read_radiograph(data)[0].any()
