"""Two gloo ranks with uneven shares give what one process gives: value and every gradient.

Oracle: the same code in one process on all pairs, in float64. The ranks are spawned once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from mlip.losses import LOSSES
from mlip.losses.held_out import recall_terms
from mlip.objective import Objective
from tests.losses.loss_inputs import (
    DIM,
    LEAVES,
    PAIRS,
    FakeModel,
    FakeScales,
    config_of,
    context_of,
    make_batch,
    make_leaves,
    rows_of,
    with_grad,
)
from tests.spawned_ranks import start_ranks

CASES = {
    "global_contrastive": [],
    "global_dropout": ["model.divergence.kind=dropout"],
    "local_alignment": [],
    "local_mgca": ["loss.local_alignment.kind=mgca"],
    "category": [],
    "category_plain": ["loss.category.knowledge_terms=false"],
    "matching": [],
    "swapping": ["loss.swapping.probability=1.0", "loss.swapping.margin=2.0"],
}
OBJECTIVES: dict[str, list[str]] = {
    "whole": [],
    "cached": ["batch.micro_images=2", "batch.micro_texts=3", "model.vision.norm=group"],
}


def _loss_name(case: str) -> str:
    if case in LOSSES:
        return case
    return next(name for name in LOSSES if name.split("_")[0] == case.split("_")[0])


def _shake(module: nn.Module) -> None:
    """Away from zero initial values, behind which gradients would be 0."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))


def _gradients(module: nn.Module, prefix: str) -> dict[str, Tensor]:
    return {
        f"{prefix}{name}": torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in module.named_parameters()
    }


def _run_loss(case: str, rows: slice) -> dict[str, Any]:
    """Two steps, so that the category queue has content at the second; the second is reported."""
    torch.manual_seed(0)
    loss = LOSSES[_loss_name(case)](config_of(*CASES[case]), DIM).double()
    _shake(loss)
    scales = FakeScales().double()
    batch = rows_of(make_batch(), rows)
    values = []
    for step in range(2):
        leaves = with_grad({n: v[rows] for n, v in make_leaves(step).items()})
        loss.zero_grad()
        scales.zero_grad()
        context = context_of(leaves, batch, scales, step=step)
        value = loss(context)
        total = value + sum(context.regularisers.values())
        total.backward()
        values.append(value.detach())
        values += [v.detach() for v in context.regularisers.values()]
    inputs = {
        n: torch.zeros_like(leaves[n]) if leaves[n].grad is None else leaves[n].grad for n in LEAVES
    }
    buffers = dict(loss.named_buffers())
    parameters = {**_gradients(loss, "loss."), **_gradients(scales, "scales.")}
    return {"values": values, "inputs": inputs, "parameters": parameters, "buffers": buffers}


def _run_objective(name: str, rows: slice) -> dict[str, Any]:
    torch.manual_seed(0)
    objective = Objective(config_of(*OBJECTIVES[name]), FakeModel()).double()
    _shake(objective.losses)
    batch = rows_of(make_batch(), rows)
    doubled = {**vars(batch), "image": batch.image.double()}
    if len(batch) < PAIRS:
        # a rank pads to its own longest report and longest list of mentions
        wider = ("token_ids", "token_mask", "content_mask")
        if rows.start > 0:
            wider = ("entity_ids", "entity_state", "entity_mask")
        doubled |= {name: F.pad(doubled[name], (0, 2)) for name in wider}
    total, terms = objective(type(batch)(**doubled), step=4, progress=1.5)
    total.backward()
    parameters = _gradients(objective, "")
    values = [total.detach(), *terms.values()]
    with torch.no_grad():  # as a checkpoint is scored on val
        held_out = type(batch)(**doubled)
        total, terms = objective.eval()(held_out, step=0, progress=0.0, held_out=True)
        context = objective.context(held_out, step=0, progress=0.0)
        values += [total, *terms.values(), *recall_terms(context, at=1).values()]
    return {"values": values, "inputs": {}, "parameters": parameters, "buffers": {}}


def _run_all(rows: slice) -> dict[str, Any]:
    results = {case: _run_loss(case, rows) for case in CASES}
    return results | {name: _run_objective(name, rows) for name in OBJECTIVES}


def _work(rank: int, folder: Path) -> None:
    # not cut before the empty report: nobody draws it, so nothing would show who owns it
    torch.save(_run_all(slice(0, 5) if rank == 0 else slice(5, 9)), folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Any], Any]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    finish = start_ranks(_work, folder)
    whole = _run_all(slice(0, 9))
    finish()
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)], whole


def _close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


def test_every_loss_has_a_case() -> None:
    assert {_loss_name(case) for case in CASES} == set(LOSSES)


@pytest.mark.parametrize("case", [*CASES, *OBJECTIVES])
def test_two_ranks_give_the_value_of_one_process(case: str, results: Any) -> None:
    parts, whole = results
    assert float(whole[case]["values"][0]) > 0.0
    for part in parts:
        for actual, expected in zip(part[case]["values"], whole[case]["values"], strict=True):
            _close(actual, expected)


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_give_the_input_gradients_of_one_process(case: str, results: Any) -> None:
    # every rank runs backward on the global value, so an input's gradient arrives twice
    parts, whole = results
    assert any(bool(g.abs().max() > 1e-6) for g in whole[case]["inputs"].values())
    for name, expected in whole[case]["inputs"].items():
        _close(torch.cat([part[case]["inputs"][name] for part in parts]) / 2, expected)


@pytest.mark.parametrize("case", [*CASES, *OBJECTIVES])
def test_parameter_gradients_averaged_over_ranks_are_those_of_one_process(
    case: str, results: Any
) -> None:
    parts, whole = results
    for name, expected in whole[case]["parameters"].items():
        first, second = (part[case]["parameters"][name] for part in parts)
        _close((first + second) / 2, expected)


def test_micro_batches_give_the_objective_of_the_whole_batch(results: Any) -> None:
    _, whole = results
    for key in ("values", "parameters"):
        torch.testing.assert_close(whole["cached"][key], whole["whole"][key], rtol=1e-9, atol=1e-11)


def test_every_parameter_of_the_objective_gets_a_gradient(results: Any) -> None:
    _, whole = results
    assert [n for n, g in whole["whole"]["parameters"].items() if not bool(g.any())] == []


@pytest.mark.parametrize("case", ["category", "category_plain"])
def test_the_queue_is_the_same_on_every_rank(case: str, results: Any) -> None:
    parts, whole = results
    assert int(whole[case]["buffers"]["queue_valid"][0].sum()) == 18
    for part in parts:
        for name, expected in whole[case]["buffers"].items():
            assert torch.equal(part[case]["buffers"][name], expected), name
