"""write_radiograph: what is written comes back, bit for bit or to the nearest step of its bits.

Oracles: the array that was written, and pydicom as another reader.
"""

import numpy as np
import pydicom
import pytest

from mlip.dataloading.dicom.radiograph import read_radiograph, write_radiograph
from tests.dataloading.dicom_golden import noise


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


def test_ids_that_read_alike_one_after_the_other_give_other_uids(tmp_path):
    # a set of such files was taken for copies of one image
    image = np.zeros((16, 16), np.uint16)
    uids = []
    for patient, study in (("1", "11"), ("11", "1")):
        write_radiograph(tmp_path / "a", image, patient_id=patient, study_id=study)
        dataset = pydicom.dcmread(tmp_path / "a")
        uids += [dataset.StudyInstanceUID, dataset.SeriesInstanceUID, dataset.SOPInstanceUID]
    assert len(set(uids)) == 6


def test_written_files_are_equal_byte_for_byte_and_valid_for_another_reader(tmp_path):
    for name in ("a", "b"):
        write_radiograph(tmp_path / name, noise(16), patient_id="p", study_id="s")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    dataset = pydicom.dcmread(tmp_path / "a")
    np.testing.assert_array_equal(dataset.pixel_array, noise(16))
    assert dataset.SOPClassUID.name.startswith("Digital X-Ray Image Storage")
