"""The whole-step benchmark at its tiny sizes, for tests."""

from __future__ import annotations

import dataclasses
import time
from functools import cache
from typing import Any

from benchmarks.bench_step import Bench
from benchmarks.step_batch import made_batch
from mlip.batch import Batch


def bench_on(device: str = "cpu") -> Bench:
    return Bench(device, deadline=time.monotonic() + 3600)


@cache
def shared_bench() -> Bench:
    """One engine for the tests that measure; nobody may read its rows."""
    return bench_on()


def objective_of(attention: str = "eager") -> tuple[Any, Batch]:
    """The tiny model in float32, with products that the counter sees, and a batch."""
    bench = bench_on()
    objective = bench.engine.objective.float()
    fp32 = dataclasses.replace(
        bench.config, train=dataclasses.replace(bench.config.train, precision="fp32")
    )
    objective.config = objective.model.config = fp32
    for tower in (objective.model.text, objective.model.vision.tower):
        tower.backbone.config._attn_implementation = f"mlip_{attention}"
    batch = made_batch(fp32, 6, vocab_size=bench.vocab_size, concepts=bench.concepts)
    return objective, batch
