"""Sample order as a pure function of (seed, position): no state, no world size in it.

Position g of the endless global order belongs to epoch g // R, in which the R rows appear once
each in a keyed permutation. The batch of step s covers positions [s N, (s + 1) N); rank r of W
takes the contiguous part [r N / W, (r + 1) N / W) of it (rounded down, so parts differ by at most
one where W does not divide N). A batch may span two epochs: no batch of training is short.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from mlip.keyed_random import keyed_uniform

IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class Plan:
    """What one rank reads for one step."""

    step: int
    global_index: IntArray  # [B] position in the endless global order
    epoch: IntArray  # [B]
    rows: IntArray  # [B] manifest rows

    def __len__(self) -> int:
        return len(self.rows)


def rank_slice(count: int, rank: int, world_size: int) -> tuple[int, int]:
    """First and last-plus-one of a rank's part of `count` positions."""
    return rank * count // world_size, (rank + 1) * count // world_size


def epoch_permutation(seed: int, epoch: int, rows: int) -> IntArray:
    """The order of one epoch: argsort of keyed uniform numbers.

    Returns: [rows] int64, a permutation of 0 .. rows - 1
    Source:  ours; NumPy's generators may change their streams between versions, these may not.
    """
    draws = keyed_uniform(seed, "order", epoch, torch.arange(rows, dtype=torch.int64))[:, 0]
    return torch.argsort(draws, stable=True).numpy()


class TrainingOrder:
    """step -> Plan over an endless sequence of shuffled epochs."""

    def __init__(
        self, rows: IntArray, *, seed: int, global_pairs: int, rank: int = 0, world_size: int = 1
    ) -> None:
        if len(rows) == 0:
            raise ValueError("expected at least one training row, got none")
        if world_size > global_pairs:
            raise ValueError(
                f"expected batch.global_pairs >= the number of ranks, got {global_pairs} pairs "
                f"for {world_size} ranks: some ranks would have no pair"
            )
        self.rows = np.ascontiguousarray(rows, dtype=np.int64)
        self.seed = seed
        self.global_pairs = global_pairs
        self.rank, self.world_size = rank, world_size
        self._permutations: dict[int, IntArray] = {}

    def row_at(self, global_index: IntArray) -> tuple[IntArray, IntArray]:
        """Epoch and manifest row of positions of the global order."""
        epochs, places = np.divmod(global_index, len(self.rows))
        rows = np.empty_like(global_index)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            rows[here] = self.rows[self._permutation(int(epoch))[places[here]]]
        return epochs, rows

    def plan(self, step: int) -> Plan:
        first, last = rank_slice(self.global_pairs, self.rank, self.world_size)
        start = step * self.global_pairs
        global_index = np.arange(start + first, start + last, dtype=np.int64)
        epochs, rows = self.row_at(global_index)
        return Plan(step, global_index, epochs, rows)

    def replacements(self, global_index: int, epoch: int, attempts: int) -> IntArray:
        """Rows to try, in this order, where the row at a position turns out bad."""
        index = torch.tensor([global_index], dtype=torch.int64)
        draws = keyed_uniform(self.seed, "replacement", epoch, index, attempts)[0].numpy()
        return self.rows[(draws * len(self.rows)).astype(np.int64)]

    def _permutation(self, epoch: int) -> IntArray:
        if epoch not in self._permutations:
            # a batch can touch many epochs only where it is larger than the data set
            for old in sorted(self._permutations)[:-2]:
                del self._permutations[old]
            self._permutations[epoch] = epoch_permutation(self.seed, epoch, len(self.rows))
        return self._permutations[epoch]


class SequentialOrder:
    """step -> Plan over the rows once, in manifest order; the last batch may be short.

    A rank's part of the last batch may be empty: every rank makes the same number of steps.
    """

    def __init__(
        self, rows: IntArray, *, global_pairs: int, rank: int = 0, world_size: int = 1
    ) -> None:
        self.rows = np.ascontiguousarray(rows, dtype=np.int64)
        self.global_pairs = global_pairs
        self.rank, self.world_size = rank, world_size

    @property
    def num_steps(self) -> int:
        return -(-len(self.rows) // self.global_pairs)

    def plan(self, step: int) -> Plan:
        start = step * self.global_pairs
        count = max(0, min(self.global_pairs, len(self.rows) - start))
        first, last = rank_slice(count, self.rank, self.world_size)
        global_index = np.arange(start + first, start + last, dtype=np.int64)
        return Plan(step, global_index, np.zeros_like(global_index), self.rows[global_index])
