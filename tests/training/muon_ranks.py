"""What each rank does in Muon's test: steps, a state, and the same steps again from that state."""

from __future__ import annotations

from typing import Any

import torch

from mlip.ranks import distributed, process_group
from mlip.training.step import Engine
from tests.training.exact_step import exact_engine, make_batch

PAIRS, STEPS, MORE = 8, 3, 2
MUON = ("train.optimizer=muon", "train.zero_stage=0", "train.lr=0.01")


def muon_engine(engine: str) -> Engine:
    return exact_engine(PAIRS, engine=engine, passes=2, more=MUON)


def train(engine: Engine, first: int, steps: int) -> list[float]:
    return [
        engine.start_step(make_batch(n, PAIRS), step=n, progress=1.5, lr=0.01).result().total
        for n in range(first, first + steps)
    ]


def run_engines(out: str) -> None:
    """Losses and parameters of both engines; raises where a resumed run differs by a bit."""
    process_group.start(60.0)
    found: dict[str, Any] = {}
    for name in ("plain", "deepspeed"):
        engine = muon_engine(name)
        losses = train(engine, 0, STEPS)
        state = engine.state()
        kept = {
            "parameters": {n: t.clone() for n, t in state.parameters.items()},
            "exp_avg": {n: t.clone() for n, t in state.moments["exp_avg"].items()},
            "exp_avg_sq": {n: t.clone() for n, t in state.moments["exp_avg_sq"].items()},
        }
        other = muon_engine(name)
        train(other, 7, 1)  # has moments of its own, and a queue that it must forget
        other.load(state)
        on, resumed = train(engine, STEPS, MORE), train(other, STEPS, MORE)
        assert on == resumed, (name, on, resumed)
        found[name] = {"losses": losses + on, **kept}
    if distributed.is_main():
        torch.save(found, out)
    distributed.barrier()
