"""Generators that come back, seeds that differ by rank, and the thread count that a run keeps."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from mlip.ranks import distributed
from mlip.settings.config import load
from mlip.training import randomness


@pytest.fixture(autouse=True)
def _leave_the_process_as_it_was() -> Iterator[None]:
    threads, state = torch.get_num_threads(), randomness.capture()
    yield
    torch.set_num_threads(threads)
    randomness.restore([state], seed=0, step=0)


def _draws() -> tuple[float, ...]:
    return (random.random(), random.gauss(0.0, 1.0), float(np.random.rand()),
            float(np.random.standard_normal()), float(torch.rand(())))  # fmt: skip


def test_every_generator_goes_on_from_where_it_was_saved() -> None:
    randomness.seed_everything(3)
    first = _draws()  # which leaves half a pair of normal numbers behind
    saved = json.loads(json.dumps(randomness.capture()))
    then = _draws()
    randomness.restore([saved], seed=1, step=9)
    assert _draws() == then
    randomness.seed_everything(3)
    assert _draws() == first
    randomness.seed_everything(4)
    assert not set(_draws()) & set(first)


def test_ranks_and_the_steps_of_a_resume_have_seeds_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    saved = [randomness.capture()] * 2
    seeds = []
    for rank in range(3):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(distributed, "world_size", lambda: 3)
        for seed in (1, 2):
            for step in (0, 1, 500):
                # of a run of two ranks: its dropout would be the same on those that were there
                randomness.restore(saved, seed=seed, step=step)
                seeds.append(torch.initial_seed())
    assert len(set(seeds)) == len(seeds)


def test_a_resumed_run_keeps_its_threads_unless_the_settings_say_otherwise() -> None:
    # a sum over many numbers differs between thread counts
    assert randomness.set_threads(load([], []), pinned=3) == torch.get_num_threads() == 3
    assert randomness.set_threads(load([], ["run.threads=2"]), pinned=3) == 2
    assert torch.get_num_threads() == 2
