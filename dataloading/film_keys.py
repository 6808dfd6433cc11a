"""Which films a table names, and whose they are: to tell whether another table names them too.

Columns and hashes alone, no report, no picture: a manifest of another run need not lie beside its
images any more; the hashes of its pictures may. Identifiers stay in memory, in no message and no
file.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mlip.dataloading.datasets.manifest import USUAL
from mlip.dataloading.datasets.report_columns import usual_column
from mlip.dataloading.images.same_pictures import PictureHashes, hashes_of, read_hash_table
from mlip.dataloading.splits import split_codes
from mlip.dataloading.tables.cells import UNREADABLE
from mlip.dataloading.tables.table import ManifestError, column_names, read_table
from mlip.settings.config import Columns

_INDEX = "index.parquet"  # of `mlip prepare`, beside its manifest


@dataclass(frozen=True)
class FilmKeys:
    """A table's rows by what names a film; null where a row or the table does not tell.

    film     patient id and image id together: two hospitals may both have an image "1"
    stored   SHA-256 of the image file; source: of the file that `mlip prepare` made it of
    """

    fingerprint: str  # SHA-256 of the table's bytes
    split: NDArray[np.int8]  # as Manifest.split
    patient: pa.ChunkedArray = dataclasses.field(repr=False)
    film: pa.ChunkedArray = dataclasses.field(repr=False)
    stored: pa.ChunkedArray = dataclasses.field(repr=False)
    source: pa.ChunkedArray = dataclasses.field(repr=False)
    # None where no perceptual hashes lie beside the table
    pictures: PictureHashes | None = dataclasses.field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.split)


def usual_columns(path: Path, columns: Columns) -> Columns:
    """The settings' names where the table has such a column, else a usual one; None = neither.

    Raises:  ManifestError as mlip.dataloading.tables.table.read_table.
    """
    names = column_names(path)

    def found(field: str) -> str | None:
        asked = getattr(columns, field)
        return asked if asked in names else usual_column(names, USUAL[field]) or None

    return dataclasses.replace(
        columns,
        image=found("image") or columns.image,
        # refused by its name where the table lacks it
        patient_id=found("patient_id") or columns.patient_id,
        image_id=found("image_id"),
        split=found("split"),
        sha256=found("sha256"),
    )


def read_film_keys(path: str | Path, columns: Columns, *, splits_by_hash: bool) -> FilmKeys:
    """The table's rows; of its columns patient_id, image_id, split and sha256 are read, and image
    where perceptual hashes lie beside the table.

    splits_by_hash  a table without a column of splits has those of the patient's hash; False = all
                    of its rows are train
    Raises:         ManifestError as tables.table.read_table, or for an unknown split
    """
    path = Path(path)
    asked = {field: getattr(columns, field) for field in ("image_id", "split", "sha256")}
    wanted = {"patient_id": columns.patient_id, **{k: v for k, v in asked.items() if v}}
    hashes = read_hash_table(path.parent)
    if hashes is not None and columns.image in column_names(path):
        wanted["image"] = columns.image
    # of columns that no setting names nothing is asked: dates and lists tell no film
    anything = {"image", "image_id", "sha256"} & wanted.keys()
    table, digest = read_table(path, wanted, anything=anything)
    patient = _told(table["patient_id"])
    nothing = pa.chunked_array([pa.nulls(len(patient), patient.type)])
    if "split" in table or splits_by_hash:
        split = split_codes(table.get("split"), pc.fill_null(patient, ""), columns.split, path)
    else:
        split = np.zeros(len(patient), dtype=np.int8)
    image_id, stored = _told(table.get("image_id", nothing)), _told(table.get("sha256", nothing))
    return FilmKeys(
        fingerprint=digest.hexdigest(),
        split=split,
        patient=patient,
        film=pc.binary_join_element_wise(patient, image_id, pa.scalar("\0", patient.type)),
        stored=pc.utf8_lower(stored),
        source=_sources(path.parent / _INDEX, stored) if "sha256" in table else nothing,
        pictures=None
        if hashes is None or "image" not in table
        else hashes_of(hashes, table["image"]),
    )


def _told(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Null for a blank cell: two films without an id are not one film."""
    plain = pc.utf8_trim_whitespace(column)
    says_nothing = pc.is_in(plain, value_set=pa.array(["", UNREADABLE], plain.type))
    return pc.if_else(says_nothing, pa.scalar(None, plain.type), plain)


def _sources(index: Path, stored: pa.ChunkedArray) -> pa.ChunkedArray:
    """SHA-256 of each row's source file, where the index of `mlip prepare` tells it."""
    try:
        told, _ = read_table(index, {"stored": "sha256", "source": "source_sha256"})
    except ManifestError:  # none there, or no file of ours
        return pa.chunked_array([pa.nulls(len(stored), stored.type)])
    at = pc.index_in(stored, value_set=told["stored"].combine_chunks(), skip_nulls=True)
    return _told(told["source"]).take(at)
