"""Sample order as a pure function: the oracle is the definition, position by position."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mlip.dataloading.pipelines.sampler import (
    SequentialOrder,
    TrainingOrder,
    epoch_permutation,
    rank_slice,
)
from mlip.keyed_random import keyed_uniform

ROWS = np.array([3, 5, 8, 13, 21, 34, 55, 89, 144, 233])


def global_sequence(world_size: int, steps: int, global_pairs: int, seed: int = 5) -> list[int]:
    """Rows of all ranks, in rank order, step after step."""
    ranks = [
        TrainingOrder(ROWS, seed=seed, global_pairs=global_pairs, rank=r, world_size=world_size)
        for r in range(world_size)
    ]
    return [row for step in range(steps) for order in ranks for row in order.plan(step).rows]


@pytest.mark.parametrize("world_size", [2, 3, 4, 7])
def test_global_order_does_not_depend_on_world_size(world_size: int) -> None:
    assert global_sequence(world_size, 9, 7) == global_sequence(1, 9, 7)


def test_every_epoch_visits_every_row_once_although_batches_span_epochs() -> None:
    sequence = global_sequence(1, 10, 7)
    for epoch in range(7):
        assert sorted(sequence[epoch * 10 : (epoch + 1) * 10]) == ROWS.tolist()


def test_epochs_and_seeds_differ_in_order() -> None:
    orders = {tuple(epoch_permutation(seed, epoch, 50)) for seed in (1, 2) for epoch in range(3)}
    assert len(orders) == 6


def test_an_epoch_reads_the_rows_in_the_order_of_its_permutation_and_forgets_older_ones() -> None:
    order = TrainingOrder(ROWS, seed=5, global_pairs=7)
    read = [row for step in range(20) for row in order.plan(step).rows]
    for epoch in range(14):
        expected = ROWS[epoch_permutation(5, epoch, 10)].tolist()
        assert read[epoch * 10 : (epoch + 1) * 10] == expected
    assert len(order._permutations) <= 3  # each as long as the data set


def test_a_replacement_is_a_training_row_drawn_by_seed_epoch_and_position() -> None:
    # oracle: the definition; another number would change what a resumed run reads
    for seed, epoch, index in ((5, 0, 3), (5, 1, 3), (6, 0, 3), (5, 0, 4)):
        rows = TrainingOrder(ROWS, seed=seed, global_pairs=4).replacements(index, epoch, 8)
        draws = keyed_uniform(seed, "replacement", epoch, torch.tensor([index]), 8)[0]
        assert rows.tolist() == [ROWS[int(draw * 10)] for draw in draws]


def splitmix(x: int) -> int:
    """splitmix64's finaliser in Python integers."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
    return x ^ (x >> 31)


def test_order_is_the_argsort_of_splitmix_draws() -> None:
    # the definition in exact integers: a change breaks the resume of every saved run
    gamma, stream_of_order = 0x9E3779B97F4A7C15, 10
    for seed, epoch in ((1, 0), (7, 3)):
        word = seed
        for part in (stream_of_order, epoch):
            word = splitmix((word + (part + 1) * gamma) % 2**64)
        keys = [splitmix(((i + 1) * gamma + word) % 2**64) for i in range(30)]
        draws = [splitmix((key + gamma) % 2**64) >> 11 for key in keys]
        expected = sorted(range(30), key=draws.__getitem__)
        assert epoch_permutation(seed, epoch, 30).tolist() == expected


def test_positions_of_a_permutation_are_uniform() -> None:
    # chi-square of row 0's place over 2,000 epochs of 10 rows: 99.9 % point for 9 degrees is 27.9
    places = [int(np.argmax(epoch_permutation(3, epoch, 10) == 0)) for epoch in range(2000)]
    counts = np.bincount(places, minlength=10)
    assert ((counts - 200.0) ** 2 / 200.0).sum() < 27.9


def test_a_plan_does_not_depend_on_the_plans_before_it() -> None:
    forward = TrainingOrder(ROWS, seed=2, global_pairs=4)
    steps = [forward.plan(step) for step in range(12)]
    for step in (11, 0, 6, 3):
        fresh = TrainingOrder(ROWS, seed=2, global_pairs=4).plan(step)
        assert (fresh.rows == steps[step].rows).all()
        assert (fresh.epoch == steps[step].epoch).all()
        assert fresh.global_index.tolist() == list(range(step * 4, step * 4 + 4))


def test_a_batch_larger_than_the_data_set_spans_many_epochs() -> None:
    plan = TrainingOrder(ROWS[:3], seed=1, global_pairs=11).plan(1)
    assert plan.epoch.tolist() == [g // 3 for g in range(11, 22)]


@pytest.mark.parametrize("count, world_size", [(7, 3), (8, 4), (5, 5), (64, 7)])
def test_rank_slices_tile_the_batch_and_differ_by_at_most_one(count: int, world_size: int) -> None:
    parts = [rank_slice(count, rank, world_size) for rank in range(world_size)]
    assert [p[0] for p in parts] == [0, *[p[1] for p in parts[:-1]]]
    assert parts[-1][1] == count
    sizes = [b - a for a, b in parts]
    assert max(sizes) - min(sizes) <= 1


def test_evaluation_reads_rows_in_order_and_every_rank_steps_equally_often() -> None:
    ranks = [SequentialOrder(ROWS, global_pairs=4, rank=r, world_size=3) for r in range(3)]
    assert {order.num_steps for order in ranks} == {3}
    rows = [row for step in range(3) for order in ranks for row in order.plan(step).rows]
    assert rows == ROWS.tolist()


def test_impossible_orders_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one training row"):
        TrainingOrder(ROWS[:0], seed=1, global_pairs=4)
    with pytest.raises(ValueError, match="4 pairs for 5 ranks"):
        TrainingOrder(ROWS, seed=1, global_pairs=4, world_size=5)
