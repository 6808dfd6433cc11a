"""`mlip ground --out map.dcm`: the picture that the PNG is, as an object of the film's study.

Oracles: the PNG of the same question; a bright square in the film for where the map has to be hot.
"""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pydicom
import pytest

from mlip.cli import main
from mlip.dataloading.dicom.radiograph import write_radiograph
from mlip.transfer.films import ground_image
from tests.small_run import small_export
from tests.transfer.films.test_ground_image import CROP, RESIZE, one_hot_patch

HEAD = ground_image.CAPTION_PX


def ask(film: Path, out: Path, *more: str) -> int:
    command = ["ground", str(film), "left pleural effusion", *more]
    return main([*command, "--checkpoint", str(small_export()), "--out", str(out)])


def write_film(path: Path, pixels: np.ndarray | None = None, **more: Any) -> Path:
    if pixels is None:
        noise = np.random.default_rng(1).integers(9000, 60_000, (90, 120))
        pixels = cv2.GaussianBlur(noise.astype(np.uint16), (0, 0), 3)
    write_radiograph(path, pixels, patient_id="SECRET-ID", study_id="s", **more)
    return path


def rgb(path: Path) -> np.ndarray:
    return pydicom.dcmread(path).pixel_array.astype(int)


@pytest.mark.parametrize("phrases", [(), ("pacemaker", "pneumothorax")], ids=["one", "three"])
@pytest.mark.parametrize("words", [(), ("--words",)], ids=["", "words"])
def test_the_picture_is_that_of_the_png_with_a_notice_above_the_film(
    phrases: tuple[str, ...], words: tuple[str, ...], tmp_path: Path
) -> None:
    film = write_film(tmp_path / "film.dcm")
    assert ask(film, tmp_path / "map.png", *phrases, *words) == 0
    assert ask(film, tmp_path / "map.dcm", *phrases, *words) == 0
    wanted, found = cv2.imread(str(tmp_path / "map.png"))[..., ::-1], rgb(tmp_path / "map.dcm")
    width = found.shape[1] // (len(phrases) + 2)
    if not phrases:  # the PNG of one phrase has no captions
        wanted = np.pad(wanted, ((HEAD, 0), (0, 0), (0, 0)), constant_values=255)
        assert (found[:HEAD, width + 8 :] < 100).any()  # what was asked
    else:
        np.testing.assert_array_equal(found[:HEAD, width + 8 :], wanted[:HEAD, width + 8 :])
    np.testing.assert_array_equal(found[HEAD:], wanted[HEAD:])
    assert (found[:HEAD, :width] < 100).any()  # the notice


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("size", [(150, 300), (300, 150)], ids=["wide", "tall"])
@pytest.mark.parametrize("cell", [(4, 3), (7, 8)], ids=["upper left", "lower right"])
def test_heat_lies_on_the_part_of_the_film_that_the_patch_saw(
    cell: tuple[int, int],
    size: tuple[int, int],
    photometric: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A bright square stands where that patch looks: on film and map at one place."""
    height, width = size
    rows, columns = one_hot_patch(monkeypatch, *cell)
    scale, margin = max(size) / RESIZE, (RESIZE - CROP) / 2
    x = ((cell[1] + 0.5) * CROP / columns + margin - (RESIZE - width / scale) / 2) * scale
    y = ((cell[0] + 0.5) * CROP / rows + margin - (RESIZE - height / scale) / 2) * scale
    pixels = np.full(size, 12_000, np.uint16)
    pixels[round(y) - 9 : round(y) + 9, round(x) - 9 : round(x) + 9] = 50_000
    film = write_film(tmp_path / "film.dcm", pixels, photometric=photometric)
    assert ask(film, tmp_path / "map.dcm") == 0
    picture = rgb(tmp_path / "map.dcm")[HEAD:]
    zoom = picture.shape[0] / height
    plain, hot = picture[:, : round(width * zoom)], picture[:, -round(width * zoom) :]
    square = np.nonzero(plain[..., 0] > 120)
    colour = hot[..., 0] - hot[..., 2]  # the scale's hot end is yellow, not blue
    heat = np.nonzero(colour > 60)
    assert square[0].size and heat[0].size
    centres = [(where[1].mean() / zoom, where[0].mean() / zoom) for where in (square, heat)]
    assert centres[0] == pytest.approx((x, y), abs=1.5)
    assert centres[1] == pytest.approx(centres[0], abs=0.5 * CROP / columns * scale)


def test_the_same_command_writes_the_same_file_for_its_owner_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    film = write_film(tmp_path / "film.dcm")
    for name in ("a.dcm", "b.DCM", "a.dcm"):
        assert ask(film, tmp_path / name) == 0
    said = capsys.readouterr()
    assert (tmp_path / "a.dcm").read_bytes() == (tmp_path / "b.DCM").read_bytes()
    assert stat.S_IMODE((tmp_path / "a.dcm").stat().st_mode) == 0o600
    made = pydicom.dcmread(tmp_path / "a.dcm")
    assert made.PatientID == "SECRET-ID"
    assert made.StudyInstanceUID == pydicom.dcmread(film).StudyInstanceUID
    assert "SECRET" not in said.out + said.err and "Not for clinical use." in said.out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.dcm", "b.DCM", "film.dcm"]


def test_a_map_replaces_a_map_and_never_a_film(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    film, other = (write_film(tmp_path / name) for name in ("film.dcm", "other.dcm"))
    link = tmp_path / "link.dcm"
    link.symlink_to(film)
    before = film.read_bytes()
    for place in (film, other, link):
        assert ask(film, place) == 2
        assert "is there already and is no map of mlip ground" in capsys.readouterr().err
    assert film.read_bytes() == other.read_bytes() == before
    out = tmp_path / "map.dcm"
    assert ask(film, out) == 0
    first = out.read_bytes()
    assert ask(film, out, "--words") == 0 and out.read_bytes() != first
    assert ask(out, tmp_path / "again.dcm") == 3  # a map is no film
    assert "unsupported_photometric" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_a_film_without_a_study_is_refused_with_what_to_do(
    suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    film, out = tmp_path / f"film{suffix}", tmp_path / "map.dcm"
    cv2.imwrite(str(film), np.full((64, 64), 200, np.uint8))
    assert ask(film, out) == 2
    said = capsys.readouterr().err
    assert "is no DICOM file" in said and "map.png" in said and str(film) in said
    assert not out.exists()
    assert ask(film, tmp_path / "map.gif") == 2
    assert "map.png or map.dcm" in capsys.readouterr().err


def test_a_film_without_a_study_uid_is_named_with_the_attribute_and_no_value(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    film, out = write_film(tmp_path / "film.dcm"), tmp_path / "map.dcm"
    dataset = pydicom.dcmread(film)
    del dataset.StudyInstanceUID
    dataset.save_as(film)
    assert ask(film, out) == 3
    said = capsys.readouterr()
    assert "StudyInstanceUID" in said.err and str(film) in said.err and "map.png" in said.err
    assert "SECRET" not in said.out + said.err and not out.exists()
    assert ask(film, tmp_path / "map.png") == 0  # which asks for no identity


@pytest.mark.parametrize(
    "name",
    [
        "original/RG1_J2KI",
        "original/RG3_J2KI",
        "original/highdicom_dx_image",
        "derived/chest_deflated_mono1_15bit",
        "derived/chest_rle_mono2_12bit",
    ],
)
def test_real_films_of_both_tones_and_several_syntaxes_get_a_map(
    name: str, shared_data: Path, tmp_path: Path
) -> None:
    film, out = shared_data / "dicom" / f"{name}.dcm", tmp_path / "map.dcm"
    assert ask(film, out) == 0
    made, source = pydicom.dcmread(out), pydicom.dcmread(film)
    for tag in ("StudyInstanceUID", "PatientID", "PatientName", "PatientOrientation", "StudyDate"):
        assert made[tag].value == source[tag].value, tag
    lossy = source.get("LossyImageCompression")
    assert made.get("LossyImageCompression") == lossy
    picture = made.pixel_array.astype(int)
    height, width = source.Rows, source.Columns
    # at most 1024 px; small films are enlarged by a whole factor
    zoom = min(1024 / max(height, width), -(-448 // max(height, width)))
    shown = round(height * zoom), round(width * zoom)
    head = HEAD * max(1, shown[1] // 448)  # names are larger over large pictures
    assert picture.shape == (head + shown[0], 2 * shown[1] + max(4, shown[1] // 100), 3)
    assert 20 < picture[head:, : shown[1]].mean() < 235
    # the notice and the phrase fill a good part of the room above
    for begin in (0, picture.shape[1] - shown[1]):
        marks = np.nonzero((picture[:head, begin : begin + shown[1]] < 100).any(axis=(1, 2)))[0]
        assert np.ptp(marks) > 0.4 * head


def test_the_film_in_the_picture_is_shown_by_its_own_table_of_grey_values(tmp_path: Path) -> None:
    """A VOI LUT that shows the right half, of the higher values, black and the left half white."""
    pixels = np.full((112, 112), 20_000, np.uint16)
    pixels[:, 56:] = 45_000
    film = tmp_path / "film.dcm"
    write_radiograph(film, pixels, patient_id="p", study_id="s", bits_stored=8)
    dataset, table = pydicom.dcmread(film), pydicom.Dataset()
    table.LUTDescriptor, table.LUTData = [256, 0, 16], b"\xff\xff" * 128 + b"\0\0" * 128
    table["LUTData"].VR = "OW"
    dataset.VOILUTSequence = [table]
    del dataset.WindowCenter, dataset.WindowWidth
    dataset.save_as(film)
    assert ask(film, tmp_path / "map.dcm") == 0
    shown = rgb(tmp_path / "map.dcm")[HEAD:, :448]
    assert shown[:, :200].min() > 250 and shown[:, 248:].max() < 5


def test_a_film_of_several_frames_is_refused(
    shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    film = shared_data / "dicom" / "derived" / "chest_rle_multiframe2.dcm"
    assert ask(film, tmp_path / "map.dcm") == 3
    assert "multi_frame" in capsys.readouterr().err and not any(tmp_path.iterdir())
