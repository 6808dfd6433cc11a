"""Which images are encoded together follows from the fits, whatever was encoded before."""

from __future__ import annotations

import numpy as np

from mlip.transfer.fits.fixed_batches import FixedBatches


def test_a_row_stays_in_the_batch_of_the_first_group_that_has_it() -> None:
    made = FixedBatches(2)
    made.add(np.array([7, 3, 5]))
    first = made.hash
    made.add(np.array([5, 9, 3, 8, 1]))
    assert [made.of(row).tolist() for row in (3, 5, 7)] == [[3, 5], [3, 5], [7]]
    assert [made.of(row).tolist() for row in (1, 8, 9)] == [[1, 8], [1, 8], [9]]
    made.add(np.array([9, 7]))  # none of them is new
    assert made.of(7).tolist() == [7] and made.hash != first


def test_the_hash_tells_groups_apart_and_not_the_order_within_one() -> None:
    def hash_of(*groups: list[int]) -> str:
        made = FixedBatches(64)
        for rows in groups:
            made.add(np.array(rows))
        return made.hash

    assert hash_of([1, 2], [3]) == hash_of([2, 1], [3]) == hash_of([2, 1], [3, 1])
    assert len({hash_of([1, 2], [3]), hash_of([1, 2, 3]), hash_of([1], [2, 3])}) == 3
