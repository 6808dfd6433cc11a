"""One config value, one loss and one gradient: whatever the ranks, micro-batches and ZeRO stage.

Oracle: one process, the whole batch in one pass, plain torch. In float64: loss and every gradient
to 1e-9. In float32: loss to 1e-6 relative, every parameter's gradient to 1e-5 of its largest entry.
Only what is analytically zero (a key's bias) is held to 1e-6 of the model's largest entry instead.
The learned scales' gradients, sums over all pairs that nearly cancel, have these digits because
they are centred variances summed in float64.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mlip.training import grad_cache
from tests import rank_farm
from tests.training.exact_ranks import Case, name_of, run_cases
from tests.training.exact_step import (
    exact_engine,
    gradients_of,
    loss_and_gradients,
    make_batch,
    whole_batch,
)

PAIRS, UNEVEN = 16, 19
# what the default suite runs on two ranks; the whole matrix is long
FEW: list[Case] = [
    ("plain64", 0, 4, UNEVEN),
    ("deepspeed", 0, 2, PAIRS),
    ("deepspeed", 1, 4, PAIRS),
    ("deepspeed", 2, 2, PAIRS),
    ("deepspeed", 3, 1, PAIRS),
    ("deepspeed", 3, 4, UNEVEN),
    ("deepspeed+offload", 3, 2, UNEVEN),
    ("deepspeed+checkpointing", 3, 1, PAIRS),
]
MATRIX: list[Case] = [
    (engine, stage, passes, pairs)
    for engine, stages in (("plain64", (0,)), ("plain", (0,)), ("deepspeed", (0, 1, 2, 3)))
    for stage in stages
    for passes in (1, 2, 4)
    for pairs in (PAIRS, UNEVEN)
]
MATRIX += [("deepspeed+offload", stage, 2, UNEVEN) for stage in (1, 2, 3)]
MATRIX += [("deepspeed+checkpointing", s, 1 if s == 3 else 2, PAIRS) for s in (0, 1, 2, 3)]


@pytest.fixture(scope="module")
def oracles() -> dict[int, dict[str, Any]]:
    torch.set_num_threads(1)
    made = {pairs: whole_batch(pairs) for pairs in (PAIRS, UNEVEN)}
    return made | {-pairs: whole_batch(pairs, double=True) for pairs in (PAIRS, UNEVEN)}


def worst_relative(
    found: dict[str, Any], oracle: dict[str, Any], what: str, bound: float = 1e-5
) -> float:
    """The largest error of a gradient relative to its largest entry; raises where above `bound`."""
    gradients = oracle["gradients"]
    assert found["gradients"].keys() == gradients.keys()
    largest = max(float(g.abs().max()) for g in gradients.values())
    worst = 0.0
    for name, expected in gradients.items():
        own = float(expected.abs().max())
        error = float((found["gradients"][name] - expected).abs().max())
        if error <= bound * own:
            worst = max(worst, error / own if own else 0.0)
            continue
        # analytically zero: a key's bias shifts all its logits alike
        assert own < 1e-6 * largest, (what, name, error / own)
        assert error <= 0.1 * bound * largest, (what, name, error, largest)
    return worst


def check(case: Case, folder: Path, oracles: dict[int, dict[str, Any]]) -> dict[str, float]:
    found = torch.load(folder / f"{name_of(case)}.pt", weights_only=True)
    is_double = case[0] == "plain64"
    oracle = oracles[-case[3] if is_double else case[3]]
    for name, expected in {"total": oracle["total"], **oracle["terms"]}.items():
        value = found["total"] if name == "total" else found["terms"][name]
        bound = (1e-9 if is_double else 1e-6) * abs(expected)
        assert abs(value - expected) <= bound, (case, name, value, expected)
    return {
        "loss_error": abs(found["total"] / oracle["total"] - 1.0),
        "gradient_error": worst_relative(found, oracle, name_of(case), 1e-9 if is_double else 1e-5),
    }


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exact")
    rank_farm.run(run_cases, 2, FEW, str(folder))
    return folder


@pytest.mark.parametrize("case", FEW, ids=name_of)
def test_two_ranks_give_the_loss_and_every_gradient_of_one_process(case, two_ranks, oracles):
    check(case, two_ranks, oracles)


def reductions_by_engine(cases: list[Case], folder: Path) -> dict[tuple[str, int], set[int]]:
    """(engine, stage) -> how often its backward pass reduced, over all its cases."""
    counts: dict[tuple[str, int], set[int]] = {}
    for case in cases:
        found = torch.load(folder / f"{name_of(case)}.pt", weights_only=True)
        counts.setdefault(case[:2], set()).add(found["reductions"])
    return counts


def test_gradients_are_reduced_once_whatever_the_number_of_passes(two_ranks):
    # stage 3 stands here with one pass and with four; all stages in the long matrix
    counts = reductions_by_engine(FEW, two_ranks)
    assert len(counts["deepspeed", 3]) == 1, counts
    assert min(counts["deepspeed", 3]) > 0


@pytest.mark.long
@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_whole_matrix_of_ranks_passes_and_stages(world, tmp_path, oracles, record_property):
    rank_farm.run(run_cases, world, MATRIX, str(tmp_path), timeout_s=1500)
    errors = [check(case, tmp_path, oracles) for case in MATRIX]
    assert all(len(n) == 1 for n in reductions_by_engine(MATRIX, tmp_path).values())
    record_property("cases", len(errors))
    for key in ("loss_error", "gradient_error"):
        record_property(key, max(e[key] for e in errors))


def test_every_loss_and_parameter_is_in_the_proof(oracles):
    oracle = oracles[PAIRS]
    assert set(oracle["terms"]) == {
        "global_contrastive", "local_alignment", "category", "matching", "swapping", "divergence",
    }  # fmt: skip
    assert all(value > 0.0 for value in oracle["terms"].values())
    silent = {n for n, g in oracle["gradients"].items() if float(g.abs().max()) < 1e-7}
    # aggregation "mean" has no scale; a key's bias cancels in the softmax
    assert all("aggregation_scale" in n or "key.bias" in n or "k_proj.bias" in n for n in silent)


def test_a_gradient_wrong_by_the_world_size_would_show(oracles):
    # the commonest mistake elsewhere: the oracle's bound must see it in every single parameter
    oracle = oracles[PAIRS]
    for name, gradient in oracle["gradients"].items():
        if float(gradient.abs().max()) < 1e-7:
            continue
        wrong = {**oracle["gradients"], name: 2.0 * gradient}
        with pytest.raises(AssertionError):
            worst_relative({"gradients": wrong}, oracle, "wrong")


DROPOUT = (
    "run.exact=false",
    "model.text.options={hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, "
    "intermediate_size: 16, hidden_dropout_prob: 0.3, attention_probs_dropout_prob: 0.3}",
    "model.vision.options={hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, "
    "intermediate_size: 16, patch_size: 8, hidden_dropout_prob: 0.3, "
    "attention_probs_dropout_prob: 0.0}",
    "model.divergence.kind=dropout",
)


def _with_dropout(keep: bool, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    if keep:  # the same micro-batches with all their activations kept: no recomputation at all
        monkeypatch.setattr(
            grad_cache, "checkpoint", lambda function, *piece, **_: function(*piece)
        )
    engine = exact_engine(PAIRS, passes=4, more=DROPOUT)
    torch.manual_seed(7)
    found = loss_and_gradients(engine, PAIRS)
    monkeypatch.undo()
    return found


def test_dropout_is_replayed_bit_for_bit_in_the_whole_objective(monkeypatch):
    kept, cached = _with_dropout(True, monkeypatch), _with_dropout(False, monkeypatch)
    assert kept["total"] == cached["total"] and kept["terms"] == cached["terms"]
    for name, gradient in kept["gradients"].items():
        assert torch.equal(gradient, cached["gradients"][name]), name


def test_a_cache_without_replay_would_show(monkeypatch):
    kept = _with_dropout(True, monkeypatch)
    plain = grad_cache.checkpoint
    monkeypatch.setattr(
        grad_cache,
        "checkpoint",
        lambda function, *piece, **named: plain(
            function, *piece, **{**named, "preserve_rng_state": False}
        ),
    )
    engine = exact_engine(PAIRS, passes=4, more=DROPOUT)
    torch.manual_seed(7)
    forgot = loss_and_gradients(engine, PAIRS)["gradients"]
    assert any(not torch.equal(g, forgot[n]) for n, g in kept["gradients"].items())


def test_activation_checkpointing_of_either_tower_changes_no_bit(oracles):
    # an option inside a tower, beside the cache around it
    plain = loss_and_gradients(exact_engine(PAIRS), PAIRS)
    for more in (("vision",), ("text",), ("vision", "text")):
        settings = tuple(f"model.{tower}.checkpointing=true" for tower in more)
        found = loss_and_gradients(exact_engine(PAIRS, more=settings), PAIRS)
        assert found["total"] == plain["total"]
        for name, gradient in plain["gradients"].items():
            assert torch.equal(gradient, found["gradients"][name]), (more, name)


def test_the_cost_of_the_cache_is_counted():
    engine = exact_engine(PAIRS, passes=4)
    grad_cache.cost.start()
    engine.start_step(make_batch(0, PAIRS), step=0, progress=1.5, lr=0.0).result()
    seconds, passes = grad_cache.cost.stop()
    assert passes == 4 + 4 and seconds > 0.0  # four passes of images, four of texts (one larger)


def test_gradients_of_an_engine_before_any_step_are_zero():
    engine = exact_engine(PAIRS)
    assert all(not g.any() for g in gradients_of(engine).values())
