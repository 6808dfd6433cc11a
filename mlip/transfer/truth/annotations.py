"""What annotators said about the images of a manifest: label states, boxes, masks, subsets.

Columns are named in transfer.columns as `mlip prepare` writes them; a folder of one's own may have
boxes.csv and mask images instead, generated studies have truth.jsonl. Arrays are copies or
read-only: nothing a caller does to a box reaches the next epoch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from mlip.dataloading.datasets.rle import decode_masks
from mlip.dataloading.datasets.rows import is_list_text
from mlip.dataloading.image_limits import MAX_SIDE_PX
from mlip.dataloading.images.image_file import read_bytes
from mlip.dataloading.ledger import BadSample, DataError
from mlip.dataloading.manifest import Manifest, ManifestError, finding_names, read_more
from mlip.dataloading.phantom.dataset import read_truth
from mlip.settings.config import Config
from mlip.transfer.array import Array
from mlip.transfer.truth.box_file import DrawnBox, box_file, read_box_file
from mlip.transfer.truth.generated import phantom_size, truth_of
from mlip.transfer.truth.mask_file import INSIDE, read_mask
from mlip.transfer.truth.outside import check_inside

UNSAID, NEGATIVE, POSITIVE, UNCERTAIN = -1, 0, 1, 2  # states of a label
LABEL_FORM = "finding names joined by '|', as `mlip prepare` writes them"
MOST_NAME_CHARACTERS = 80  # twice the longest name of a public data set


@dataclass(frozen=True)
class Boxes:
    """Boxes of one image in px of the source image."""

    corners: Array  # [n, 4] float64 x0, y0, x1, y1; read-only
    names: tuple[str, ...]
    size: tuple[int, int] | None  # height, width they are in; None = the image file's
    phrases: tuple[str, ...] = ()  # words of the report that each one answers; "" = none stated


class Annotations:
    """Annotations by manifest row.

    Raises:  ManifestError naming a column that is not there, a box outside its image, run lengths
             or a mask file that cannot be used. Messages name rows, never patients.
    """

    def __init__(self, config: Config, manifest: Manifest) -> None:
        self.manifest, self.transfer = manifest, config.transfer
        columns = config.transfer.columns
        wanted = {
            name: column
            for name in ("uncertain", "negative", "boxes", "mask", "subset")
            + ("source_height", "source_width")
            if (column := getattr(columns, name)) is not None
        }
        self._columns: dict[str, pa.ChunkedArray] = {}
        if wanted:
            try:
                self._columns = read_more(manifest, wanted)
            except ManifestError as error:
                # the reader speaks of data.columns
                raise ManifestError(
                    str(error).replace("data.columns", "transfer.columns")
                ) from None
        check_labels(config, manifest)
        for name in ("uncertain", "negative"):
            _check_names(self._columns.get(name), f"transfer.columns.{name}", manifest.path)

    def _text(self, name: str, row: int) -> str:
        column = self._columns.get(name)
        return (column[row].as_py() or "").strip() if column is not None else ""

    def in_subset(self, rows: Array, name: str) -> Array:
        """The rows of this subset."""
        kept = [self._text("subset", row) == name for row in rows.tolist()]
        return rows[np.array(kept, dtype=bool)]

    def of_subset(self, rows: Array, split: str) -> Array:
        """The rows of transfer.subset, in the splits that it cuts down; else all of them."""
        wanted = self.transfer.subset
        if wanted is None or (split != "test" and self.transfer.subset_of == "test"):
            return rows
        if "subset" not in self._columns:
            raise ManifestError(
                f"transfer.subset={wanted!r}: set transfer.columns.subset to the manifest's column "
                "of subsets"
            )
        return self.in_subset(rows, wanted)

    def states(self, rows: Array, classes: Sequence[str]) -> Array:
        """[rows, classes] int8: POSITIVE, NEGATIVE, UNCERTAIN or UNSAID.

        Raises:  ManifestError if no labels column is set, or a row states a class in two ways.
        """
        if self.manifest.label_column is None:
            raise ManifestError(
                "classification needs labels: set data.columns.labels to the column that holds "
                "finding names joined by '|'; a table with a column a finding becomes one by "
                "`mlip prepare manifest --option findings=A,B`"
            )
        place = {name: k for k, name in enumerate(classes)}
        states = np.full((len(rows), len(classes)), UNSAID, dtype=np.int8)
        for i, row in enumerate(np.asarray(rows).tolist()):
            said = (
                (POSITIVE, self.manifest.labels(row)),
                (UNCERTAIN, finding_names(self._text("uncertain", row))),
                (NEGATIVE, finding_names(self._text("negative", row))),
            )
            for state, names in said:
                for name in names:
                    k = place.get(name)
                    if k is None:
                        continue
                    if states[i, k] not in (UNSAID, state):
                        raise ManifestError(
                            f"{self.manifest.path}: data row {row + 1} states {name!r} in two of "
                            "the labels, uncertain and negative columns"
                        )
                    states[i, k] = state
        return states

    def names(self) -> set[str]:
        """Every name that the labels, uncertain and negative columns hold."""
        columns = [self.manifest.label_column, *map(self._columns.get, ("uncertain", "negative"))]
        return {
            name
            for column in columns
            if column is not None
            for value in column.unique().to_pylist()
            for name in finding_names(value)
        }

    def source_size(self, row: int) -> tuple[int, int] | None:
        """(height, width) of the image that boxes and run lengths are in; None = the file's."""
        text = self._text("source_height", row), self._text("source_width", row)
        if not all(text):
            return None
        # more pixels than an image may have are no size, and an empty mask of it no memory
        if not all(p.isdecimal() and len(p) < 6 and 0 < int(p) <= MAX_SIDE_PX for p in text):
            raise ManifestError(
                f"{self.manifest.path}: data row {row + 1}: transfer.columns.source_height and "
                f"source_width: expected whole numbers of px from 1 to {MAX_SIDE_PX}"
            )
        return int(text[0]), int(text[1])

    def boxes(self, row: int) -> Boxes:
        """The row's boxes; a row without any has corners of shape [0, 4]."""
        size = self.source_size(row)
        if "boxes" in self._columns:
            drawn = self._boxes_of_cell(row)
        else:
            drawn = self._box_file.get(self.manifest.image_path(row), [])
            size = size or self._phantom_size
        xywh = np.array([box.xywh for box in drawn], dtype=np.float64).reshape(-1, 4)
        corners = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)
        if not np.isfinite(corners).all() or (xywh[:, 2:] <= 0).any():
            raise ManifestError(
                f"{self.manifest.path}: data row {row + 1}: a box has no positive width and "
                "height: expected x, y, width and height in px"
            )
        corners.flags.writeable = False
        names, phrases = (box.label for box in drawn), (box.phrase for box in drawn)
        return Boxes(corners, tuple(names), size, tuple(phrases))

    def _boxes_of_cell(self, row: int) -> list[DrawnBox]:
        try:
            return [_box_of(entry) for entry in json.loads(self._text("boxes", row) or "[]")]
        except (ValueError, TypeError, LookupError, RecursionError, OverflowError):
            raise ManifestError(
                f"{self.manifest.path}: data row {row + 1}: boxes: expected JSON "
                "[[x, y, width, height, class], ...], behind the class its phrase where it has "
                "one"
            ) from None

    def looked_at(self, rows: Array) -> Array:
        """The rows in which somebody looked for boxes of transfer.classes.

        All rows of a column of boxes and of generated studies. boxes.csv beside real images names
        the images somebody drew in: one in which it names none of the classes was not looked at.
        """
        if "boxes" in self._columns or self._phantom_size is not None:
            return rows
        wanted = self.transfer.classes
        drawn = (self.boxes(r).names for r in rows.tolist())
        kept = [any(not wanted or name in wanted for name in names) for names in drawn]
        return rows[np.array(kept, dtype=bool)]

    def require_box_names(self) -> None:
        """Raise ManifestError for one of transfer.classes that no box is named by.

        A misspelt class would leave the mean over classes without a word.
        """
        missing = set(self.transfer.classes)
        carriers: dict[str, set[int]] = {}
        for row in range(len(self.manifest)) if missing else ():
            for name in set(self.boxes(row).names):
                carriers.setdefault(name, set()).add(int(self.manifest.patient_key[row]))
        if missing := missing - carriers.keys():
            shared = sorted(name for name, who in carriers.items() if len(who) > 1)
            raise ManifestError(
                f"{self.manifest.path}: no box is named {', '.join(sorted(missing))} "
                f"(transfer.classes); the boxes have: "
                f"{', '.join(shared[:30]) or 'no name of two patients'}"
            )

    @cached_property
    def _phantom_size(self) -> tuple[int, int] | None:
        return phantom_size(self.manifest)

    @cached_property
    def _box_file(self) -> dict[str, list[DrawnBox]]:
        found = read_box_file(self.manifest.path)
        if found is None:
            raise ManifestError(
                "no boxes: set transfer.columns.boxes to the manifest's column of boxes, or put "
                f"boxes.csv (path, label, x, y, w, h) at {box_file(self.manifest.path)}"
            )
        return found

    def mask(self, row: int, image_size: tuple[int, int]) -> Array:
        """[H, W] uint8 of INSIDE, IGNORED and 0, on the source image's pixel grid.

        image_size  (height, width) of the image as read; a mask image must have it, or that of
                    transfer.columns.source_height and source_width
        """
        if self.transfer.mask_source == "boxes":
            return self._filled_boxes(row, image_size)
        if self.transfer.mask_source == "phantom":
            return self._phantom_mask(row)
        text = self._text("mask", row)
        if "mask" not in self._columns:
            raise ManifestError(
                "segmentation needs masks: set transfer.columns.mask to the manifest's column of "
                "run lengths or mask files, or transfer.mask_source to boxes or phantom"
            )
        if text.lower().endswith((".png", ".jpg", ".jpeg")):
            return self._mask_file(row, text, image_size)
        height, width = self.source_size(row) or image_size
        try:
            return decode_masks(text or "-1", height, width) * np.uint8(INSIDE)
        except ValueError as error:
            raise ManifestError(
                f"{self.manifest.path}: data row {row + 1}: mask of {width} x {height} px: {error}"
            ) from None

    def has_mask(self, row: int) -> bool:
        """Whether annotators drew a mask image for the row (a blank cell of run lengths is
        an empty mask, a blank cell of mask files is no annotation)."""
        return bool(self._text("mask", row))

    @cached_property
    def masks_are_files(self) -> bool:
        """Whether the mask column names mask images."""
        column = self._columns.get("mask")
        values = column.unique().to_pylist() if column is not None else []
        return any((v or "").strip().lower().endswith((".png", ".jpg", ".jpeg")) for v in values)

    def _mask_file(self, row: int, relative: str, image_size: tuple[int, int]) -> Array:
        where = f"{self.manifest.path}: data row {row + 1}: mask file"
        try:
            mask = read_mask(read_bytes(self.manifest.root, relative))
        except (BadSample, DataError) as error:
            raise ManifestError(f"{where} cannot be read: {error}") from None
        except ValueError as error:
            raise ManifestError(f"{where} {error}") from None
        expected = self.source_size(row) or image_size
        if mask.shape != expected:
            raise ManifestError(
                f"{where} is {mask.shape[1]} x {mask.shape[0]} px, its image "
                f"{expected[1]} x {expected[0]} px: expected one size"
            )
        return mask

    def _filled_boxes(self, row: int, image_size: tuple[int, int]) -> Array:
        boxes = self.boxes(row)
        size = boxes.size or image_size
        check_inside(row, boxes.corners, size, self.manifest.path)
        mask = np.zeros(size, dtype=np.uint8)
        wanted = self.transfer.classes
        for corners, name in zip(boxes.corners, boxes.names, strict=True):
            if not wanted or name in wanted:
                x0, y0, x1, y1 = np.rint(corners).astype(int).clip(0)
                mask[y0:y1, x0:x1] = INSIDE
        return mask

    @cached_property
    def _phantom_truth(self) -> dict[str, list[dict[str, Any]]]:
        with truth_of(self.manifest) as folder:
            return read_truth(folder)

    def _phantom_mask(self, row: int) -> Array:
        size = self._phantom_size
        if size is None:
            raise ManifestError(
                f"transfer.mask_source=phantom: {self.manifest.path} is no generated data set; set "
                "it to mask or boxes"
            )
        mask = np.zeros(size, dtype=np.uint8)
        wanted = self.transfer.classes
        image_id = Path(self.manifest.image_path(row)).stem
        if image_id not in self._phantom_truth:
            raise ManifestError(f"{self.manifest.path}: truth.jsonl has no line for {image_id}")
        for finding in self._phantom_truth[image_id]:
            if not wanted or finding["concept_id"] in wanted:
                mask[finding["mask"]] = INSIDE
        return mask


def shared_names(manifest: Manifest) -> list[str]:
    """Names of the labels column that two patients have, sorted; an identifier is none of them."""
    carriers: dict[str, set[int]] = {}
    if manifest.label_column is None:
        return []
    values = manifest.label_column.to_pylist()
    for value, patient in zip(values, manifest.patient_key.tolist(), strict=True):
        for name in finding_names(value):
            carriers.setdefault(name, set()).add(patient)
    return sorted(name for name, patients in carriers.items() if len(patients) > 1)


def check_labels(config: Config, manifest: Manifest) -> None:
    """Raise ManifestError where the labels column holds something else than names of findings.

    Names of labels stand in results, on pages and in errors: reports and identifiers must not.
    """
    columns = config.data.columns
    if columns.labels is None:
        return
    for field in ("report", "patient_id", "study_id", "image_id", "image"):
        if getattr(columns, field) == columns.labels:
            raise ManifestError(
                f"data.columns.labels and data.columns.{field} are both {columns.labels!r}: "
                f"expected a column of {LABEL_FORM}, or data.columns.labels=null"
            )
    _check_names(manifest.label_column, "data.columns.labels", manifest.path)


def _check_names(column: pa.ChunkedArray | None, setting: str, path: str) -> None:
    values = [] if column is None else column.unique().to_pylist()
    if any(is_list_text(value or "") for value in values):
        raise ManifestError(
            f"{path}: the column of {setting} holds lists in brackets, of which each would be one "
            f"name: expected {LABEL_FORM}"
        )
    longest = max((len(name) for value in values for name in finding_names(value)), default=0)
    if longest > MOST_NAME_CHARACTERS:
        raise ManifestError(
            f"{path}: the column of {setting} holds texts of up to {longest} characters: expected "
            f"{LABEL_FORM}"
        )


def _box_of(entry: Any) -> DrawnBox:
    """Raises:  ValueError, TypeError, LookupError or OverflowError for another entry of a cell."""
    x, y, w, h = map(float, entry[:4])
    return DrawnBox(str(entry[4]), "", (x, y, w, h), _phrase(*entry[5:6]))


def _phrase(text: str | None = None) -> str:
    """Raises:  TypeError for what is no text."""
    return " ".join("".join(text or ()).split())
