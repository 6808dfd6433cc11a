"""`mlip prepare` of one film exported twice: under other ids, into another split, stored anew.

Oracle: which files were written from which picture.
"""

from __future__ import annotations

import csv
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mlip.cli import main
from mlip.dataloading.images.perceptual_hash import HASHES, perceptual_hashes
from mlip.dataloading.images.same_pictures import hashes_of, read_hash_table
from mlip.dataloading.prepare import duplicates
from tests.dataloading.test_perceptual_hash import film, stored


def make_root(folder: Path) -> Path:
    """Films 0 to 5; 6 is 1 as a small inverted JPEG, 7 is blank and 8 no picture."""
    root = folder / "raw"
    root.mkdir()
    films = [film(seed) for seed in range(6)]
    films += [255 - stored(cv2.resize(films[1], (200, 200)), 60), np.zeros((90, 90), np.uint8)]
    for i, picture in enumerate(films):
        cv2.imwrite(str(root / f"{i}.png"), picture)
    (root / "8.png").write_bytes(b"no picture")
    lines = [["image", "patient_id", "split"]]
    lines += [[f"{i}.png", f"MRN{i}", "test" if i == 6 else "train"] for i in range(9)]
    with (root / "manifest.csv").open("w", newline="") as file:
        csv.writer(file).writerows(lines)
    return root


def prepare(root: Path, out: Path) -> int:
    return main(["prepare", "manifest", "--root", str(root), "--out", str(out)])


def test_the_same_film_in_two_splits_is_told_and_what_was_written_is_as_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, out = make_root(tmp_path), tmp_path / "out"
    assert prepare(root, out) == 0
    told = capsys.readouterr().out
    assert "2 films look like another one, 2 of them like one of another patient, 2 like" in told
    assert "LEAKAGE: films of different splits" in told and "MRN" not in told
    assert "same picture: 1 films were not compared: blank" in told
    with (out / "duplicates.csv").open(newline="") as file:
        header, pair = csv.reader(file)
    # test comes last: seven films of train, the blank one among them, before it
    assert pair[:5] == ["1", "7", "train", "test", "no"] and header[0] == "row"
    manifest = pq.read_table(out / "manifest.parquet")
    table = read_hash_table(out)
    assert table is not None and set(table["image"].to_pylist()) == set(
        manifest["image"].to_pylist()
    )
    found = hashes_of(table, manifest["image"])
    assert found.row.tolist() == [0, 1, 2, 3, 4, 5, 7]
    assert found.bits[0].tobytes() == perceptual_hashes(film(0))[0].tobytes()
    patients, splits = (pa.chunked_array([[name] * 8]) for name in ("MRN1", "train"))
    told_of_one = duplicates.write_duplicates(found, patients, splits, tmp_path / "one.csv")
    assert len(told_of_one) == 1 and "0 like one of another split" in told_of_one[0]
    assert "train,train,yes," in (tmp_path / "one.csv").read_text()
    unlike = found.of(np.arange(8) < 7)
    lines = duplicates.write_duplicates(unlike, patients, splits, tmp_path / "none.csv")
    assert lines == ["same picture: no two of 6 films"]
    # the set's own tables, whose hashes runs and results hold, know nothing of it
    assert not any("hash" in name for name in manifest.column_names)
    assert HASHES not in pq.read_schema(out / "index.parquet").names
    for name in ("perceptual_hashes.parquet", "duplicates.csv"):
        assert (out / name).stat().st_mode & 0o777 == 0o600


def test_shards_of_a_version_without_hashes_get_them_from_their_members(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, out = make_root(tmp_path), tmp_path / "out"
    assert prepare(root, out) == 0
    first = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for path in (out / "shards").glob("*.parquet"):
        table = pq.read_table(path)
        pq.write_table(table.drop_columns([HASHES]), path)
    capsys.readouterr()
    assert prepare(root, out) == 0
    told = capsys.readouterr().out
    assert "0 of them made now" in told and "LEAKAGE" in told
    for name in ("manifest.parquet", "index.parquet"):
        assert (out / name).read_bytes() == first[out / name]
    before, now = first[out / "duplicates.csv"], (out / "duplicates.csv").read_bytes()
    # of a JPEG's decoded pixels a bit or two is another one than of those it was made of
    assert now.split(b",")[:-1] == before.split(b",")[:-1]
    # of more films than are compared the pairs of an earlier run do not stay
    monkeypatch.setattr(duplicates, "_MOST_FILMS", 7)
    for _ in range(2):
        (said,) = duplicates.prepared_duplicates(out)
        assert "not looked for" in said and not (out / "duplicates.csv").exists()


def test_a_kill_while_films_are_compared_leaves_no_record_of_a_finished_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, out = make_root(tmp_path), tmp_path / "out"

    def killed(_: Path) -> list[str]:
        raise KeyboardInterrupt

    monkeypatch.setattr("mlip.dataloading.prepare.command.prepared_duplicates", killed)
    assert prepare(root, out) == 130
    assert (out / "manifest.parquet").exists() and not (out / "prepared.json").exists()
    monkeypatch.undo()
    assert prepare(root, out) == 0
    assert (out / "duplicates.csv").exists() and (out / "prepared.json").exists()
