"""Draws by block are keyed_uniform's own numbers, whatever was asked for before."""

import numpy as np
import torch

from mlip.dataloading.keyed_draws import keyed_draws
from mlip.keyed_random import keyed_uniform


def test_any_positions_of_any_epochs_get_the_numbers_of_their_key() -> None:
    rng = np.random.default_rng(0)
    for trial in range(40):
        count = int(rng.integers(0, 70))
        # both ends of blocks, far positions, mixed epochs, in no order
        index = rng.integers(0, 5_000_000_000 if trial % 2 else 2_100, count)
        epoch = rng.integers(0, 3, count)
        draws = keyed_draws(trial % 3, "augment", epoch, index, 5)
        assert draws.shape == (count, 5)
        for i in range(count):
            one = keyed_uniform(
                trial % 3, "augment", int(epoch[i]), torch.from_numpy(index[i : i + 1]), 5
            )
            assert (draws[i] == one[0].numpy()).all()


def test_what_a_caller_writes_does_not_reach_the_next() -> None:
    epoch, index = np.zeros(4, np.int64), np.arange(4)
    first = keyed_draws(1, "sentences", epoch, index, 2)
    copy = first.copy()
    first[:] = -1.0
    assert (keyed_draws(1, "sentences", epoch, index, 2) == copy).all()
