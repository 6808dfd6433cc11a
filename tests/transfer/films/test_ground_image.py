"""`mlip ground` puts a hot patch where the file has it: PNG, wide and tall, DICOM of both tones.

Oracle: the letterbox and crop by hand, and for DICOM the PNG of the same pixels.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from mlip.cli import main
from mlip.dataloading.dicom.radiograph import write_radiograph
from mlip.pretrained import from_pretrained
from mlip.transfer.alignment import patch_maps
from mlip.transfer.alignment.prompts import encode_prompts
from mlip.transfer.films import ground_image
from tests.small_run import small_export, small_run

RESIZE, CROP = 112, 96


def ground(
    image: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> tuple[float, float, np.ndarray]:
    """(x, y) that the command names, and the picture it wrote."""
    command = ["ground", str(image), "left pleural effusion", "--checkpoint", str(small_export())]
    assert main([*command, "--out", str(out)]) == 0
    x, y = re.findall(r"[xy]=(-?\d+)", capsys.readouterr().out)[:2]
    return float(x), float(y), cv2.imread(str(out)).astype(int)


def one_hot_patch(monkeypatch: pytest.MonkeyPatch, row: int, column: int) -> tuple[int, int]:
    """Every phrase points at this patch of the model's grid; the grid."""
    blank = torch.zeros(1, 1, CROP, CROP)
    grid = small_run().model.encode_image(blank).grid

    def maps(model: object, patches: torch.Tensor, texts: object) -> torch.Tensor:
        heat = torch.zeros(1, 1, patches.shape[1])
        heat[0, 0, row * grid[1] + column] = 1.0
        return heat

    monkeypatch.setattr(ground_image, "phrase_maps", maps)
    return grid


@pytest.mark.parametrize(
    "size", [(112, 112), (150, 300), (300, 150)], ids=["as is", "wide", "tall"]
)
@pytest.mark.parametrize("cell", [(3, 3), (3, 8), (8, 5)], ids=["left", "right", "low"])
def test_the_point_and_the_heat_lie_where_the_patch_saw_the_file(
    size: tuple[int, int],
    cell: tuple[int, int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    height, width = size
    pixels = np.random.default_rng(0).integers(60, 120, size).astype(np.uint8)
    cv2.imwrite(str(tmp_path / "image.png"), pixels)
    rows, columns = one_hot_patch(monkeypatch, *cell)
    x, y, picture = ground(tmp_path / "image.png", tmp_path / "map.png", capsys)
    # the patch's centre in the crop, in the letterboxed square, in the file
    scale = max(size) / RESIZE
    left, top = (RESIZE - width / scale) / 2, (RESIZE - height / scale) / 2
    margin = (RESIZE - CROP) / 2
    wanted_x = ((cell[1] + 0.5) * CROP / columns + margin - left) * scale
    wanted_y = ((cell[0] + 0.5) * CROP / rows + margin - top) * scale
    assert 0 <= wanted_x < width and 0 <= wanted_y < height  # not in the letterbox's margin
    assert (x, y) == pytest.approx((wanted_x, wanted_y), abs=1.5 * scale)
    # left half the radiograph, right half the map: colour where the patch is and nowhere far off
    half = (picture.shape[1] - max(4, picture.shape[0] * width // height // 100)) // 2
    colour = np.ptp(picture, axis=2)
    assert colour[:, :half].max() == 0
    ys, xs = np.nonzero(colour > 60)
    shown = half / width
    centre = (xs.mean() - (picture.shape[1] - half)) / shown, ys.mean() / shown
    assert centre == pytest.approx((wanted_x, wanted_y), abs=CROP / columns * scale)


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_a_dicom_file_of_sixteen_bits_is_drawn_as_its_png(
    photometric: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ramp = np.linspace(3000, 62_000, 90 * 120).reshape(90, 120)
    noise = np.random.default_rng(1).normal(0, 900, ramp.shape)
    pixels = (ramp + noise).clip(0, 65_535).astype(np.uint16)
    cv2.imwrite(str(tmp_path / "image.png"), pixels)
    write_radiograph(
        tmp_path / "image.dcm", pixels, patient_id="SECRET", study_id="s", photometric=photometric
    )
    x, y, wanted = ground(tmp_path / "image.png", tmp_path / "a.png", capsys)
    found_x, found_y, found = ground(tmp_path / "image.dcm", tmp_path / "b.png", capsys)
    assert (found_x, found_y) == (x, y)
    assert np.abs(found - wanted).mean() < 1.0
    assert found[:, :50].mean() == pytest.approx(wanted[:, :50].mean(), abs=1.0)
    assert b"SECRET" not in (tmp_path / "b.png").read_bytes()


def test_each_word_and_each_linked_concept_has_a_map_of_its_own_below(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pixels = np.random.default_rng(0).integers(60, 120, (112, 112)).astype(np.uint8)
    cv2.imwrite(str(tmp_path / "image.png"), pixels)
    command = ["ground", str(tmp_path / "image.png"), "no pneumothorax, left pleural effusion"]
    command += ["--checkpoint", str(small_export()), "--out"]
    assert main([*command, str(tmp_path / "a.png")]) == 0
    assert "  left" not in capsys.readouterr().out
    assert main([*command, str(tmp_path / "b.png"), "--words"]) == 0
    named = [line.split("best")[0].strip() for line in capsys.readouterr().out.splitlines()[3:-2]]
    assert named == [
        *("no", "pneumothorax", ",", "left", "pleural", "effusion"),
        *("pneumothorax (absent)", "pleural effusion (present)"),
    ]
    plain, taller = (cv2.imread(str(tmp_path / f"{name}.png")) for name in "ab")
    np.testing.assert_array_equal(taller[: plain.shape[0]], plain)
    panels = taller[plain.shape[0] :]
    each = (plain.shape[1] + 8) // 4  # eight maps, four in a row, 8 px around them
    assert panels.shape == (2 * (ground_image.CAPTION_PX + each), plain.shape[1], 3)
    assert np.ptp(panels.astype(int), axis=2).max() > 60  # coloured


def test_several_phrases_have_maps_on_one_scale_and_each_its_own_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second phrase fits half as well, the third nowhere: half as hot, and cold."""
    pixels = np.full((112, 112), 90, np.uint8)
    cv2.imwrite(str(tmp_path / "film.png"), pixels)
    grid = small_run().model.encode_image(torch.zeros(1, 1, CROP, CROP)).grid
    cells = (3, 3), (8, 5), (6, 8)

    def maps(model: object, patches: torch.Tensor, texts: object) -> torch.Tensor:
        heat = torch.zeros(3, 1, patches.shape[1])
        for number, (row, column) in enumerate(cells):
            heat[number, 0, row * grid[1] + column] = (1.0, 0.8, 0.05)[number]
        return heat

    monkeypatch.setattr(ground_image, "phrase_maps", maps)
    phrases = ["left pleural effusion", "no pneumothorax", "pacemaker, " * 15]
    command = ["ground", str(tmp_path / "film.png"), *phrases, "--checkpoint", str(small_export())]
    assert main([*command, "--out", str(tmp_path / "map.png")]) == 0
    said = capsys.readouterr().out.splitlines()
    assert [said[4 * n] for n in range(3)] == [f'"{phrase}"' for phrase in phrases]
    scale = CROP / grid[0], (RESIZE - CROP) / 2
    for number, (row, column) in enumerate(cells):
        x, y = (float(v) for v in re.findall(r"[xy]=(-?\d+)", said[4 * number + 1]))
        wanted = (column + 0.5) * scale[0] + scale[1], (row + 0.5) * scale[0] + scale[1]
        assert (x, y) == pytest.approx(wanted, abs=1.5)
    assert "pneumothorax (absent)" in said[7]

    picture = cv2.imread(str(tmp_path / "map.png")).astype(int)
    side, gap, head = 448, 4, ground_image.CAPTION_PX
    assert picture.shape == (side + head, 4 * side + 3 * gap, 3)
    panels = [picture[head:, n * (side + gap) :][:, :side] for n in range(4)]
    assert np.ptp(panels[0], axis=2).max() == 0  # the film as it is
    coloured = [int((np.ptp(panel, axis=2) > 30).sum()) for panel in panels[1:]]
    assert coloured[0] > 1.1 * coloured[1] > 0 == coloured[2], coloured
    dark = [
        np.nonzero((picture[:head, n * (side + gap) :][:, :side] < 100).any(axis=(0, 2)))[0]
        for n in range(4)
    ]
    assert dark[0].size == 0 and all(marks.size for marks in dark[1:])
    assert dark[3].max() > 400  # as much of a long phrase as has room above its map


def test_the_scale_is_that_of_all_phrases_and_a_long_name_ends_in_dots() -> None:
    """The second map goes from -1 to 0: without it in the scale the first one's zeros are cold."""
    flat, ramp = np.zeros((64, 64), np.float32), np.tile(np.linspace(-1, 0, 64), (64, 1))
    at = (32.0, 32.0)
    long = "pleural effusion " * 9
    maps = [(flat, at), (ramp.astype(np.float32), at)]
    picture = ground_image._sheet(np.full((64, 64), 90, np.uint8), ["a", long], maps, []).astype(
        int
    )
    first = picture[ground_image.CAPTION_PX :, 448 + 4 :][:, :448]
    assert np.median(np.ptp(first, axis=2)) > 60  # as hot as the ramp's hot end
    shown = ground_image._fitting(long, 448, 1)
    assert shown.endswith("...") and long.startswith(shown[:-3]) and len(shown) > 40
    assert ground_image._fitting(long, 2, 1) == ""  # a film of a few pixels' width
    assert ground_image._fitting("left pleural effusion", 448, 1) == "left pleural effusion"


def test_a_phrase_alone_is_drawn_as_the_hottest_of_several(tmp_path: Path) -> None:
    """Oracle: the picture of one phrase. The same phrase twice has the same map twice."""
    opened = from_pretrained(small_export())
    film = tmp_path / "film.png"
    cv2.imwrite(str(film), np.random.default_rng(2).integers(20, 220, (90, 150)).astype(np.uint8))
    phrase = "left pleural effusion"
    (one,), alone_png = ground_image.ground_image(opened, film, [phrase], Path("one.png"))
    two, twice_png = ground_image.ground_image(opened, film, [phrase, phrase], Path("two.png"))
    for answer in two:
        assert (answer.phrase, answer.mentions) == (phrase, one.mentions)
        assert answer.point == pytest.approx(one.point, abs=0.5)
        assert (answer.highest, answer.mean) == pytest.approx((one.highest, one.mean), abs=1e-5)
    alone, twice = (
        cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_COLOR)
        for png in (alone_png, twice_png)
    )
    captioned = twice[ground_image.CAPTION_PX :]
    np.testing.assert_allclose(captioned[:, : alone.shape[1]].astype(int), alone, atol=3)
    width = (alone.shape[1] - 4) // 2
    np.testing.assert_allclose(captioned[:, -width:].astype(int), alone[:, -width:], atol=3)


def test_a_phrase_is_the_weighted_sum_of_its_rows_and_parts_are_those_rows() -> None:
    """Oracle: the phrase's own map, which pools the rows before it meets the patches."""
    run = small_run()
    opened = from_pretrained(small_export())
    phrase = "there is a left pleural effusion."
    bank = encode_prompts(run, [phrase])
    patches = torch.randn(1, 16, run.config.model.embed_dim)
    rows = patch_maps.token_maps(run.model, patches, bank)
    _, weights = patch_maps.text_rows(run.model, bank)
    whole = patch_maps.phrase_maps(run.model, patches, bank)[0]
    torch.testing.assert_close((weights[..., None] * rows).sum(dim=1), whole, rtol=1e-4, atol=1e-5)
    parts = ground_image.phrase_parts(opened, phrase, patches)
    assert parts[-1].name == "pleural effusion (present)"
    last = bank.content_mask.shape[1]  # the first entity's row
    np.testing.assert_allclose(parts[-1].heat, rows[0, last].numpy(), atol=1e-5)
    assert np.abs(np.stack([p.heat for p in parts])).max() <= 1.0 + 1e-5


def test_a_phrase_longer_than_the_model_reads_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cv2.imwrite(str(tmp_path / "image.png"), np.zeros((64, 64), np.uint8))
    command = ["ground", str(tmp_path / "image.png"), "left pleural effusion " * 40]
    assert main([*command, "--checkpoint", str(small_export())]) == 2
    assert "the model reads 62: shorten it" in capsys.readouterr().err


@pytest.mark.parametrize(("size", "cell"), [((60, 300), (1, 6)), ((300, 60), (6, 1))])
def test_the_black_beside_a_narrow_film_is_never_pointed_at(
    size: tuple[int, int],
    cell: tuple[int, int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    one_hot_patch(monkeypatch, *cell)
    path = tmp_path / "film.png"
    cv2.imwrite(str(path), np.full(size, 90, np.uint8))
    command = ["ground", str(path), "left pleural effusion", "--checkpoint", str(small_export())]
    assert main([*command, "--out", str(tmp_path / "map.png")]) == 0
    said = capsys.readouterr().out
    x, y = (float(v) for v in re.findall(r"[xy]=(-?\d+)", said)[:2])
    assert 0 <= x < size[1] and 0 <= y < size[0]
    assert "best patch +0.000, mean +0.000" in said  # the hot patch sees nothing of the film


def test_a_map_replaces_a_map_and_never_a_film(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`mlip ground film.png ... --out film.png` left a map in place of the radiograph."""
    film, other, out = (tmp_path / f"{name}.png" for name in ("film", "other", "map"))
    for path in (film, other):
        cv2.imwrite(str(path), np.random.default_rng(0).integers(60, 120, (112, 112)))
    before = film.read_bytes()
    command = ["ground", str(film), "pleural effusion", "--checkpoint", str(small_export())]
    for place in (film, other):
        assert main([*command, "--out", str(place)]) == 2
        assert "is there already and is no map of mlip ground" in capsys.readouterr().err
        assert place.read_bytes() == before
    assert main([*command, "--out", str(out)]) == 0
    first = out.read_bytes()
    assert main([*command, "--words", "--out", str(out)]) == 0
    assert out.read_bytes() != first and cv2.imread(str(out)).shape[0] > 448


def test_phrases_may_stand_on_both_sides_of_the_options(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    film, out = tmp_path / "film.png", tmp_path / "map.png"
    cv2.imwrite(str(film), np.full((64, 64), 200, np.uint8))
    command = ["ground", str(film), "edema", "--checkpoint", str(small_export()), "--out", str(out)]
    assert main([*command, "left pleural effusion"]) == 0
    said = capsys.readouterr().out
    assert "edema" in said and "left pleural effusion" in said


def test_a_strip_without_room_for_a_letter_is_drawn_all_the_same(tmp_path: Path) -> None:
    """A caption was shortened for ever, and the parts' maps were wider than the pictures."""
    strip, out = tmp_path / "strip.png", tmp_path / "map.png"
    cv2.imwrite(str(strip), np.full((3000, 32), 200, np.uint8))
    command = ["ground", str(strip), "left pleural effusion", "edema", "--words"]
    assert main([*command, "--checkpoint", str(small_export()), "--out", str(out)]) == 0
    assert cv2.imread(str(out)) is not None
