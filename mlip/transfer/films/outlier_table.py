"""`mlip outliers`: the reference of a split, or how unlike it the images of another one are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlip.dataloading.manifest import Manifest
from mlip.system.output_file import begins_with, require_replaceable
from mlip.transfer.array import Array
from mlip.transfer.films.outliers import (
    MOST_REFERENCE,
    encode_rows,
    fit_reference,
    load_reference,
    save_reference,
)
from mlip.transfer.films.row_table import unread, write_row_table
from mlip.transfer.fingerprint import made_with

LEVELS = (0.05, 0.01)
_COLUMNS = ["p_value", "distance"]
_SHOWN = 10  # rows that are named on the terminal


def require_own_table(path: Path) -> None:
    """Raises:  ConfigError for a folder, or a file that write_outliers did not write."""
    is_ours = begins_with(path, ",".join(["row_index", *_COLUMNS]))
    require_replaceable(path, "--out", "table of mlip outliers", is_ours=is_ours)


def write_reference(
    opened: Any, manifest: Manifest, path: Path, *, split: str, say: Callable[[str], None]
) -> None:
    """The reference of the split's images in `path`.

    say  is told what was made before it is written: nothing of it is lost with the file's place
    """
    images, rows, bad = encode_rows(opened, manifest, split, most=MOST_REFERENCE)
    made_of = {**made_with(opened), "images": str(len(rows)), "split": split}
    reference = fit_reference(
        images, manifest.patient_key[rows], seed=opened.config.run.seed, made_of=made_of
    )
    ranked = len(reference.ranked)
    say(
        f"{len(rows) - ranked} images for mean and covariance, {ranked} to rank among "
        f"(smallest p {1 / (1 + ranked):.2g}){unread(bad)}"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    save_reference(reference, path)
    say(f"{path}")


def write_outliers(
    opened: Any,
    manifest: Manifest,
    reference_path: Path,
    out: Path,
    *,
    split: str,
    say: Callable[[str], None],
) -> None:
    """A CSV of row_index, p_value, distance and reason (of images that cannot be read), by row.

    Rows are numbers of manifest rows, from 0: files and patients stay in the manifest.
    say  as of write_reference
    """
    reference = load_reference(reference_path, opened)
    images, rows, bad = encode_rows(opened, manifest, split, most=None)
    distances = reference.distances(images)
    p_values = reference.share_as_far(distances)
    lines = {
        int(row): (f"{p:.6g}", f"{distance:.6g}")
        for row, p, distance in zip(rows, p_values, distances, strict=True)
    }
    for line in _summary(rows, p_values, distances):
        say(line)
    write_row_table(out, _COLUMNS, lines, bad, require_own=require_own_table)
    say(f"{out}: {len(lines) + len(bad)} rows{unread(bad)}")


def _summary(rows: Array, p_values: Array, distances: Array) -> list[str]:
    counts = ", ".join(
        f"{int((p_values <= level).sum())} with p <= {level} ({len(rows) * level:.0f} of images "
        "like the reference's)"
        for level in LEVELS
    )
    farthest = rows[distances.argsort()[::-1][:_SHOWN]]
    named = ", ".join(str(int(row)) for row in farthest)
    return [f"{len(rows)} images: {counts}", f"farthest first, rows {named}"]
