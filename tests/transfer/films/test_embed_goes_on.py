"""`mlip embed` into a folder that an earlier command began: what goes on, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mlip.dataloading import progress
from mlip.dataloading.manifest import load_manifest
from mlip.pretrained import open_checkpoint
from mlip.settings.config import load
from mlip.transfer.films import embed as embedding
from mlip.transfer.fingerprint import hash_of, hash_of_source, hash_of_weights, preprocessing
from tests.small_run import small_export
from tests.transfer.films.small_embedding import PART_ROWS, TEST_ROWS, embed, in_small_parts, made
from tests.transfer.small_manifest import write


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return in_small_parts(tmp_path, monkeypatch)


def test_an_index_of_another_shape_is_named_and_a_part_it_tells_nothing_of_is_made_again(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They were tracebacks."""
    assert embed(tmp_path, root) == 0
    path = tmp_path / "out" / "index.json"
    index = json.loads(path.read_text())
    whole = path.read_bytes()
    for content in ("[" * 100_000, *(json.dumps({**index, "parts": x}) for x in (None, 5, [1]))):
        path.write_text(content)
        capsys.readouterr()
        assert embed(tmp_path, root) == 4
        assert f"{path}: damaged: what its parts hold" in capsys.readouterr().err
    record = index["parts"]["part-00001.safetensors"]
    others = [{**record, "missing": of} for of in (None, {"x": "y"})]
    others += [{**record, "rows": "4"}, {k: x for k, x in record.items() if k != "sha256"}]
    for part in (5, "x", [], {}, *others):
        parts = {**index["parts"], "part-00001.safetensors": part}
        path.write_text(json.dumps({**index, "parts": parts}))
        capsys.readouterr()
        assert embed(tmp_path, root) == 0
        assert made(capsys.readouterr().out) == [2]
        assert json.loads(path.read_text()) == json.loads(whole)


def test_a_folder_of_other_columns_of_the_manifest_is_not_gone_on_with(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As many rows: of what was embedded before it was said that it is what is asked for."""
    columns: dict[str, Any] = {
        "fold": lambda i: ("test", "test", "val", "train", "train")[i % 5],
        "lateral": lambda i: f"{29 - i}.png",
        "impression": "No edema at all.",
    }
    assert embed(tmp_path, root, **columns) == 0
    assert embed(tmp_path, root, "--images", out="images", **columns) == 0
    for name, column, different in (
        ("out", "split=fold", "row_index"),
        ("images", "split=fold", "row_index"),
        ("out", "image=lateral", "columns"),
        ("images", "image=lateral", "columns"),
        ("out", "report=impression", "columns"),
    ):
        more = ["--images"] if name == "images" else []
        capsys.readouterr()
        assert embed(tmp_path, root, f"data.columns.{column}", *more, out=name, **columns) == 4
        assert f"embeddings that differ in {different}: name another" in capsys.readouterr().err
    path = tmp_path / "out" / "index.json"
    index = json.loads(path.read_text())
    for key in ("row_index", "columns", "form", "images_only"):
        del index[key]
    path.write_text(json.dumps(index))  # of an earlier version, which did not tell
    assert embed(tmp_path, root, **columns) == 0 and made(capsys.readouterr().out) == []
    # no report is in a folder of images
    more = ["data.columns.report=impression", "--images"]
    assert embed(tmp_path, root, *more, out="images", **columns) == 0
    assert made(capsys.readouterr().out) == []


def test_what_the_parts_depend_on_is_in_the_index_and_none_of_it_may_be_another(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Parts of two models in one folder would be read as those of one."""
    assert embed(tmp_path, root) == 0
    path, opened = tmp_path / "out" / "index.json", open_checkpoint(small_export())
    index = json.loads(path.read_text())
    parts = index.pop("parts")
    data = load([], [*write(tmp_path), f"data.root={root}"]).data
    assert index == {
        "weights": hash_of_weights(opened.model),
        "manifest": load_manifest(data).fingerprint,
        "preprocessing": hash_of(preprocessing(opened.config)),
        "split": "test",
        "rows": len(TEST_ROWS),
        "row_index": hash_of(TEST_ROWS),
        "columns": {"image": "image", "report": "report"},
        "concept_table": opened.table.fingerprint,
        "linker": hash_of_source("knowledge", "dataloading/reports"),
        "part_rows": PART_ROWS,
        "with_patches": False,
        "images_only": False,
        "embed_dim": opened.config.model.embed_dim,
        "form": "safetensors",
    }
    for name in index:
        path.write_text(json.dumps({**index, name: "another", "parts": parts}))
        capsys.readouterr()
        assert embed(tmp_path, root) == 4
        assert f"embeddings that differ in {name}: name another" in capsys.readouterr().err


def test_reports_are_not_gone_on_with_by_another_linker_and_films_alone_are(
    root: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A killed run, and the same command of a newer version: its parts were of two linkers."""
    films = ["--images", "--split", "test"]
    assert embed(tmp_path, root) == 0
    assert embed(tmp_path, root, *films, out="images") == 0
    for name in ("out", "images"):
        index = json.loads((tmp_path / name / "index.json").read_text())
        index["parts"].popitem()
        (tmp_path / name / "index.json").write_text(json.dumps(index))
    before = (tmp_path / "out" / "index.json").read_bytes()
    monkeypatch.setattr(embedding, "hash_of_source", lambda *below: "a newer one")
    capsys.readouterr()
    assert embed(tmp_path, root) == 4
    assert "embeddings that differ in linker: name another" in capsys.readouterr().err
    assert (tmp_path / "out" / "index.json").read_bytes() == before
    assert embed(tmp_path, root, *films, out="images") == 0
    assert made(capsys.readouterr().out) == [3]

    for name in ("out", "images"):  # of an earlier version, which did not tell
        index = json.loads((tmp_path / name / "index.json").read_text())
        del index["concept_table"], index["linker"]
        (tmp_path / name / "index.json").write_text(json.dumps(index))
    assert embed(tmp_path, root) == 4
    assert "differ in concept_table, linker: name another" in capsys.readouterr().err
    assert embed(tmp_path, root, *films, out="images") == 0


def test_all_that_differs_is_told_and_parts_that_are_whole_are_counted(
    root: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert embed(tmp_path, root) == 0
    assert "whole already" not in capsys.readouterr().err
    monkeypatch.setattr(progress, "EVERY_S", 0.0)
    assert embed(tmp_path, root) == 0
    lines = capsys.readouterr().err.splitlines()
    whole = [line.split(",")[0] for line in lines if "whole already" in line]
    assert whole == ["1 of 3 parts", "2 of 3 parts", "3 of 3 parts"]
    assert embed(tmp_path, root, "--patches", "--format", "parquet") == 4
    assert "embeddings that differ in form, with_patches: name" in capsys.readouterr().err
    assert embed(tmp_path, root, out="none", split="train") == 3
    assert "'test' has no usable rows of 30 (none at all): choose" in capsys.readouterr().err


def test_parts_without_an_index_and_an_index_of_another_program_are_not_written_over(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Spark names its files part-00000.parquet: one was replaced. Of a lost index the parts past
    the new last one stayed, and a reader of part-* took them for parts of the new one."""
    out = tmp_path / "out"
    out.mkdir()
    for name in ("part-00000.parquet", "part-00007.safetensors", "part-123456.safetensors"):
        (out / name).write_text("another's")
        assert embed(tmp_path, root, "--format", "parquet") == 4
        said = capsys.readouterr().err
        assert f"{out} holds {name} and no index.json: what made it is not known" in said
        assert {p.name for p in out.iterdir()} == {name} and (out / name).read_text() == "another's"
        (out / name).unlink()
    for content in ({}, {"parts": {}}, {"files": ["a"]}):
        (out / "index.json").write_text(json.dumps(content))
        assert embed(tmp_path, root) == 4
        assert "index.json: was not written by `mlip embed`: name" in capsys.readouterr().err
        assert json.loads((out / "index.json").read_text()) == content
    (out / "index.json").unlink()
    for name in ("part-00000-c000.snappy.parquet", "part-00000.csv"):
        (out / name).write_text("another's")  # no name of ours
    assert embed(tmp_path, root) == 0 and made(capsys.readouterr().out) == [1, 2, 3]


def test_a_cut_part_and_one_of_another_archive_are_made_again(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the folder before."""
    assert embed(tmp_path, root) == 0
    assert embed(tmp_path, root, "--images", out="images") == 0
    out = tmp_path / "out"
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    first, second = (out / f"part-0000{number}.safetensors" for number in range(2))
    first.write_bytes(before[first.name][: len(before[first.name]) // 2])
    second.write_bytes((tmp_path / "images" / second.name).read_bytes())
    capsys.readouterr()
    assert embed(tmp_path, root) == 0 and made(capsys.readouterr().out) == [1, 2]
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
