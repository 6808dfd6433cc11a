"""Which rows a fit may see: label fractions by patient, a val split by patient, a test read once.

Everything follows from a hash of (seed, patient), so a smaller fraction is part of the larger one.
A patient's hash is keyed by the manifest's content: the same file gives the same draws on every
machine, an edited one may give others.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlip.dataloading.manifest import Manifest, ManifestError
from mlip.dataloading.splits import SPLITS
from mlip.transfer.array import Array


@dataclass(frozen=True)
class Splits:
    """Manifest rows by split, and how they came about."""

    train: Array
    val: Array
    test: Array
    unreadable: dict[str, int]
    hash: str  # of the images' paths by split: equal = the same task

    def __getitem__(self, split: str) -> Array:
        return getattr(self, split)


def patient_draws(patient_keys: Array, seed: int) -> Array:
    """A number in [0, 1) for each row, equal for all rows of a patient, keyed by seed."""
    with np.errstate(over="ignore"):
        x = np.asarray(patient_keys, dtype=np.uint64) + np.uint64(
            (0x9E3779B97F4A7C15 * (2 * seed + 1)) & (2**64 - 1)
        )
        # splitmix64's finaliser (Steele, Lea, Flood 2014)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x = x ^ (x >> np.uint64(31))
    return x.astype(np.float64) / 2.0**64


def draw_fraction(rows: Array, patient_keys: Array, percent: float, seed: int) -> Array:
    """Rows of `percent` of the patients (at least two), ascending; 100 gives all rows.

    Shapes:  rows [n] manifest rows, patient_keys [n] of them
    """
    if percent >= 100.0:
        return np.sort(rows)
    patients = np.unique(patient_keys)
    order = patients[np.argsort(patient_draws(patients, seed), kind="stable")]
    count = min(len(order), max(2, round(len(order) * percent / 100.0)))
    return np.sort(rows[np.isin(patient_keys, order[:count])])


def balance(rows: Array, positive: Array, seed: int) -> Array:
    """All positives and as many of the others, drawn by seed; ascending."""
    others = rows[~positive]
    count = min(len(others), int(positive.sum()))
    chosen = np.random.default_rng(seed).permutation(len(others))[:count]
    return np.sort(np.concatenate([rows[positive], others[chosen]]))


def some_of(rows: Array, most: int, seed: int) -> Array:
    """All of the rows, or `most` of them drawn at random; ascending where they are."""
    if len(rows) <= most:
        return rows
    return np.sort(np.random.default_rng(seed).choice(rows, size=most, replace=False))


def divide(
    manifest: Manifest,
    val_share: float,
    keep: dict[str, Array],
    unreadable: dict[str, int],
) -> Splits:
    """Rows of each split; val is cut from train by patient where the manifest has none.

    keep        split -> its rows that the task can use
    unreadable  reason -> rows of all splits whose image could not be read
    Raises:  ManifestError for a split without rows or with one patient: early stopping or an
             interval over patients needs two.
    """
    rows = dict(keep)
    if len(rows["val"]) == 0 and val_share > 0.0:
        train = rows["train"]
        rows["val"] = draw_fraction(train, manifest.patient_key[train], 100.0 * val_share, 0)
        rows["train"] = np.setdiff1d(train, rows["val"])
    for split in SPLITS:
        patients = len(np.unique(manifest.patient_key[rows[split]]))
        if patients < 2:
            hint = (
                "; set transfer.val_share to take val from the training patients"
                if split == "val" and val_share == 0.0
                else ""
            )
            if unreadable:
                counts = ", ".join(f"{reason} {n}" for reason, n in unreadable.items())
                hint += f"; images that could not be read: {counts} (data.root is {manifest.root})"
            raise ManifestError(
                f"{manifest.path}: split {split!r} has {patients} usable patients: expected at "
                f"least 2, for early stopping and for intervals over patients{hint}"
            )
    return Splits(**rows, unreadable=unreadable, hash=splits_hash(manifest, rows))


def splits_hash(manifest: Manifest, rows: dict[str, Array]) -> str:
    """SHA-256 over the image paths of each split: it names the task, not its file's layout."""
    digest = hashlib.sha256()
    for split in SPLITS:
        digest.update(f"{split}\n".encode())
        for path in sorted(manifest.image_path(int(row)) for row in rows[split]):
            digest.update(path.encode(errors="surrogatepass") + b"\n")
    return digest.hexdigest()


class HeldOut:
    """The test split behind a door that opens once per fitted model.

    A second look at test by the same fit could only serve to choose something by it.
    """

    def __init__(self, data: Any) -> None:
        self._data = data
        self._seen: set[Any] = set()

    def open(self, fit: Any) -> Any:
        """The test data, for the finished fit of this name.  Raises RuntimeError if asked twice."""
        if fit in self._seen:
            raise RuntimeError(f"the test split was already read for fit {fit}")
        self._seen.add(fit)
        return self._data
