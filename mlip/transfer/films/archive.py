"""A folder of embeddings that `mlip embed` wrote, searched a part at a time: memory of one part.

What does not live here: any model. Queries are vectors (search.py makes them).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from safetensors import SafetensorError, safe_open

from mlip.system.output_file import file_sha256
from mlip.transfer.array import Array

Among = Literal["image", "report"]
KINDS: tuple[str, ...] = get_args(Among)
# OverflowError: Python's JSON reads Infinity
_OTHER_CONTENT = (
    *(ValueError, TypeError, KeyError, AttributeError),
    *(RecursionError, OverflowError),
)


class ArchiveError(ValueError):
    """A folder of embeddings that cannot be searched; names the file and what to do."""

    exit_code = 3


@dataclass(frozen=True)
class Hits:
    """The best rows of one query, best first.

    row_index  [K] int64, rows of the manifest
    scores     [K] float64, what the query's vector times theirs is
    """

    row_index: Array
    scores: Array

    def __len__(self) -> int:
        return len(self.row_index)


class Archive:
    """Embeddings of a manifest's rows.

    weights, manifest  what they were made with (SHA-256)
    column             of the manifest, with the images; None where an earlier version made it
    rows, asked        how many there are, and how many the split has
    Raises:  ArchiveError where the folder holds no index of `mlip embed`
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        path = self.folder / "index.json"
        expected = "expected a folder that `mlip embed` wrote"
        try:
            index = json.loads(path.read_text(encoding="utf-8"))
            self.weights, self.manifest = str(index["weights"]), str(index["manifest"])
            self.preprocessing = str(index["preprocessing"])
            self.dim, self.asked = int(index["embed_dim"]), int(index["rows"])
            # earlier versions did not tell
            self.column = index["columns"]["image"] if "columns" in index else None
            self.has_reports = not index.get("images_only", False)
            self._parts = {
                str(name): int(part["rows"]) for name, part in sorted(index["parts"].items())
            }
            # patches make files a hundred times as large as what is read of them
            self._unproved = {
                str(name): str(part["sha256"])
                for name, part in index["parts"].items()
                if part.get("sha256") and not index.get("with_patches", False)
            }
        except OSError as error:
            raise ArchiveError(f"{path}: cannot be read ({error.strerror}): {expected}") from error
        except _OTHER_CONTENT as error:
            raise ArchiveError(f"{path}: {expected}") from error
        self.rows = sum(self._parts.values())
        if self.rows == 0:
            raise ArchiveError(f"{self.folder} holds no embedding of any row yet: {expected}")

    def parts(self, among: Among = "image") -> Iterator[tuple[Array, Array]]:
        """(row_index [N] int64, embeddings [N, D] float32 of unit length), part by part.

        among    "report": of rows that have one
        Raises:  ArchiveError for a part that is missing or damaged, or reports that are not there
        """
        if among not in KINDS:
            raise ArchiveError(f"among: expected one of {', '.join(KINDS)}, got {among!r}")
        if among == "report" and not self.has_reports:
            raise ArchiveError(
                f"{self.folder} holds images alone (`mlip embed --images`): search among images, "
                "or embed the reports too"
            )
        last = -1
        columns = ["row_index", among, *(["has_report"] if among == "report" else [])]
        for name, count in self._parts.items():
            if count == 0:
                continue
            path = self.folder / name
            self._prove(path)
            found = _read(path, columns)
            rows, vectors = found["row_index"], found[among]
            if rows.shape != (count,) or vectors.shape != (count, self.dim):
                raise _damaged(path, f"{count} rows of {self.dim} numbers were written")
            if rows[0] <= last or (np.diff(rows) <= 0).any():
                raise _damaged(path, "its rows are not those after the part before")
            last = int(rows[-1])
            if not np.isfinite(vectors).all():
                raise _damaged(path, "it holds NaN or infinite values")
            if among == "report":
                said = found["has_report"].astype(bool)
                rows, vectors = rows[said], vectors[said]
            yield rows, vectors

    def _prove(self, path: Path) -> None:
        """A part of another archive, or one that was altered, has the right shapes too; once."""
        expected = self._unproved.get(path.name)
        if expected is None:
            return
        try:
            found = file_sha256(path)
        except OSError as error:
            raise _damaged(path, f"it cannot be read ({error.strerror})") from error
        if found != expected:
            raise _damaged(path, "it is not the file that index.json tells of (SHA-256)")
        del self._unproved[path.name]

    def images_of(self, rows: Iterable[int]) -> Array:
        """Image embeddings of manifest rows, [len(rows), D] float32.

        Raises:  ArchiveError naming a row that is not here
        """
        wanted = [int(row) for row in rows]  # of a user, and so of any size
        got: dict[int, Array] = {}
        for own, vectors in self.parts():
            here = np.isin(own, [row for row in wanted if 0 <= row <= own[-1]])
            got |= dict(zip(own[here].tolist(), vectors[here], strict=True))
            if len(got) == len(set(wanted)):
                break
        if missing := [row for row in wanted if row not in got]:
            raise ArchiveError(
                f"row {missing[0]} has no embedding in {self.folder}: expected a row_index that "
                "its parts hold (0 = the first data row of the manifest)"
            )
        return np.stack([got[row] for row in wanted]) if wanted else np.zeros((0, self.dim))

    def best(
        self,
        vectors: Array,
        most: int,
        *,
        among: Among = "image",
        groups: Array | None = None,
        without: Sequence[Array] | None = None,
    ) -> list[Hits]:
        """The `most` best rows of each query, exactly: every row is compared. Equal scores are in
        the order of the rows.

        Shapes:  vectors [Q, D]
        groups   [rows of the manifest], a patient's number each: at most one row a group
        without  manifest rows that a query may not find, by query
        Raises:  ValueError for vectors of another length or most < 1; ArchiveError as parts
        """
        vectors = np.asarray(vectors, dtype=np.float32)
        if vectors.ndim != 2 or vectors.shape[1] != self.dim:
            raise ValueError(f"expected queries [Q, {self.dim}], got {list(vectors.shape)}")
        if most < 1:
            raise ValueError(f"most: expected 1 or more, got {most}")
        found = [Hits(np.zeros(0, np.int64), np.zeros(0)) for _ in vectors]
        for rows, candidates in self.parts(among):
            if groups is not None and len(rows) and rows[-1] >= len(groups):
                raise ValueError(
                    f"groups: expected one of each row of the manifest, got {len(groups)}, and row "
                    f"{rows[-1]} is embedded"
                )
            scores = candidates.astype(np.float64) @ vectors.T.astype(np.float64)
            for q, before in enumerate(found):
                own, values = rows, scores[:, q]
                if without is not None and len(without[q]):
                    kept = ~np.isin(own, without[q])
                    own, values = own[kept], values[kept]
                found[q] = _better(before, own, values, most, groups)
        return found


def _better(before: Hits, rows: Array, scores: Array, most: int, groups: Array | None) -> Hits:
    """The `most` best of the hits and of these rows, at most one a group."""
    if len(before) == most:  # of a large archive nearly all: nothing is left to sort
        kept = scores >= before.scores[-1]
        rows, scores = rows[kept], scores[kept]
    rows = np.concatenate([before.row_index, rows])
    scores = np.concatenate([before.scores, scores])
    order = np.lexsort((rows, -scores))
    if groups is not None:
        _, first = np.unique(groups[rows[order]], return_index=True)
        order = order[np.sort(first)]
    return Hits(rows[order[:most]], scores[order[:most]])


def _read(path: Path, columns: Sequence[str]) -> dict[str, Array]:
    """These columns alone: patches of a part can be a hundred times as large."""
    try:
        if path.suffix == ".parquet":
            table = pa.parquet.read_table(path, columns=list(columns))
            return {name: _column(table[name].combine_chunks()) for name in columns}
        with safe_open(path, "np") as tensors:
            return {name: tensors.get_tensor(name) for name in columns}
    except (OSError, pa.ArrowException, SafetensorError, KeyError, ValueError) as error:
        raise _damaged(path, "it is missing, cut or of another kind") from error


def _column(column: Any) -> Array:
    if pa.types.is_fixed_size_list(column.type):
        return np.asarray(column.flatten()).reshape(len(column), -1)
    return np.asarray(column)


def _damaged(path: Path, why: str) -> ArchiveError:
    return ArchiveError(f"{path}: {why}: run the `mlip embed` that wrote it again")
