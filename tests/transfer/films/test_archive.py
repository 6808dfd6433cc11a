"""Searching embeddings part by part. Oracle: one sort of the whole matrix of scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file, save_file

from mlip.system.output_file import file_sha256
from mlip.transfer.films.archive import Archive, ArchiveError
from mlip.transfer.films.embed import as_table

ROWS, DIM, PART = 50, 8, 16


def made(
    folder: Path, form: str = "safetensors", seed: int = 0, **index: Any
) -> tuple[Path, np.ndarray]:
    """An archive of even row numbers, of which every fifth has no report; its image embeddings."""
    generator = np.random.default_rng(seed)
    vectors = generator.normal(size=(ROWS, DIM))
    vectors[7] = vectors[31]  # equal films: the earlier row first
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    folder.mkdir()
    parts = {}
    for at in range(0, ROWS, PART):
        own = torch.from_numpy(vectors[at : at + PART].copy())
        places = torch.arange(at, at + len(own))
        tensors = {
            "row_index": 2 * places,
            "image": own,
            "report": -own,
            "has_report": places % 5 != 0,
            "patches": own[:, None].repeat(1, 3, 1),
        }
        name = f"part-{at // PART:05d}.{form}"
        if form == "parquet":
            pyarrow.parquet.write_table(as_table(tensors), folder / name)
        else:
            save_file(tensors, folder / name)
        parts[name] = {"rows": len(own), "missing": {}, "sha256": ""}
    parts["part-00009.safetensors"] = {"rows": 0, "missing": {"99": "truncated"}, "sha256": None}
    content = {
        **{"weights": "w", "manifest": "m", "preprocessing": "p", "split": "all"},
        **{"rows": ROWS + 1, "embed_dim": DIM, "images_only": False, "parts": parts},
        **index,
    }
    (folder / "index.json").write_text(json.dumps(content))
    return folder, vectors


def reindex(folder: Path, **changes: Any) -> None:
    path = folder / "index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def hashed(folder: Path) -> Path:
    """The same archive, its index with the parts' SHA-256 as `mlip embed` writes it."""
    parts = json.loads((folder / "index.json").read_text())["parts"]
    for name, part in parts.items():
        part["sha256"] = file_sha256(folder / name) if part["rows"] else None
    reindex(folder, parts=parts)
    return folder


@pytest.mark.parametrize("form", ["safetensors", "parquet"])
@pytest.mark.parametrize("most", [1, 5, PART + 3, ROWS + 10])
def test_the_best_rows_are_those_of_the_whole_matrix(tmp_path, form, most):
    folder, vectors = made(tmp_path / "a", form)
    archive = Archive(folder)
    assert (archive.rows, archive.asked, archive.dim) == (ROWS, ROWS + 1, DIM)
    queries = np.concatenate([vectors[[7, 40]], np.ones((1, DIM), np.float32)])
    scores = queries.astype(np.float64) @ vectors.T.astype(np.float64)
    for own, hits in zip(scores, archive.best(queries, most), strict=True):
        order = np.argsort(-own, kind="stable")[:most]
        np.testing.assert_array_equal(hits.row_index, 2 * order)
        np.testing.assert_allclose(hits.scores, own[order], rtol=1e-12)
    first = archive.best(queries[:1], 2)[0]
    assert first.row_index.tolist() == [14, 62]  # both are the query: ties in order of rows
    for own, hits in zip(scores, archive.best(queries, most, among="report"), strict=True):
        said = np.flatnonzero(np.arange(ROWS) % 5 != 0)
        order = said[np.argsort(own[said], kind="stable")][:most]
        np.testing.assert_array_equal(hits.row_index, 2 * order)
    np.testing.assert_array_equal(archive.images_of(np.array([80, 14, 14])), vectors[[40, 7, 7]])


def test_a_patient_is_found_once_and_left_out_rows_never(tmp_path):
    folder, vectors = made(tmp_path / "a")
    groups = (np.arange(2 * ROWS) // 2) % 7  # by manifest row: 7 patients
    query = vectors[[3]]
    (hits,) = Archive(folder).best(query, 20, groups=groups, without=[np.array([6])])
    none = np.zeros(0, np.int64)
    plain, other = Archive(folder).best(vectors[[3, 4]], 1, without=[none, np.array([8])])
    assert plain.row_index[0] == 6 and other.row_index[0] not in (6, 8)
    assert len(hits) == 7 and len(set(groups[hits.row_index])) == 7
    scores = (query.astype(np.float64) @ vectors.T.astype(np.float64))[0]
    scores[3] = -np.inf
    for patient in range(7):
        own = np.flatnonzero(np.arange(ROWS) % 7 == patient)
        assert 2 * own[np.argmax(scores[own])] in hits.row_index
    assert (np.diff(hits.scores) <= 0).all()


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda f: (f / "index.json").unlink(), r"index\.json: cannot be read \(No such file"),
        (
            lambda f: (f / "index.json").write_text("[]"),
            "expected a folder that `mlip embed` wrote",
        ),
        (lambda f: (f / "index.json").write_text("[" * 10**5), "expected a folder that `mlip emb"),
        (lambda f: reindex(f, rows=float("inf")), "expected a folder that `mlip embed` wrote"),
        (
            lambda f: (f / "part-00001.safetensors").unlink(),
            "part-00001.safetensors: it is",
        ),
        (lambda f: (f / "part-00000.safetensors").write_bytes(b"x" * 50), "it is missing, cut or"),
    ],
)
def test_a_damaged_folder_names_its_file_and_what_to_do(tmp_path, damage, told):
    folder, vectors = made(tmp_path / "a")
    damage(folder)
    with pytest.raises(ArchiveError, match=told) as raised:
        Archive(folder).best(vectors[:1], 3)
    assert raised.value.exit_code == 3 and str(folder) in str(raised.value)


def test_what_a_part_holds_is_what_the_index_says(tmp_path):
    folder, vectors = made(tmp_path / "a")
    broken = torch.from_numpy(vectors[:PART].copy())
    rows = torch.arange(PART)
    for odd in (torch.nan, torch.inf):
        broken[3, 2] = odd
        save_file({"row_index": rows, "image": broken}, folder / "part-00000.safetensors")
        with pytest.raises(ArchiveError, match="holds NaN or infinite values: run the `mlip emb"):
            Archive(folder).best(vectors[:1], 3)
    save_file({"row_index": rows[:5], "image": broken[:5]}, folder / "part-00000.safetensors")
    with pytest.raises(ArchiveError, match="16 rows of 8 numbers were written"):
        Archive(folder).best(vectors[:1], 3)


def test_an_archive_of_an_earlier_version_holds_reports(tmp_path):
    folder, vectors = made(tmp_path / "a")
    index = json.loads((folder / "index.json").read_text())
    del index["images_only"]
    (folder / "index.json").write_text(json.dumps(index))
    assert len(Archive(folder).best(vectors[:1], 3, among="report")[0]) == 3


@pytest.mark.parametrize("form", ["safetensors", "parquet"])
def test_a_part_of_another_archive_is_refused(tmp_path, form, monkeypatch):
    """Of the right shapes, it would be searched: films under the numbers of others."""
    folder, vectors = made(tmp_path / "a", form)
    hashed(folder)
    archive = Archive(folder)
    assert archive.best(vectors[:1], 1)[0].row_index.tolist() == [0]
    part = folder / f"part-00001.{form}"
    own = part.read_bytes()
    other, _ = made(tmp_path / "b", form, seed=1)
    part.write_bytes((other / part.name).read_bytes())
    told = rf"part-00001\.{form}: it is not the file that index\.json tells of \(SHA-256\): run the"
    with pytest.raises(ArchiveError, match=told):
        Archive(folder).best(vectors[:1], 1)
    with pytest.raises(ArchiveError, match=told):
        Archive(folder).images_of([40])
    assert archive.images_of([0]).shape == (1, DIM)  # what was proved once is not read again
    part.unlink()
    with pytest.raises(ArchiveError, match=rf"00001\.{form}: it cannot be read \(No such file"):
        Archive(folder).best(vectors[:1], 1)
    part.write_bytes(own)
    monkeypatch.setattr("mlip.transfer.films.archive.file_sha256", lambda path: pytest.fail())
    archive.best(vectors[:1], 1)
    reindex(folder, with_patches=True)  # a hundred times as much to read
    assert len(Archive(folder).best(vectors[:1], 1)[0]) == 1


@pytest.mark.parametrize("rows", [[5, 5, *range(6, 20)], [*range(1, 16), 0], [*range(-1, 15)]])
def test_rows_that_are_not_in_order_are_refused(tmp_path, rows):
    """A part that was copied over another holds films that the part before holds."""
    folder, vectors = made(tmp_path / "a")
    tensors = load_file(folder / "part-00000.safetensors")
    save_file({**tensors, "row_index": torch.tensor(rows)}, folder / "part-00000.safetensors")
    with pytest.raises(ArchiveError, match=r"00000\.safetensors: its rows are not those after the"):
        Archive(folder).best(vectors[:1], 3)
    save_file(tensors, folder / "part-00000.safetensors")
    save_file(tensors, folder / "part-00001.safetensors")
    with pytest.raises(ArchiveError, match=r"00001\.safetensors: its rows are not those after the"):
        Archive(folder).best(vectors[:1], 3)


def test_what_cannot_be_asked_is_said(tmp_path):
    folder, vectors = made(tmp_path / "a", images_only=True)
    archive = Archive(folder)
    with pytest.raises(ArchiveError, match="holds images alone"):
        archive.best(vectors[:1], 3, among="report")
    with pytest.raises(ArchiveError, match="among: expected one of image, report, got 'patches'"):
        archive.best(vectors[:1], 3, among="patches")  # type: ignore[arg-type]
    with pytest.raises(ArchiveError, match="row 13 has no embedding"):
        archive.images_of([14, 13])
    for row in (-2, 10**30, -(10**30)):
        with pytest.raises(ArchiveError, match=f"row {row} has no embedding"):
            archive.images_of([14, row])
    assert archive.images_of([]).shape == (0, DIM)
    with pytest.raises(ValueError, match="groups: expected one of each row .* got 98, and row 98"):
        archive.best(vectors[:1], 3, groups=np.zeros(98))
    assert len(archive.best(vectors[:1], 3, groups=np.zeros(99))[0]) == 1
    with pytest.raises(ValueError, match=r"expected queries \[Q, 8\], got \[1, 7\]"):
        archive.best(vectors[:1, :7], 3)
    with pytest.raises(ValueError, match="most: expected 1 or more, got 0"):
        archive.best(vectors[:1], 0)
    empty, _ = made(tmp_path / "b", parts={})
    with pytest.raises(ArchiveError, match="holds no embedding of any row yet"):
        Archive(empty)
