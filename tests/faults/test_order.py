"""The order of samples after a resume at each of 100 batches, for four worker counts (F10).

Oracle: the uninterrupted run. Compared: the exact sequence of rows and positions of the next two
batches, and their pixels (which hold the augmentation's draws).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import pytest
import torch

from mlip.assembly import Corpus, open_loader
from mlip.dataloading.loader import merge_states
from mlip.settings.config import load
from tests.small_run import small_run

pytestmark = pytest.mark.long
BATCHES, AHEAD = 100, 2


def _loader(workers: int, rank: int = 0, world: int = 1) -> Any:
    run = small_run()
    config = load([], [*run.settings, f"data.workers={workers}", "batch.global_pairs=4"])
    return open_loader(
        config,
        Corpus(run.manifest, run.tokenizer, run.table, run.linker),
        rank=rank,
        world_size=world,
    )


@pytest.fixture(scope="module")
def whole() -> Iterator[tuple[list[Any], list[dict[str, Any]]]]:
    """102 batches of one worker, and the state after each."""
    loader = _loader(1)
    batches, states = [], []
    for batch in islice(loader, BATCHES + AHEAD):
        batches.append(batch)
        states.append(merge_states([loader.state_dict()]))
    loader.close()
    yield batches, states


@pytest.mark.parametrize("workers", [1, 2, 3, 4])
def test_every_point_goes_on_with_the_exact_sequence(workers, whole, record_property):
    batches, states = whole
    for point in range(BATCHES):
        loader = _loader(workers)
        loader.load_state_dict(states[point])
        for found, expected in zip(islice(loader, AHEAD), batches[point + 1 :], strict=False):
            assert found.row_index.tolist() == expected.row_index.tolist(), point
            assert found.global_index.tolist() == expected.global_index.tolist(), point
            assert torch.equal(found.image, expected.image), point
            assert torch.equal(found.token_ids, expected.token_ids), point
        loader.close()
    record_property("points", BATCHES)


@pytest.mark.parametrize("world", [2, 4])
def test_more_ranks_go_on_with_the_same_global_sequence(world, whole, record_property):
    batches, states = whole
    for point in range(0, BATCHES, 10):
        parts = []
        for rank in range(world):
            loader = _loader(1, rank, world)
            loader.load_state_dict(states[point])
            parts.append(next(iter(loader)).row_index)
            loader.close()
        assert torch.equal(torch.cat(parts), batches[point + 1].row_index), point
    record_property("points", BATCHES // 10)
