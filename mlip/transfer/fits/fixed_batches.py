"""Which images a frozen encoder takes at once: settled by the fits, not by what was asked before.

A batch of another size can round otherwise (a ResNet's features of one image alone differ by 2e-6
from those in a batch), and a run that goes on after a kill has encoded nothing yet.
"""

from __future__ import annotations

import hashlib

import numpy as np

from mlip.transfer.array import Array


class FixedBatches:
    """Batches of at most `size` rows: of each group those that no group before it had."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._of: dict[int, Array] = {}
        self._digest = hashlib.sha256()

    def add(self, rows: Array) -> None:
        """One more group; rows that are in a batch already stay there."""
        new = np.array([r for r in np.unique(rows).tolist() if r not in self._of], dtype=np.int64)
        self._digest.update(new.tobytes() + b"end of a group")
        for at in range(0, len(new), self.size):
            part = new[at : at + self.size]
            self._of.update(dict.fromkeys(part.tolist(), part))

    def of(self, row: int) -> Array:
        """The rows that this one is encoded with, itself among them."""
        return self._of[row]

    @property
    def hash(self) -> str:
        """SHA-256 (hex) of all groups so far."""
        return self._digest.hexdigest()
