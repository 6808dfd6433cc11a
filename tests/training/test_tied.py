"""A tensor that both towers share: saved once, loaded into both, trained as one, at every stage.

Oracle: the plain engine, where torch's own autograd adds up both uses.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from mlip.ranks import distributed, process_group
from mlip.settings.config import to_dict
from mlip.training import checkpoint, randomness
from mlip.training.engine import build_engine
from mlip.training.step import Engine
from tests import rank_farm
from tests.training.toy_run import DIM, ToyObjective, make_batch, toy_config

SHARED, OTHER = "model.patch_head.weight", "model.frozen.weight"
BEFORE, AFTER = 2, 3


def _engine(engine: str, stage: int, seed: int) -> Engine:
    config = toy_config(f"train.engine={engine}", f"train.zero_stage={stage}", "run.dir=.")
    randomness.seed_everything(seed)
    objective = ToyObjective(config)
    objective.model.frozen = nn.Linear(DIM, DIM)  # the text's side, here trained
    objective.model.frozen.weight = objective.model.patch_head.weight
    return build_engine(objective, config)


def _losses(engine: Engine, first: int, count: int) -> list[float]:
    return [
        engine.start_step(make_batch(step, 8), step=step, progress=0.0, lr=0.01).result().total
        for step in range(first, first + count)
    ]


def run_all(folder: str) -> None:
    """Train, save, load into another engine and go on; rank 0 writes the losses of both."""
    process_group.start(60.0)
    found = {}
    for case in (("plain", 0), *(("deepspeed", stage) for stage in range(4))):
        place = Path(folder) / "-".join(map(str, case))
        engine = _engine(*case, seed=1)
        before = _losses(engine, 0, BEFORE)
        state = {"format": checkpoint.FORMAT, "step": BEFORE, "config": to_dict(engine.config)}
        saved = checkpoint.save(place, engine.state(everywhere=False), state, keep=1)
        other = _engine(*case, seed=99)
        other.load(checkpoint.read(saved).training)
        tied = [other.objective.get_submodule(n.removesuffix(".weight")) for n in (SHARED, OTHER)]
        assert tied[0].weight is tied[1].weight, case
        on, resumed = (_losses(e, BEFORE, AFTER) for e in (engine, other))
        assert on == resumed, (case, on, resumed)
        found[place.name] = before + on
    if distributed.is_main():
        (Path(folder) / "losses.json").write_text(json.dumps(found))
    distributed.barrier()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("tied")
    rank_farm.run(run_all, 2, str(made))
    return made


def test_a_shared_tensor_is_trained_as_one_at_every_zero_stage(folder):
    losses = json.loads((folder / "losses.json").read_text())
    assert len(losses) == 5
    for case, found in losses.items():
        assert found == pytest.approx(losses["plain-0"], rel=1e-5), case


def test_a_shared_tensor_is_written_once_with_the_same_values_at_every_stage(folder):
    read = {}
    for place in folder.glob("*-*"):
        (saved,) = checkpoint.checkpoints_of(place)
        with safe_open(saved / "parameters.safetensors", "pt") as file:
            assert SHARED in file.keys() and OTHER not in file.keys()
            read[place.name] = file.get_tensor(SHARED)
    for case, found in read.items():
        torch.testing.assert_close(found, read["plain-0"], rtol=1e-5, atol=1e-6, msg=case)
