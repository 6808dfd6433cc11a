"""Seeds, thread counts and the state of every random generator that has one.

Most of the randomness of a run is keyed (mlip/keyed_random.py) and needs no state; dropout and
stochastic depth use torch's generators, which a checkpoint therefore holds for each rank.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from mlip.ranks import distributed
from mlip.settings.config import Config
from mlip.system.machine import usable_cores

_RANK_STRIDE = 1_000_003  # a prime: seeds of ranks stay apart for neighbouring run.seed


def seed_everything(seed: int) -> None:
    """The same seed for Python, NumPy and torch: models are built alike on every rank."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def seed_rank(seed: int, step: int = 0) -> None:
    """Different dropout on every rank, after the model was built alike."""
    torch.manual_seed(seed + _RANK_STRIDE * (distributed.rank() + 1) + 7919 * step)


def set_threads(config: Config, pinned: int | None = None) -> int:
    """torch threads of this rank: run.threads, else what a checkpoint pinned, else an even share.

    A sum over a million numbers differs between 1 and 2 threads, so a resumed run keeps its count.
    It is that of the rank with fewest: a node with more cores, or fewer ranks, takes no more. A
    collective call.
    """
    share = max(1, usable_cores() // distributed.local_ranks())
    share = -distributed.max_of_numbers([-share])[0]
    threads = config.run.threads or pinned or share
    torch.set_num_threads(threads)
    return threads


def use_all_cores() -> None:
    """For what one rank does alone once the others are done."""
    torch.set_num_threads(usable_cores())


def capture() -> dict[str, Any]:
    """This rank's generators as JSON values."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    state: dict[str, Any] = {
        "python": [version, list(internal), gauss],
        "numpy": [name, np.asarray(keys).tolist(), position, has_gauss, cached],
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state().numpy().tobytes().hex()
    return state


def restore(states: Sequence[Mapping[str, Any]], *, seed: int, step: int) -> None:
    """This rank's saved generators; seeds of its own where there were more or fewer ranks.

    Raises:  TypeError, KeyError, IndexError or OverflowError where they are not what was saved
    """
    if distributed.world_size() != len(states):
        seed_rank(seed, step)
        return
    try:
        _set(states[distributed.rank()])
    except (ValueError, RuntimeError) as error:  # of torch, for a state of another length
        raise TypeError(f"rng: {error}") from error


def _set(state: Mapping[str, Any]) -> None:
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(_bytes(state["torch"]))
    if torch.cuda.is_available() and "cuda" in state:
        torch.cuda.set_rng_state(_bytes(state["cuda"]))


def _bytes(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
