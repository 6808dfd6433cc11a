"""A manifest as columns: reading, checking, rows excluded by rule.

Columnar throughout (Arrow and NumPy): a million rows load in seconds. Which columns mean what is
data.columns in the config; no picture is opened here.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mlip.dataloading.pair_ids import IntArray, pair_ids
from mlip.dataloading.reports.column import NO_SPLIT_RULE, RULES, ReportColumn, TextStore
from mlip.dataloading.splits import NO_SPLIT, SPLITS, place_of, split_codes
from mlip.dataloading.tables.table import ManifestError, check_identifiers, read_table
from mlip.dataloading.text_hash import HashArray, hash_bytes, keyed, says_none
from mlip.settings.config import Data

_DOTTED = r"(^|/)(?:\./|/)+"

# Up to this many rows every folder's real path is checked at load; beyond, when a file is opened.
_CHECK_LINKS_ROWS = 20_000

__all__ = ["Manifest", "ManifestError", "load_manifest"]


@dataclass(frozen=True)
class Manifest:
    """A manifest's columns; row numbers index all of them."""

    path: str
    root: str  # real path of the folder that image paths are relative to
    fingerprint: str  # SHA-256 of the manifest's bytes
    # of names in logs and on pages: results hold the fingerprint, with which a guess can be tested
    salt: str = dataclasses.field(repr=False)
    # paths, ids and labels may name a patient: shown by no repr, which notebooks keep
    image: pa.ChunkedArray = dataclasses.field(repr=False)
    report: TextStore = dataclasses.field(repr=False)  # after data.sections
    split: NDArray[np.int8]  # index into SPLITS, NO_SPLIT where blank
    pair_id: IntArray  # equal = same study or same text; the component's first row
    rule: NDArray[np.uint8]  # index into RULES
    # identifiers: never in a log, an error or a file of the run
    patient: pa.ChunkedArray = dataclasses.field(repr=False)
    patient_key: HashArray  # keyed hash of the patient id: for grouping, never the id itself
    sha256: pa.ChunkedArray | None
    label_column: pa.ChunkedArray | None = dataclasses.field(repr=False)
    keep_without_report: bool  # data.empty_report == "image_only"

    def __len__(self) -> int:
        return len(self.split)

    def rows(self, split: str, *, with_report: bool = True) -> IntArray:
        """Manifest rows of a split that no rule excludes, ascending.

        with_report=False adds the rows without a usable text where data.empty_report is
        image_only.

        Raises:  ValueError for another name than those of SPLITS.
        """
        kept = self.split == place_of(split)
        if with_report or not self.keep_without_report:
            kept &= self.rule == 0
        return np.flatnonzero(kept).astype(np.int64)

    def excluded(self, split: str, *, with_report: bool = True) -> dict[str, int]:
        """Rule -> number of rows that `rows` leaves out, other splits included."""
        counts: dict[str, int] = {}
        inside = self.split == place_of(split)
        for code in range(1, len(RULES)):
            if with_report or not self.keep_without_report:
                count = int(np.count_nonzero(inside & (self.rule == code)))
                if count:
                    counts[RULES[code]] = count
        for code, name in enumerate(SPLITS):
            count = int(np.count_nonzero(self.split == code))
            if name != split and count:
                counts[f"other_split_{name}"] = count
        nowhere = int(np.count_nonzero(self.split == NO_SPLIT))
        if nowhere:
            counts["no_split"] = nowhere
        return counts

    def image_path(self, row: int) -> str:
        """The image's path relative to root."""
        return self.image[row].as_py()

    def image_hash(self, row: int) -> str:
        """Twelve hex digits of the image's path, as pages and the quarantine's list show it."""
        return _hashed_id(self.image_path(row), self.salt)

    def image_name(self, row: int) -> str:
        """How logs and errors call a row's image: never by its path, which may name the patient."""
        return f"of data row {row + 1} (hashed {self.image_hash(row)})"

    def text(self, row: int) -> str:
        """The report's chosen sections, "" for an image-only row."""
        return self.report[row] if self.rule[row] == 0 else ""

    def sha256_of(self, row: int) -> str | None:
        value = self.sha256[row].as_py() if self.sha256 is not None else None
        return value or None

    def labels(self, row: int) -> tuple[str, ...]:
        """Finding names of a row, from the labels column ("|" between them)."""
        if self.label_column is None:
            return ()
        return tuple(finding_names(self.label_column[row].as_py()))


def finding_names(cell: str | None) -> list[str]:
    """The names in a cell of a column of labels."""
    return [part.strip() for part in (cell or "").split("|") if part.strip()]


def read_more(
    manifest: Manifest, wanted: Mapping[str, str], numbers: Collection[str] = ()
) -> dict[str, pa.ChunkedArray]:
    """Further columns of the manifest's file; arguments as read_table takes them.

    Raises:  ManifestError as read_table, and where another file lies in its place by now
    """
    columns, found = read_table(Path(manifest.path), wanted, numbers=numbers)
    if found.hexdigest() != manifest.fingerprint:
        raise ManifestError(f"{manifest.path}: changed while it was read; start again")
    return columns


def _hashed_id(text: str, salt: str) -> str:
    """Twelve hex digits that stand for an identifier in logs and errors.

    The salt is a manifest's own, which stands in no file of a run: only who holds the manifest can
    match them.
    """
    return hashlib.sha256(f"{salt}\0{text}".encode(errors="surrogatepass")).hexdigest()[:12]


def load_manifest(data: Data) -> Manifest:
    """The manifest of data.manifest, checked.

    Raises:  ManifestError (exit code 3): unreadable file, missing columns (all named), ids that
             are no text, a duplicate image id, a path outside the root, a patient in two splits,
             an unknown split name.
    """
    if not data.manifest:
        raise ManifestError("data.manifest is not set: expected a .csv, .parquet or .jsonl file")
    path = Path(data.manifest)
    columns = data.columns
    wanted = {
        "image": columns.image,
        "patient_id": columns.patient_id,
        "report": columns.report,
        "study_id": columns.study_id,
        "image_id": columns.image_id,
        "split": columns.split,
        "sha256": columns.sha256,
        "labels": columns.labels,
    }
    reports = ReportColumn(data.sections)
    table, digest = read_table(
        path,
        {k: v for k, v in wanted.items() if v is not None},
        # texts are packed as they are read: a million of them unpacked are 290 MiB
        {"report": reports} if columns.report is not None else {},
    )
    fingerprint = digest.hexdigest()
    digest.update(b"\0names")
    salt = digest.hexdigest()
    if len(next(iter(table.values()))) == 0:
        raise ManifestError(f"{path}: the manifest has no rows")
    root = os.path.realpath(data.root if data.root is not None else path.parent)
    if not os.path.isdir(root):
        raise ManifestError(
            f"data.root={data.root!r}: expected the folder that image paths are relative to, "
            "but there is no such folder"
        )
    for field in ("patient_id", "study_id"):
        if field in table:  # "77" and "77 " of two exports are one patient, in one split
            table[field] = pc.utf8_trim_whitespace(table[field])
    image, patient = table["image"], table["patient_id"]
    _check_paths(image, root, path)
    _check_unique(image, table.get("image_id"), path)
    for field in ("patient_id", "study_id", "image_id"):
        if field in table:
            check_identifiers(table[field], wanted[field] or "", path)
    patient_key = keyed(patient, fingerprint)
    _check_patients_told(patient, columns.patient_id, path)
    split = split_codes(table.pop("split", None), patient, columns.split, path)
    _check_patients(patient_key, split, patient, path, salt)
    # columns leave the table as they are used up
    if columns.report is None:
        reports.append_missing(len(split))
    rule, text_hash = reports.rule(), reports.text_hash()
    pair_id = pair_ids(patient_key, table.pop("study_id", None), text_hash, rule == 0, fingerprint)
    rule[split == NO_SPLIT] = NO_SPLIT_RULE
    return Manifest(
        path=str(path),
        root=root,
        fingerprint=fingerprint,
        salt=salt,
        image=image,
        report=reports.texts,
        split=split,
        pair_id=pair_id,
        rule=rule,
        patient=patient,
        patient_key=patient_key,
        sha256=table.get("sha256"),
        label_column=table.get("labels"),
        keep_without_report=data.empty_report == "image_only",
    )


def _check_patients_told(patient: pa.ChunkedArray, name: str, path: Path) -> None:
    blank = says_none(patient)
    if blank.any():
        raise ManifestError(
            f"{path}: column {name!r} (patient_id) is blank or says none (NA, nan, null) in "
            f"{np.count_nonzero(blank)} rows, the first is data row {int(blank.argmax()) + 1}"
        )


def _check_paths(image: pa.ChunkedArray, root: str, path: Path) -> None:
    """Refuses the whole manifest for one path that could leave the root."""
    escapes = pc.match_substring_regex(
        image, r"^$|^[/~\\]|\x00|(^|[/\\])\.\.($|[/\\])|^[A-Za-z][A-Za-z0-9+.-]*:|%2[eE]|%2[fF]"
    )
    escapes = pc.fill_null(escapes, True)
    count = pc.sum(escapes).as_py()
    if count:
        first = pc.index(escapes, True).as_py()
        raise ManifestError(
            f"{path}: {count} image paths are blank or could lead outside the root, the first in "
            f"data row {first + 1}: expected paths relative to data.root without '..', a "
            "leading '/', '~', a drive or scheme, or percent escapes"
        )
    if len(image) > _CHECK_LINKS_ROWS:
        return
    folders = pc.replace_substring_regex(image, r"[^/]*$", "")
    for folder in pc.unique(folders).to_pylist():
        real = os.path.realpath(os.path.join(root, folder))
        if real != root and not real.startswith(root.rstrip("/") + "/"):
            first = pc.index(folders, folder).as_py()
            raise ManifestError(
                f"{path}: the folder of the image of data row {first + 1} leads outside the root "
                "through a link: set data.root to a folder that holds all images"
            )


def _check_unique(image: pa.ChunkedArray, image_id: pa.ChunkedArray | None, path: Path) -> None:
    dotted = pc.any(pc.match_substring_regex(image, _DOTTED)).as_py()
    # "./a.png" and "a.png" are one file
    plain = pc.replace_substring_regex(image, _DOTTED, r"\1") if dotted else image
    for name, column in (("image path", plain), ("image id", image_id)):
        if column is None:
            continue
        hashes = hash_bytes(column)
        _, first, counts = np.unique(hashes, return_index=True, return_counts=True)
        again = int(np.count_nonzero(counts > 1))
        if again:
            row = int(first[counts > 1].min())
            raise ManifestError(
                f"{path}: {again} {name}s occur more than once; the first such one is in data "
                f"row {row + 1}: expected one row per image"
            )


def _check_patients(
    key: HashArray,
    split: NDArray[np.int8],
    patient: pa.ChunkedArray,
    path: Path,
    salt: str,
) -> None:
    _, index, inverse = np.unique(key, return_index=True, return_inverse=True)
    seen = np.zeros(len(index), dtype=np.int64)
    for code in range(len(SPLITS)):
        inside = np.zeros(len(index), dtype=bool)
        inside[inverse[split == code]] = True
        seen += inside
    crossing = np.flatnonzero(seen > 1)
    if len(crossing):
        first = patient[int(index[crossing].min())].as_py()
        raise ManifestError(
            f"{path}: {len(crossing)} patients occur in more than one split, for example the one "
            f"hashed {_hashed_id(first, salt)}: expected every patient in one split only"
        )
