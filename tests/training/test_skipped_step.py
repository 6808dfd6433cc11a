"""A step that is not finite changes nothing, and the device alone decides that it is none."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mlip.training.step import Engine, StepResult
from tests.training.exact_step import PROGRESS, exact_engine, make_batch

PLACES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
WAYS = {
    "adamw": (),
    "muon": ("train.optimizer=muon",),
    "average of weights": ("train.ema_decay=0.9",),
    "cached": ("batch.micro_images=3", "batch.micro_texts=3"),
}


def _held(engine: Engine) -> dict[str, Tensor]:
    """Everything a step may change, copied."""
    state = engine.state()
    average = state.ema.parameters if state.ema is not None else {}
    groups = {"parameter": state.parameters, "buffer": state.buffers, "average": average}
    groups |= state.moments
    held = {f"{g} {n}": t.clone() for g, tensors in groups.items() for n, t in tensors.items()}
    counts = [state.optimizer_steps, state.ema.updates if state.ema is not None else 0]
    return held | {"counts": torch.tensor(counts)}


def _changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> list[str]:
    assert before.keys() == after.keys()
    return [name for name in before if not torch.equal(before[name], after[name])]


def _step(engine: Engine, number: int, *, factor: float = 1.0) -> StepResult:
    batch = make_batch(number, 8)
    batch = replace(batch, image=batch.image * factor)
    return engine.start_step(batch, step=number, progress=PROGRESS, lr=0.01).result()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("place", PLACES)
def test_a_step_that_is_not_finite_changes_nothing(place: str, way: str) -> None:
    engine = exact_engine(8, more=WAYS[way])
    if engine.device.type != place:
        pytest.skip(f"engines are on {engine.device.type} here")
    start = _held(engine)
    assert _step(engine, 0, factor=torch.nan).is_skipped  # before the optimiser has a state
    assert _changed(start, _held(engine)) == []
    for number in range(1, 3):
        assert not _step(engine, number).is_skipped
    before = _held(engine)
    for bad in (torch.nan, torch.inf):
        result = _step(engine, 3, factor=bad)
        assert result.is_skipped and result.grad_norm != result.grad_norm and result.bad_terms()
        assert _changed(before, _held(engine)) == []
    assert not _step(engine, 3).is_skipped
    changed = _changed(before, _held(engine))
    assert {name.partition(" ")[0] for name in changed} >= {"parameter", "buffer", "exp_avg"}


@pytest.mark.parametrize("way", WAYS)
def test_the_steps_around_a_skipped_one_are_those_of_a_run_without_it(way: str) -> None:
    whole, other = (exact_engine(8, more=WAYS[way]) for _ in range(2))
    for engine in (whole, other):
        for number in range(3):
            _step(engine, number)
            if engine is other:
                assert _step(engine, 77 + number, factor=torch.nan).is_skipped
    assert _changed(_held(whole), _held(other)) == []


def test_a_gradient_of_one_parameter_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = exact_engine(8)
    _step(engine, 0)
    before = _held(engine)
    backward = engine._backward

    def spoilt(total: Tensor) -> None:
        backward(total)
        next(p.grad for p in engine.parameters.values() if p.grad is not None).view(-1)[
            0
        ] = -torch.inf

    monkeypatch.setattr(engine, "_backward", spoilt)
    result = _step(engine, 1)
    assert result.is_skipped and result.bad_terms() == []
    assert _changed(before, _held(engine)) == []


def test_a_step_can_be_started_before_the_one_before_it_is_read() -> None:
    read, late = exact_engine(8), exact_engine(8)
    expected = [_step(read, 0), _step(read, 1, factor=torch.nan), _step(read, 2)]
    started = []
    for number, factor in enumerate((1.0, torch.nan, 1.0)):
        batch = make_batch(number, 8)
        batch = replace(batch, image=batch.image * factor)
        started.append(late.start_step(batch, step=number, progress=PROGRESS, lr=0.01))
    found = [step.result() for step in reversed(started)][::-1]
    assert [r.is_skipped for r in found] == [False, True, False]
    for one, other in zip(found, expected, strict=True):
        assert one.scales == other.scales and repr(one.terms) == repr(other.terms)
    assert found[2].total == expected[2].total and found[2].grad_norm == expected[2].grad_norm
    assert started[0].result() is found[0]
    assert _changed(_held(read), _held(late)) == []


def test_the_table_of_concepts_which_no_step_changes_is_not_copied_in_each() -> None:
    engine = exact_engine(8)
    vectors = engine.objective.model.concept_vectors
    _step(engine, 0)
    written = vectors._version
    assert _step(engine, 1, factor=torch.nan).is_skipped
    assert vectors._version == written
    places = {buffer.data_ptr() for buffer, _ in engine._kept or ()}
    assert vectors.data_ptr() not in places
    assert len(places) == len(list(engine.objective.state_dict().keys() - engine.parameters)) - 1
