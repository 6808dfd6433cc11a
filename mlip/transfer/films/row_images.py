"""The images of some rows of a manifest, encoded batch by batch with an open model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from mlip.dataloading.manifest import Manifest, ManifestError
from mlip.dataloading.progress import Progress
from mlip.dataloading.splits import SPLITS
from mlip.transfer.array import Array
from mlip.transfer.draws import some_of
from mlip.transfer.features import ImageBank, encoded_images, row_loader
from mlip.transfer.films.row_table import told


def of_split(manifest: Manifest, split: str) -> tuple[str, Manifest]:
    """(a split's name, the manifest in which it holds what is asked for)

    split  a split, or "all": rows of every split and of none
    """
    if split != "all":
        return split, manifest
    everywhere = np.full_like(manifest.split, SPLITS.index("test"))
    return "test", dataclasses.replace(manifest, split=everywhere)


class RowImages:
    """Iterate for the ImageBanks of a split's rows; `bad` says then what could not be read.

    Rows without a report take part where the manifest was read with data.empty_report=image_only.

    split  a split, or "all": of every split and of none
    most   at most so many rows, drawn by run.seed
    rows   of them these alone
    bad    row -> reason
    Raises:  ManifestError for a split without rows or whose images can none be read
    """

    def __init__(
        self,
        opened: Any,
        manifest: Manifest,
        split: str,
        *,
        most: int | None = None,
        rows: Array | None = None,
    ) -> None:
        self._opened = opened
        self._asked, self._path = split, manifest.path
        split, manifest = of_split(manifest, split)
        usable = manifest.rows(split, with_report=False)
        rows = usable if rows is None else np.intersect1d(usable, rows)
        if len(rows) == 0:
            raise ManifestError(
                f"{manifest.path}: split {self._asked!r} has none of its {len(manifest)} rows: "
                "choose another --split"
            )
        if most is not None:
            rows = some_of(rows, most, opened.config.run.seed)
        self._rows = len(rows)
        self._loader = row_loader(opened, manifest, split, rows)
        self.bad: dict[int, str] = {}

    def __len__(self) -> int:
        """Rows that are asked for; as many images at most."""
        return self._rows

    def __iter__(self) -> Iterator[ImageBank]:
        found, done, progress = False, 0, Progress("images encoded")
        for bank in encoded_images(self._opened.model, self._loader, self._opened.config.data):
            found = True
            done += len(bank)
            progress(done, self._rows)
            yield bank
        self.bad = dict(self._loader.ledger.bad)
        if not found:
            raise ManifestError(
                f"{self._path}: no image of split {self._asked!r} can be read "
                f"({told(self.bad)}): is data.root the folder of the images?"
            )
