"""Boxes that lie outside their image, of all rows at once: one error a row is a night a row."""

from __future__ import annotations

import numpy as np

from mlip.dataloading.tables.table import ManifestError
from mlip.transfer.array import Array

_SHOWN = 10  # rows that an error names


class OutsideBoxes:
    """Collects them row by row; `check` raises where there were any.

    where  the file whose rows these are
    """

    def __init__(self, where: str) -> None:
        self._where = where
        self._first = ""
        self._boxes: dict[int, int] = {}  # row -> how many of its boxes

    def look(self, row: int, corners: Array, size: tuple[int, int]) -> None:
        """One pixel of slack: boxes are rounded.

        Shapes:  corners [n, 4] x0, y0, x1, y1 in px of the (height, width) image
        """
        height, width = size
        outside = (
            (corners[:, :2] < -1).any(axis=1)
            | (corners[:, 2] > width + 1)
            | (corners[:, 3] > height + 1)
        )
        if not outside.any():
            return
        if not self._boxes:
            x0, y0, x1, y1 = corners[np.flatnonzero(outside)[0]]
            self._first = (
                f"a box (x={x0:g} y={y0:g} w={x1 - x0:g} h={y1 - y0:g}) does not lie inside its "
                f"{width} x {height} image"
            )
        self._boxes[row] = int(outside.sum())

    def check(self) -> None:
        """Raises:  ManifestError naming the first box, how many there are, and their rows."""
        if not self._boxes:
            return
        first, *others = self._boxes
        more = ""
        if others:
            named = ", ".join(str(row + 1) for row in others[:_SHOWN])
            rest = f" and {len(others) - _SHOWN} more" if len(others) > _SHOWN else ""
            more = (
                f"; in all {sum(self._boxes.values())} boxes of {len(self._boxes)} rows are so: "
                f"data rows {named}{rest}"
            )
        raise ManifestError(
            f"{self._where}: data row {first + 1}: {self._first}{more}; mend or remove them; of a "
            "prepared set name transfer.columns.source_height and source_width, which boxes are in "
            "px of"
        )


def check_inside(row: int, corners: Array, size: tuple[int, int], where: str) -> None:
    """The same of one row's boxes.  Raises:  as check"""
    found = OutsideBoxes(where)
    found.look(row, corners, size)
    found.check()
