"""Resume at any point gives the exact sequence of ids and pixels, whatever the workers or ranks.

Oracle: one uninterrupted run of a single process. Sequences are compared in order, never as sets.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

import pytest

from mlip.batch import Batch
from mlip.dataloading.loader import Loader, build_loader, merge_states
from mlip.dataloading.manifest import load_manifest
from mlip.settings.config import Config

STEPS = 100
Visit = tuple[int, int, str]  # global index, manifest row, digest of pixels and tokens


def visits(batch: Batch) -> list[Visit]:
    return [
        (
            int(batch.global_index[i]),
            int(batch.row_index[i]),
            hashlib.sha256(
                batch.image[i].numpy().tobytes()
                + batch.token_ids[i][batch.token_mask[i]].numpy().tobytes()
            ).hexdigest()[:16],
        )
        for i in range(len(batch))
    ]


class Ranks:
    """The loaders of all ranks of one run, stepped together."""

    def __init__(self, make: Callable[..., Loader], world_size: int) -> None:
        self.loaders = [make(rank=r, world_size=world_size) for r in range(world_size)]

    def step(self) -> list[Visit]:
        return [visit for loader in self.loaders for visit in visits(next(loader))]

    def state(self) -> str:
        return json.dumps(merge_states([loader.state_dict() for loader in self.loaders]))

    def resume(self, state: str) -> None:
        for loader in self.loaders:
            loader.load_state_dict(json.loads(state))

    def close(self) -> None:
        for loader in self.loaders:
            loader.close()


@pytest.fixture
def maker(corpus: Callable[..., Config], tokenizer: Any, linker: Any, concepts: Any) -> Any:
    """maker(workers, pipeline) -> a function that builds one rank's loader."""

    def make(workers: int, pipeline: str = "torch") -> Callable[..., Loader]:
        config = corpus(f"data.workers={workers}", f"data.pipeline={pipeline}")
        manifest = load_manifest(config.data)
        parts = {"tokenizer": tokenizer, "linker": linker, "table": concepts}

        def build(**kw: Any) -> Loader:
            return build_loader(config, manifest, split="train", train=True, **parts, **kw)

        return build

    return make


def check(maker: Any, points: list[int], workers: int, world_size: int, pipeline: str) -> None:
    """Stop at each point, throw everything away but the state, and go on for three steps.

    The point after the last of those steps is a point of its own, so nothing is left out.
    """
    single = Ranks(maker(1, pipeline), 1)
    straight = [single.step() for _ in range(max(points) + 4)]
    single.close()
    running = Ranks(maker(workers, pipeline), world_size)
    resumed = Ranks(maker(workers, pipeline), world_size)
    for step in range(max(points) + 1):
        if step in points:
            resumed.resume(running.state())
            for later in range(step, step + 3):
                assert resumed.step() == straight[later], (step, later)
        assert running.step() == straight[step]
    running.close()
    resumed.close()


@pytest.mark.parametrize("workers, world_size", [(0, 1), (2, 2)])
def test_resume_at_ten_points_gives_the_exact_sequence(
    maker: Any, workers: int, world_size: int
) -> None:
    check(maker, [0, 1, 2, 3, 7, 8, 13, 16, 29, 41], workers, world_size, "torch")


@pytest.mark.long
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("workers", [0, 1, 2, 4])
def test_resume_at_a_hundred_points_gives_the_exact_sequence(
    maker: Any, workers: int, world_size: int
) -> None:
    check(maker, list(range(STEPS)), workers, world_size, "torch")


@pytest.mark.long
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("workers", [0, 1, 2, 4])
def test_dali_resumes_at_a_hundred_points(maker: Any, workers: int, world_size: int) -> None:
    pytest.importorskip("nvidia.dali", reason="nvidia.dali is not installed")
    check(maker, list(range(STEPS)), workers, world_size, "dali")


def test_a_sequence_that_skips_or_repeats_is_seen(maker: Any) -> None:
    """The check itself fails on a state that is one step off: it compares order, not sets."""
    running = Ranks(maker(1), 1)
    straight = [running.step() for _ in range(6)]
    state = json.loads(running.state())
    state["step"] = 3
    running.resume(json.dumps(state))
    assert running.step() == straight[3] != straight[4]
    assert [visit[0] for visit in straight[3]] == list(range(18, 24))
    running.close()
