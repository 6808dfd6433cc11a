"""What each of 2 ranks does: every ZeRO stage with and without the cache, in one process each.

Writes, on rank 0, losses and gradient norms per case to the file named first, and raises where a
state does not come back bit for bit. The test that starts it compares with one process.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mlip.ranks import distributed, process_group
from mlip.training import faults, randomness
from mlip.training.ema import EMAState
from mlip.training.engine import build_engine
from mlip.training.optimizer import MOMENTS
from mlip.training.step import Engine, TrainingState
from tests.training.toy_run import ToyObjective, make_batch, make_validation, toy_config

STEPS, MORE, DECAY = 5, 3, 0.9
CASES = (  # engine, ZeRO stage, rows of a micro-batch, offload
    ("plain", 0, 0, False),
    ("plain", 0, 2, False),
    ("deepspeed", 0, 2, False),
    ("deepspeed", 1, 0, False),
    ("deepspeed", 1, 2, False),
    ("deepspeed", 2, 2, False),
    ("deepspeed", 2, 0, True),
    ("deepspeed", 3, 0, False),
    ("deepspeed", 3, 2, False),
    ("deepspeed", 3, 2, True),
)

events: list[Path] = []  # the folder of this rank's events, once it is known


def build(engine: str, stage: int, micro: int, offload: bool, *, seed: int = 1) -> Engine:
    config = toy_config(
        f"train.engine={engine}",
        f"train.zero_stage={stage}",
        f"train.offload={str(offload).lower()}",
        f"batch.micro_images={micro}",
        f"batch.micro_texts={micro}",
        f"run.dir={events[0] if events else '.'}",
        f"train.ema_decay={DECAY}",
        "model.vision.norm=group",  # batch statistics are refused beside a cache
    )
    randomness.seed_everything(seed)
    return build_engine(ToyObjective(config), config)


def step(engine: Engine, number: int) -> Any:
    lr = 0.01 / (1 + number)
    return engine.start_step(make_batch(number, 8), step=number, progress=0.0, lr=lr).result()


def copy_of(state: TrainingState) -> TrainingState:
    def own(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in tensors.items()}

    return TrainingState(
        own(state.parameters),
        {key: own(state.moments[key]) for key in MOMENTS},
        own(state.buffers),
        state.optimizer_steps,
        state.ema and EMAState(own(state.ema.parameters), state.ema.updates),
    )


def require_equal(left: TrainingState, right: TrainingState, case: object) -> None:
    assert left.optimizer_steps == right.optimizer_steps, case
    groups = [(left.parameters, right.parameters), (left.buffers, right.buffers)]
    groups += [(left.moments[key], right.moments[key]) for key in MOMENTS]
    assert left.ema is not None and right.ema is not None and left.ema.updates == right.ema.updates
    groups.append((left.ema.parameters, right.ema.parameters))
    for a, b in groups:
        assert a.keys() == b.keys(), case
        for name in a:
            assert torch.equal(a[name].cpu(), b[name].cpu()), (case, name)


def require_refused(engine: Engine, state: TrainingState) -> None:
    """A state with one tensor of another shape, as settings that differ would have; by name."""
    for group, name in (("parameters", "model.patch_head.bias"), ("buffers", "queue")):
        whole = getattr(state, group)
        change: dict[str, Any] = {group: {**whole, name: whole[name][:-1]}}
        wrong = replace(state, **change)
        try:
            engine.load(wrong)
        except ValueError as error:
            assert str(error).startswith(f"{name}: expected ["), error
        else:
            raise AssertionError((engine.name, name, "was taken"))


def held_out_scores(engine: Engine) -> dict[str, float]:
    config = toy_config("train.monitor=loss")
    validation = make_validation(config)
    assert validation is not None
    return validation._scores(engine)


def averaged_scores(engine: Engine) -> dict[str, float]:
    """What Validation finds where evaluate.weights=ema asks for the average."""
    with engine.averaged():
        return held_out_scores(engine)


def run_case(*case: Any) -> dict[str, Any]:
    engine = build(*case)
    results = [step(engine, number) for number in range(STEPS)]
    state = copy_of(engine.state())
    held_out = held_out_scores(engine)
    average = averaged_scores(engine)
    require_equal(state, copy_of(engine.state()), case)
    on = [step(engine, number).total for number in range(STEPS, STEPS + MORE)]
    other = build(*case, seed=99)
    require_refused(other, state)
    other.load(state)
    require_equal(state, other.state(), case)
    assert held_out_scores(other) == held_out, case
    resumed = [step(other, number).total for number in range(STEPS, STEPS + MORE)]
    assert on == resumed, (case, on, resumed)
    engine.load(state)  # of an engine that has made steps since
    require_equal(state, engine.state(), case)
    before = copy_of(other.state())
    for phase in ("forward", "backward"):  # the loss, then the gradients, of the last rank only
        faults._fired.clear()
        os.environ["FAULT"] = f"nan@{distributed.world_size() - 1}:50:{phase}"
        spoiled = other.start_step(make_batch(50, 8), step=50, progress=0.0, lr=0.01).result()
        assert spoiled.is_skipped and spoiled.grad_norm != spoiled.grad_norm, (case, phase)
        assert bool(spoiled.bad_terms()) == (phase == "forward" and distributed.rank() == 1)
    del os.environ["FAULT"]
    require_equal(before, copy_of(other.state()), case)  # buffers too: the queue saw the batch
    assert not step(other, 51).is_skipped, case
    return {
        "engine": other.name,
        "losses": [r.total for r in results] + on,
        "held_out": held_out,
        "average": average,
        "grad_norms": [r.grad_norm for r in results],
        "parameters": {n: t.flatten().tolist() for n, t in state.parameters.items()},
        "ema": {n: t.flatten().tolist() for n, t in state.ema.parameters.items()},
        "scale": float(state.parameters["model.scales.stored.log_scale"]),
    }


def run_all(out: str) -> None:
    """Every case, one after another; rank 0 writes what it found."""
    events.append(Path(f"{out}-events"))
    events[0].mkdir(exist_ok=True)
    process_group.start(60.0)
    found = {"/".join(map(str, case)): run_case(*case) for case in CASES}
    if distributed.is_main():
        Path(out).write_text(json.dumps(found), encoding="utf-8")
    distributed.barrier()
