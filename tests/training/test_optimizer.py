"""What the optimiser is given, and the mode that a step is made in."""

from __future__ import annotations

import pytest
import torch

from mlip.training.muon import Muon, matrix_names
from mlip.training.optimizer import build_optimizer
from mlip.training.schedule import undecayed_names
from tests.training.exact_step import (
    PROGRESS,
    exact_config,
    exact_engine,
    make_batch,
    make_objective,
)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_each_trainable_parameter_is_moved_once_and_as_the_settings_say(kind: str) -> None:
    settings = (
        "train.lr=0.25",
        "train.weight_decay=0.3",
        "train.betas=[0.7,0.8]",
        "train.momentum=0.6",
    )
    config = exact_config(f"train.optimizer={kind}", "train.zero_stage=0", *settings)
    objective = make_objective(config)
    frozen = "model.image_head.first.weight"
    objective.get_parameter(frozen).requires_grad_(False)
    optimizer = build_optimizer(objective, config)
    names = {id(parameter): name for name, parameter in objective.named_parameters()}
    found = [
        (names[id(parameter)], group["weight_decay"], group.get("is_matrix", False))
        for group in optimizer.param_groups
        for parameter in group["params"]
    ]
    matrices = matrix_names(objective) if kind == "muon" else set()
    undecayed = undecayed_names(objective)
    assert sorted(found) == [
        (name, 0.0 if name in undecayed else 0.3, name in matrices)
        for name in sorted(set(names.values()) - {frozen})
    ]
    assert {(g["lr"], tuple(g["betas"])) for g in optimizer.param_groups} == {(0.25, (0.7, 0.8))}
    assert not isinstance(optimizer, Muon) or optimizer.momentum == 0.6
    assert isinstance(optimizer, Muon) == (kind == "muon")


def test_a_step_is_made_in_training_mode_whatever_mode_a_tower_came_in() -> None:
    # transformers gives pretrained towers in evaluation mode: nothing in them would drop
    engine = exact_engine(8)
    engine.objective.eval()
    engine.start_step(make_batch(0, 8), step=0, progress=PROGRESS, lr=0.0).result()
    assert all(module.training for module in engine.objective.modules())


@torch.no_grad()
def test_an_average_that_is_switched_on_at_a_resume_starts_from_the_resumed_weights() -> None:
    before, after = exact_engine(8), exact_engine(8, more=("train.ema_decay=0.9", "run.seed=2"))
    state = before.state()
    after.load(state)
    average = after.state().ema
    assert average is not None and average.updates == 0
    for name, tensor in average.parameters.items():
        assert torch.equal(tensor, state.parameters[name]), name
