"""Train, val and test: what tables call them, and which of them each row of a manifest is in."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mlip.dataloading.tables.table import ManifestError
from mlip.dataloading.text_hash import hash_bytes, mix

SPLITS = ("train", "val", "test")
SPLIT_OF = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validate", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
NO_SPLIT = -1

# Shares of patients where the manifest has no split column.
_TRAIN_SHARE, _VAL_SHARE = 0.8, 0.1


def place_of(split: str) -> int:
    """Index into SPLITS.

    Raises:  ValueError for another name than those of SPLITS.
    """
    if split not in SPLITS:
        raise ValueError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
    return SPLITS.index(split)


def split_codes(
    column: pa.ChunkedArray | None, patient: pa.ChunkedArray, name: str | None, path: Path
) -> NDArray[np.int8]:
    """Index into SPLITS of every row, NO_SPLIT where blank; without a column by the patient's hash.

    Raises:  ManifestError for another name than those of SPLIT_OF.
    """
    if column is None:
        # the plain hash of the id: the same patients fall in the same split in every manifest
        draw = mix(hash_bytes(patient), np.uint64(0)).astype(np.float64) / 2.0**64
        bounds = np.array([_TRAIN_SHARE, _TRAIN_SHARE + _VAL_SHARE])
        return np.searchsorted(bounds, draw, side="right").astype(np.int8)
    plain = pc.utf8_lower(pc.utf8_trim_whitespace(pc.fill_null(column, "")))
    encoded = plain.combine_chunks().dictionary_encode()
    values = encoded.dictionary.to_pylist()
    unknown = [v for v in values if v and v not in SPLIT_OF]
    if unknown:
        # a mapped-wrong column could hold identifiers: show only what looks like a split's name
        named = all(v.isalpha() and len(v) <= 12 for v in unknown) and len(unknown) <= 3
        shown = ", ".join(map(repr, unknown)) if named else ""
        raise ManifestError(
            f"{path}: column {name!r} (split) holds {len(unknown)} unknown values"
            f"{': ' + shown if shown else ''}; expected train, val (valid, validate, validation, "
            "dev) or test"
        )
    known = {name: SPLITS.index(split) for name, split in SPLIT_OF.items()}
    codes = np.array([known.get(v, NO_SPLIT) for v in values], dtype=np.int8)
    return codes[encoded.indices.to_numpy()]
