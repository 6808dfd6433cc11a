"""A step leaves nothing that waits for Python's collector of circles.

A circle from the objective to the step's context once kept images, patches and tokens (0.3 MB a
pair of a ViT-B/16 and a BERT): of one or two steps at any time, and with small towers, whose steps
make too few objects for the collector to come in time, of one step in fifty for good.
"""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from mlip.training.step import Engine
from tests.circles import tensors_in_circles
from tests.training.exact_step import PROGRESS, exact_engine, make_batch

WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "gradient cache": {"passes": 2},
    "recomputed": {"engine": "plain+checkpointing"},
    "spikes, average": {"more": ("train.spike_factor=3", "train.ema_decay=0.9")},
    "muon": {"more": ("train.optimizer=muon",)},
    "packed": {"more": ("model.text.packed=true", "model.attention=varlen")},
    "bf16": {"more": ("train.precision=bf16", "train.residual=bf16")},
    "dropout views": {"more": ("model.divergence.kind=dropout",)},
}


def _steps(engine: Engine) -> Callable[[], Any]:
    number = itertools.count()

    def step() -> None:
        step = next(number)
        engine.start_step(make_batch(step, 8), step=step, progress=PROGRESS, lr=0.01).result()

    return step


@pytest.mark.parametrize("way", WAYS)
def test_a_step_leaves_no_tensor_to_the_collector(way: str) -> None:
    assert tensors_in_circles(_steps(exact_engine(8, **WAYS[way]))) == []


def test_a_look_at_held_out_pairs_leaves_none_either() -> None:
    objective = exact_engine(8).objective.eval()

    @torch.no_grad()
    def look() -> None:
        objective(make_batch(0, 8), step=1, progress=PROGRESS, held_out=True)

    assert tensors_in_circles(look) == []


def test_the_search_sees_a_circle() -> None:
    def circle() -> None:
        held: list[Any] = [torch.zeros(3, 5)]
        held.append(held)

    assert tensors_in_circles(circle) == ["Tensor [3, 5]"]
    assert gc.isenabled() and not gc.get_debug() and not gc.garbage


def _cuda_bytes(step: Callable[[], Any]) -> int:
    step()
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


@pytest.mark.gpu
@pytest.mark.parametrize("passes", [1, 2])
def test_steps_add_nothing_to_a_gpu_s_memory_with_the_collector_off(passes: int) -> None:
    step = _steps(exact_engine(8, passes=passes))
    for _ in range(3):  # moments, caches of kernels
        step()
    gc.collect()
    gc.disable()
    try:
        held = [_cuda_bytes(step) for _ in range(5)]
    finally:
        gc.enable()
    assert held[1:] == held[:1] * 4, held
