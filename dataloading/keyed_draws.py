"""Uniform numbers by (seed, stream, epoch, position), drawn a block of positions at a time.

A block is one row of small tensor operations whatever its length: drawn batch by batch they had
cost 9 us an image.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from numpy.typing import NDArray

from mlip.keyed_random import keyed_uniform

_POSITIONS = 1024  # of one block; a rank may use a small part of it


def keyed_draws(
    seed: int, stream: str, epoch: NDArray[np.int64], index: NDArray[np.int64], width: int
) -> NDArray[np.float64]:
    """keyed_uniform of each position in its epoch.

    Shapes:  epoch, index [B] -> [B, width]
    """
    draws = np.empty((len(index), width))
    block, place = np.divmod(index, _POSITIONS)
    # as a rule one pair
    for one, number in sorted(set(zip(epoch.tolist(), block.tolist(), strict=True))):
        here = (epoch == one) & (block == number)
        draws[here] = _block(seed, stream, one, number, width)[place[here]]
    return draws


@functools.lru_cache(maxsize=16)
def _block(seed: int, stream: str, epoch: int, number: int, width: int) -> NDArray[np.float64]:
    index = torch.arange(number * _POSITIONS, (number + 1) * _POSITIONS, dtype=torch.int64)
    draws = keyed_uniform(seed, stream, epoch, index, width).numpy()
    draws.flags.writeable = False
    return draws
