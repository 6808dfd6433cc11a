"""`mlip embed` where images are damaged, parts are damaged, or reports are missing."""

from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow.parquet
import pytest
from safetensors.numpy import load_file

from mlip.pretrained import open_checkpoint
from mlip.system.output_file import only_writer
from mlip.transfer import features
from mlip.transfer.features import encoded
from mlip.transfer.films import embed as embedding
from tests.small_run import small_export
from tests.transfer.films.small_embedding import PART_ROWS, TEST_ROWS, embed, in_small_parts, made
from tests.transfer.small_manifest import SECRETS, SPLITS, pictures


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return in_small_parts(tmp_path, monkeypatch)


def truncate(root: Path, *rows: int) -> None:
    for row in rows:
        path = root / f"{row}.png"
        path.write_bytes(path.read_bytes()[:100])


def mend(root: Path, *rows: int) -> None:
    for row in rows:
        shutil.copy(pictures() / f"{row}.png", root / f"{row}.png")


def test_rows_without_an_image_are_counted_and_come_as_soon_as_it_is_mended(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    truncate(root, 3, 4, 28)  # of the first part two, of the last one
    allowed = "data.bad_share=0.5"
    assert embed(tmp_path, root, allowed) == 0
    said = capsys.readouterr()
    assert "9 of 12 rows (truncated 3) in" in said.out and "part 1 of 3: 2 of 4 rows" in said.out
    assert not any(secret in said.out + said.err for secret in SECRETS)
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    part = index["parts"]["part-00000.safetensors"]
    assert part["rows"] == 2 and part["missing"] == {"3": "truncated", "4": "truncated"}

    assert embed(tmp_path, root, allowed) == 0  # nothing is mended: nothing is made again
    said = capsys.readouterr()
    assert made(said.out) == [] and "9 of 12 rows (truncated 3) in" in said.out

    mend(root, 4)
    assert embed(tmp_path, root, allowed) == 0
    said = capsys.readouterr()
    assert made(said.out) == [1] and "10 of 12 rows (truncated 2) in" in said.out

    mend(root, 3, 28)
    assert embed(tmp_path, root) == 0
    said = capsys.readouterr()
    assert made(said.out) == [1, 3] and "12 of 12 rows in" in said.out
    assert embed(tmp_path, root, out="never-damaged") == 0
    for path in (tmp_path / "never-damaged").iterdir():
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes(), path.name
    parts = [load_file(p) for p in sorted((tmp_path / "out").glob("part-*"))]
    np.testing.assert_array_equal(np.concatenate([p["row_index"] for p in parts]), TEST_ROWS)
    assert all(part["has_report"].all() for part in parts)


def test_a_film_that_is_too_dark_is_no_reason_to_make_its_part_again(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grey = np.random.default_rng(0).integers(0, 4096, (40, 60)).astype(np.uint16)
    assert cv2.imwrite(str(root / "3.png"), grey)
    for parts in ([1, 2, 3], []):
        assert embed(tmp_path, root, "data.bad_share=0.5") == 0
        said = capsys.readouterr().out
        assert made(said) == parts and "11 of 12 rows (too_dark 1) in" in said
    mend(root, 3)
    assert embed(tmp_path, root) == 0 and made(capsys.readouterr().out) == [1]


def test_a_second_one_into_the_folder_is_refused_and_takes_nothing_from_the_first(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    half, others = out / ".part-00000.safetensors.other-host.1", out / ".tmpa1B2c3"
    half.touch()
    others.touch()  # a name that safetensors, and much else, writes under
    with only_writer(out / ".lock", "the first"):
        assert embed(tmp_path, root) == 2
    assert f"{out}: another process is writing there" in capsys.readouterr().err
    assert sorted(out.iterdir()) == [half, others]
    assert embed(tmp_path, root) == 0
    assert [path for path in out.iterdir() if path.name.startswith(".")] == [others]


def test_more_bad_images_than_allowed_stop_it_and_finished_parts_are_kept(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    truncate(root, 13, 18)
    assert embed(tmp_path, root) == 3
    said = capsys.readouterr()
    assert made(said.out) == [1, 2]
    assert "2 of 12 rows have a bad image (truncated 2); data.bad_share=0.01" in said.err
    assert embed(tmp_path, root, "data.bad_share=0.2") == 0
    said = capsys.readouterr()
    assert made(said.out) == [3] and "10 of 12 rows" in said.out


def test_a_part_without_any_image_is_an_empty_one(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    truncate(root, *TEST_ROWS[4:8])
    assert embed(tmp_path, root, "data.bad_share=0.5") == 0
    assert "8 of 12 rows (truncated 4)" in capsys.readouterr().out
    assert not (tmp_path / "out" / "part-00001.safetensors").exists()
    assert embed(tmp_path, root, "data.bad_share=0.5") == 0
    assert made(capsys.readouterr().out) == []
    truncate(root, *TEST_ROWS)
    assert embed(tmp_path, root, "data.bad_share=1.0", out="none") == 3
    assert "12 of 12 rows have a bad image" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["zeros", "one bit", "gone"])
def test_a_part_damaged_on_the_disk_is_made_again(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    """Zeros in place of numbers are a file that opens, with as many rows as it should have."""
    assert embed(tmp_path, root) == 0
    path = tmp_path / "out" / "part-00001.safetensors"
    whole = path.read_bytes()
    head = 8 + int.from_bytes(whole[:8], "little")
    if damage == "gone":
        path.unlink()
    elif damage == "zeros":
        path.write_bytes(whole[:head] + bytes(len(whole) - head))
    else:
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    capsys.readouterr()
    assert embed(tmp_path, root) == 0
    assert made(capsys.readouterr().out) == [2] and path.read_bytes() == whole


def test_images_alone_have_their_patches_too_and_mentions_are_told_where_there_are_any(
    root: Path, tmp_path: Path
) -> None:
    stated: dict[str, Any] = {"report": lambda i: "No edema." if i == 3 else "There is edema."}
    opened = open_checkpoint(small_export())
    for name, more in (("out", []), ("images", ["--images"])):
        more = [*more, "--patches", "--format", "parquet"]
        assert embed(tmp_path, root, *more, out=name, **stated) == 0
        table = pyarrow.parquet.read_table(tmp_path / name / "part-00000.parquet")
        patches = opened.encode_images([root / f"{row}.png" for row in TEST_ROWS[:4]]).patches
        found = np.array(table["patches"].to_pylist()).reshape(patches.shape)
        np.testing.assert_allclose(found, patches, rtol=1e-4, atol=1e-5)
        shapes = {field.name: field.metadata for field in table.schema}
        shape = json.dumps(list(patches.shape[1:])).encode()
        assert shapes.pop("patches") == {b"shape": shape} and not any(shapes.values())
        assert not any(field.nullable for field in table.schema)
    parts = pyarrow.parquet.read_table(tmp_path / "out" / "part-00000.parquet")
    assert parts["has_knowledge"].to_pylist() == [False, True, True, True]


def test_images_without_reports_are_told_by_rule_with_the_setting_that_takes_them(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert embed(tmp_path, root, report="") == 3
    said = capsys.readouterr().err
    assert "'test' has no usable rows of 30 (no_report 12; data.empty_report=image_only" in said
    assert embed(tmp_path, root, "data.empty_report=image_only", report="") == 0
    assert "12 of 12 rows in" in capsys.readouterr().out


def test_rows_that_a_rule_leaves_out_are_counted(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    columns: dict[str, Any] = {
        "report": lambda i: "" if i == 3 else "No edema.",
        "split": lambda i: SPLITS[i % 5] if i else "",  # of no split: not left out of this one
    }
    assert embed(tmp_path, root, **columns) == 0
    said = capsys.readouterr().out
    assert "left out: no_report 1; data.empty_report=image_only" in said and "11 of 11 rows" in said


@pytest.mark.parametrize("more", [[], ["--images"]])
def test_features_of_a_broken_model_are_not_kept(
    root: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    more: list[str],
) -> None:
    name = "encoded_images" if more else "encoded"
    encode = getattr(embedding, name)

    def broken(*args: Any) -> Iterator[Any]:
        for found in encode(*args):
            image = found if more else found[1]
            image.features.embedding[0, 0] = np.nan
            yield found

    monkeypatch.setattr(embedding, name, broken)
    assert embed(tmp_path, root, *more) == 2
    assert "image features hold NaN or infinite values" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("part-*"))


@pytest.mark.parametrize("form", ["safetensors", "parquet"])
def test_parts_are_for_their_owner_alone(root: Path, tmp_path: Path, form: str) -> None:
    assert embed(tmp_path, root, "--format", form) == 0
    assert [p.stat().st_mode & 0o777 for p in (tmp_path / "out").glob("part-*")] == [0o600] * 3


@pytest.mark.parametrize(("more", "most"), [([], 2), (["--patches"], PART_ROWS)])
def test_of_a_batch_only_what_goes_into_the_part_is_kept(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: list[str], most: int
) -> None:
    alive: list[int] = []

    def counted(*args: Any) -> Iterator[Any]:
        seen: list[Any] = []
        for batch, image, text in encoded(*args):
            seen.append(weakref.ref(image.features.patches))
            alive.append(sum(patches() is not None for patches in seen))
            yield batch, image, text

    monkeypatch.setattr(features, "ROWS_AT_ONCE", 1)
    monkeypatch.setattr(embedding, "encoded", counted)
    assert embed(tmp_path, root, *more) == 0
    assert len(alive) == len(TEST_ROWS) and max(alive) == most
