"""Any world size to any other, any ZeRO stage to any other (F09): state to the bit, losses to 1e-6.

Saved by 1, 2 and 4 ranks at stages 0 to 3; each of the twelve is loaded by 1, 2 and 4 ranks at
stages 0 to 3. What is compared: every tensor at load, and the next twenty losses with those of the
run that was not interrupted.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mlip.ranks import distributed, process_group
from mlip.settings.config import to_dict
from mlip.training import checkpoint, randomness
from mlip.training.engine import build_engine
from mlip.training.optimizer import MOMENTS
from mlip.training.step import Engine
from tests import rank_farm
from tests.training.toy_run import ToyObjective, make_batch, toy_config

pytestmark = pytest.mark.long
BEFORE, AFTER, STAGES = 6, 20, (0, 1, 2, 3)


def _engine(stage: int, seed: int) -> Engine:
    config = toy_config(
        "train.engine=deepspeed", f"train.zero_stage={stage}", "train.ema_decay=0.9", "run.dir=."
    )
    randomness.seed_everything(seed)
    return build_engine(ToyObjective(config), config)


def _losses(engine: Engine, first: int, count: int) -> list[float]:
    # a rate at which twenty steps do not magnify a rounding error
    return [
        engine.start_step(make_batch(step, 8), step=step, progress=0.0, lr=1e-3).result().total
        for step in range(first, first + count)
    ]


def save_all(folder: str, stages: tuple[int, ...]) -> None:
    """Train a little and save at each stage; rank 0 also keeps the losses that come next."""
    process_group.start(60.0)
    for stage in stages:
        engine = _engine(stage, seed=1)
        _losses(engine, 0, BEFORE)
        place = Path(folder) / f"world{distributed.world_size()}-stage{stage}"
        state = {"format": checkpoint.FORMAT, "step": BEFORE, "config": to_dict(engine.config)}
        checkpoint.save(place, engine.state(everywhere=False), state, keep=1)
        losses = _losses(engine, BEFORE, AFTER)
        if distributed.is_main():
            (place / "losses.json").write_text(json.dumps(losses))
    distributed.barrier()


def load_all(folder: str, worlds: tuple[int, ...], stages: tuple[int, ...]) -> None:
    """Load every save at every stage here; raise where a tensor differs, write the next losses."""
    process_group.start(60.0)
    for world, saved, stage in itertools.product(worlds, stages, stages):
        place = Path(folder) / f"world{world}-stage{saved}"
        (newest,) = checkpoint.checkpoints_of(place)
        wanted = checkpoint.read(newest).training
        engine = _engine(stage, seed=99)
        engine.load(wanted)
        got = engine.state()
        assert wanted.ema is not None and got.ema is not None
        assert got.optimizer_steps == wanted.optimizer_steps
        pairs = [(wanted.parameters, got.parameters), (wanted.buffers, got.buffers)]
        pairs += [(wanted.moments[k], got.moments[k]) for k in MOMENTS]
        pairs.append((wanted.ema.parameters, got.ema.parameters))
        for left, right in pairs:
            assert left.keys() == right.keys()
            for name, tensor in left.items():
                assert torch.equal(tensor, right[name].cpu()), (world, saved, stage, name)
        losses = _losses(engine, BEFORE, AFTER)
        if distributed.is_main():
            out = place / f"to-world{distributed.world_size()}-stage{stage}.json"
            out.write_text(json.dumps(losses))
    distributed.barrier()


def check(folder: Path, worlds: tuple[int, ...], stages: tuple[int, ...]) -> dict[str, Any]:
    """The number of transitions and the largest relative difference of a loss."""
    worst, count = 0.0, 0
    for world, saved in itertools.product(worlds, stages):
        place = folder / f"world{world}-stage{saved}"
        oracle = json.loads((place / "losses.json").read_text())
        for path in place.glob("to-*.json"):
            found = json.loads(path.read_text())
            error = max(abs(a - b) / abs(b) for a, b in zip(found, oracle, strict=True))
            assert error <= 1e-6, (place.name, path.name, error)
            worst, count = max(worst, error), count + 1
            if path.stem == f"to-{place.name}":
                assert found == oracle  # the same world and stage: the same bits
    return {"transitions": count, "loss_error": worst}


def test_every_world_and_stage_resumes_every_other(tmp_path, record_property):
    worlds = (1, 2, 4)
    for world in worlds:
        rank_farm.run(save_all, world, str(tmp_path), STAGES, timeout_s=600)
    for world in worlds:
        rank_farm.run(load_all, world, str(tmp_path), worlds, STAGES, timeout_s=1200)
    for name, value in check(tmp_path, worlds, STAGES).items():
        record_property(name, value)


def test_two_ranks_resume_one_and_one_resumes_two(tmp_path):
    # the small form of the above
    for world in (1, 2):
        rank_farm.run(save_all, world, str(tmp_path), (0, 3))
    for world in (1, 2):
        rank_farm.run(load_all, world, str(tmp_path), (1, 2), (0, 3))
    assert check(tmp_path, (1, 2), (0, 3))["transitions"] == 16
