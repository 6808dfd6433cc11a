"""Searching embeddings part by part. Oracle: one sort of the whole matrix of scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import save_file

from mlip.transfer.films.archive import Archive, ArchiveError
from mlip.transfer.films.embed import as_table

ROWS, DIM, PART = 50, 8, 16


def made(folder: Path, form: str = "safetensors", **index: Any) -> tuple[Path, np.ndarray]:
    """An archive of even row numbers, of which every fifth has no report; its image embeddings."""
    generator = np.random.default_rng(0)
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
    np.testing.assert_array_equal(archive.images_of([80, 14, 14]), vectors[[40, 7, 7]])


def test_a_patient_is_found_once_and_left_out_rows_never(tmp_path):
    folder, vectors = made(tmp_path / "a")
    groups = (np.arange(2 * ROWS) // 2) % 7  # by manifest row: 7 patients
    query = vectors[[3]]
    (hits,) = Archive(folder).best(query, 20, groups=groups, without=[np.array([6])])
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
    broken[3, 2] = torch.nan
    rows = torch.arange(PART)
    save_file({"row_index": rows, "image": broken}, folder / "part-00000.safetensors")
    with pytest.raises(ArchiveError, match="holds NaN or infinite values: run the `mlip embed`"):
        Archive(folder).best(vectors[:1], 3)
    save_file({"row_index": rows[:5], "image": broken[:5]}, folder / "part-00000.safetensors")
    with pytest.raises(ArchiveError, match="16 rows of 8 numbers were written"):
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
    with pytest.raises(ValueError, match=r"expected queries \[Q, 8\], got \[1, 7\]"):
        archive.best(vectors[:1, :7], 3)
    with pytest.raises(ValueError, match="most: expected 1 or more, got 0"):
        archive.best(vectors[:1], 0)
    empty, _ = made(tmp_path / "b", parts={})
    with pytest.raises(ArchiveError, match="holds no embedding of any row yet"):
        Archive(empty)
