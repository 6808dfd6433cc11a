"""`mlip search`: the best rows of an archive for each query, as a CSV, and their pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mlip.batch import ImageFeatures
from mlip.dataloading.manifest import Manifest
from mlip.system.output_file import begins_with, require_replaceable
from mlip.transfer.array import Array
from mlip.transfer.features import ImageBank
from mlip.transfer.films.archive import Among, Archive, ArchiveError, Hits
from mlip.transfer.films.row_images import RowImages
from mlip.transfer.films.row_table import unread, write_private_csv
from mlip.transfer.films.search import (
    Query,
    Reranked,
    answers_of,
    heat_of,
    not_answers,
    rows_found,
)

COLUMNS = ("kind", "query", "rank", "row_index", "score")
_SHOWN = 5  # answers that a line of the terminal names


@dataclass(frozen=True)
class Picture:
    """One answer as the model sees it.

    pixels  [H, W] uint8, None where the image cannot be read
    heat    [rows, columns] cosines of the patches, None where the query has no words
    """

    pixels: Array | None
    heat: Array | None


def require_own_file(path: Path) -> None:
    """Raises:  ConfigError for a folder, or a file that this command did not write."""
    is_ours = begins_with(path, ",".join(COLUMNS))
    require_replaceable(path, "--out", "table of mlip search", is_ours=is_ours)


def require_same_rows(archive: Archive, manifest: Manifest, column: str) -> None:
    """Raises:  ArchiveError for another manifest, or column of images: its rows are other films"""
    if archive.manifest != manifest.fingerprint:
        raise ArchiveError(
            f"{archive.folder}: was made of another manifest than {manifest.path}: name the one it "
            "was made of by data.manifest, or embed again"
        )
    if archive.column not in (None, column):
        raise ArchiveError(
            f"{archive.folder}: was made of the images of column {archive.column!r}, not of "
            f"data.columns.image={column}: name that column, or embed again"
        )


def patients_of(manifest: Manifest) -> Array:
    """[rows of the manifest], a number for each patient"""
    return np.unique(manifest.patient_key, return_inverse=True)[1]


def search(
    archive: Archive,
    queries: Sequence[Query],
    most: int,
    *,
    among: Among = "image",
    groups: Array | None = None,
) -> list[Hits]:
    """The `most` best rows of each query; arguments as Archive.best takes them."""
    vectors = np.stack([query.vector for query in queries])
    without = not_answers(queries, groups)
    return archive.best(vectors, most, among=among, groups=groups, without=without)


def reranked(
    opened: Any,
    manifest: Manifest,
    queries: Sequence[Query],
    hits: Sequence[Hits],
    most: int,
) -> tuple[list[Hits], dict[int, str]]:
    """(the `most` best by both heads of the hits, row -> why its image could not be read)"""
    again = Reranked(opened, queries, hits)
    bad: dict[int, str] = {}
    if len(again.rows):
        images = RowImages(opened, manifest, "all", rows=again.rows)
        for bank in images:
            again.add(bank)
        bad = images.bad
    return again.hits(most), bad


def pictures(
    opened: Any,
    manifest: Manifest,
    queries: Sequence[Query],
    hits: Sequence[Hits],
) -> tuple[list[list[Picture]], dict[int, str]]:
    """(a picture of every answer, in the order of queries and hits; row -> why it has none)"""
    wanted = [set(own.row_index.tolist()) for own in hits]
    made: dict[tuple[int, int], Picture] = {}
    rows = rows_found(hits)
    if not len(rows):
        return [[] for _ in hits], {}
    images = RowImages(opened, manifest, "all", rows=rows)
    for bank in images:
        there = bank.row_index.tolist()
        for q, query in enumerate(queries):
            own = [i for i, row in enumerate(there) if row in wanted[q]]
            if not own:
                continue
            heat = heat_of(opened, query, _some(bank, own))
            for place, i in enumerate(own):
                made[q, there[i]] = Picture(bank.pixels[i], None if heat is None else heat[place])
    missing = Picture(None, None)
    shown = [
        [made.get((q, row), missing) for row in own.row_index.tolist()]
        for q, own in enumerate(hits)
    ]
    return shown, images.bad


def _some(bank: ImageBank, places: list[int]) -> ImageFeatures:
    at = torch.tensor(places)
    features = bank.features
    return replace(features, embedding=features.embedding[at], patches=features.patches[at])


def write_answers(path: Path, queries: Sequence[Query], hits: Sequence[Hits]) -> int:
    """A CSV of kind, query, rank, row_index and score (blank where the film could not be read
    again); how many answers."""
    answers = [(*where, number(score, ".6g")) for *where, score in answers_of(queries, hits)]
    write_private_csv(path, COLUMNS, answers, require_own=require_own_file)
    return len(answers)


def number(score: float, form: str) -> str:
    """The score as text; "" of a film that could not be read again."""
    return "" if np.isnan(score) else format(score, form)


def told_lines(
    archive: Archive,
    queries: Sequence[Query],
    hits: Sequence[Hits],
    among: Among,
    bad: dict[int, str],
) -> Iterator[str]:
    """What a terminal is told: how much was searched, and the best of each query."""
    stopped = f" ({archive.asked:,} are in the list)" if archive.asked != archive.rows else ""
    yield f"searched the {among}s of {archive.rows:,} rows{stopped}{unread(bad)}"
    for query, own in zip(queries, hits, strict=True):
        best = ", ".join(
            f"{row} ({number(score, '+.3f')})"
            for row, score in zip(
                own.row_index[:_SHOWN].tolist(), own.scores[:_SHOWN].tolist(), strict=True
            )
        )
        yield f"  {query}: {best or 'no answer'}" + (", ..." if len(own) > _SHOWN else "")
