"""Components of rows with equal keys."""

from __future__ import annotations

import numpy as np

from mlip.dataloading.pair_ids import connect


def test_connect_agrees_with_repeated_relabelling() -> None:
    rng = np.random.default_rng(3)
    for _ in range(20):
        count = 40
        keys = [rng.integers(0, 25, count).astype(np.uint64) for _ in range(2)]
        rows = np.arange(count)
        label = rows.copy()
        for _ in range(count):
            for key in keys:
                for value in np.unique(key):
                    label[key == value] = label[key == value].min()
        assert (connect(count, [(rows, key) for key in keys]) == label).all()
