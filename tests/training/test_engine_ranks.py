"""Every ZeRO stage on two ranks, with and without the gradient cache, against one plain process."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from tests import rank_farm
from tests.training.toy_engines import (
    CASES,
    DECAY,
    MORE,
    STEPS,
    build,
    held_out_scores,
    run_all,
    step,
)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What toy_engines.py found on two gloo ranks; it checks save and load by itself."""
    out = tmp_path_factory.mktemp("ranks") / "found.json"
    # what an mpirun of one task a node leaves to the torchrun that it starts: DeepSpeed asserts
    # that it is each rank's own
    rank_farm.run(run_all, 2, str(out), environment={"OMPI_COMM_WORLD_LOCAL_RANK": "0"})
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """The oracle: one process, the whole batch, no cache, plain torch."""
    engine = build(*CASES[0])
    # an average by its definition, beside the engine's
    ema = {n: p.detach().double() for n, p in engine.parameters.items()}
    results = []
    for number in range(STEPS):
        results.append(step(engine, number))
        decay = min(DECAY, (1 + number) / (10 + number))
        for name, parameter in engine.parameters.items():
            ema[name] = decay * ema[name] + (1 - decay) * parameter.detach().double()
    state = engine.state()
    parameters = {n: t.flatten().tolist() for n, t in state.parameters.items()}
    held_out = held_out_scores(engine)
    with torch.no_grad():  # the average in the weights' place by hand, without the engine's way
        own = {n: p.clone() for n, p in engine.parameters.items()}
        for name, parameter in engine.parameters.items():
            parameter.copy_(ema[name])
        average = held_out_scores(engine)
        for name, parameter in engine.parameters.items():
            parameter.copy_(own[name])
    return {
        "held_out": held_out,
        "average": average,
        "losses": [r.total for r in results]
        + [step(engine, number).total for number in range(STEPS, STEPS + MORE)],
        "grad_norms": [r.grad_norm for r in results],
        "parameters": parameters,
        "ema": {n: t.float().flatten().tolist() for n, t in ema.items()},
    }


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c)))
def test_two_ranks_equal_one_process_at_every_zero_stage(case, two_ranks, alone):
    found = two_ranks["/".join(map(str, case))]
    assert found["engine"] == case[0]
    # float32 sums in another order; 1e-6 relative is the promise of train.zero_stage
    torch.testing.assert_close(found["losses"], alone["losses"], rtol=1e-6, atol=0.0)
    torch.testing.assert_close(found["grad_norms"], alone["grad_norms"], rtol=1e-5, atol=0.0)
    for name, values in alone["parameters"].items():
        # AdamW's first steps divide by the gradient's own size: the error of a tiny one stays
        torch.testing.assert_close(found["parameters"][name], values, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c)))
def test_held_out_scores_are_those_of_one_process_and_no_step_feels_them(case, two_ranks, alone):
    # scored in the middle: the losses after it are held against one process above
    found = two_ranks["/".join(map(str, case))]["held_out"]
    assert set(found) == set(alone["held_out"]) >= {"total", "nce"}
    for name, value in alone["held_out"].items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c)))
def test_the_average_is_scored_as_in_one_process_and_the_weights_come_back(case, two_ranks, alone):
    # that they come back to the bit toy_engines holds
    found = two_ranks["/".join(map(str, case))]["average"]
    for name, value in alone["average"].items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=0.0)
    assert abs(alone["average"]["total"] - alone["held_out"]["total"]) > 1e-3


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c)))
def test_the_average_of_the_weights_is_that_of_one_process(case, two_ranks, alone):
    # gathered from shards, saved and loaded (toy_engines holds that to the bit)
    found = two_ranks["/".join(map(str, case))]["ema"]
    assert found.keys() == alone["ema"].keys()
    for name, values in alone["ema"].items():
        torch.testing.assert_close(found[name], values, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c)))
def test_scales_are_clamped_in_the_master_too(case, two_ranks):
    # a clamp of the working copy only would be undone by the next step from the master
    assert two_ranks["/".join(map(str, case))]["scale"] == pytest.approx(0.995, abs=1e-7)


def test_parameters_without_gradient_keep_their_values_but_for_decay(alone):
    engine = build(*CASES[0])
    start = {n: t.clone() for n, t in engine.state().parameters.items()}
    assert torch.equal(
        start["model.frozen.weight"].flatten(),
        torch.tensor(alone["parameters"]["model.frozen.weight"]),
    )
    # lr 0.01 / (1 + n) over the steps, weight decay 0.1: the only thing that moves it
    factor = 1.0
    for number in range(STEPS):
        factor *= 1.0 - 0.1 * 0.01 / (1 + number)
    torch.testing.assert_close(
        torch.tensor(alone["parameters"]["model.unused.weight"]),
        factor * start["model.unused.weight"].flatten(),
    )
