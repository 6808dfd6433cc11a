"""The composed loss: masks, pair ids, anchors, confident batches, errors, the module."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mlip.kernels.token_knowledge_patch import (
    TokenKnowledgePatchLoss,
    contrastive_loss_from_scores,
    reference,
    token_knowledge_patch_loss,
    token_knowledge_patch_scores,
)
from tests.kernels.oracle import (
    contrastive,
    gradients,
    leaves,
    make_inputs,
    poisoned,
    relative_error,
    scores,
)

MACHINE = 1e-12


def valid_sides(inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    rows = inputs["token_weights"].sum(1)
    rows = rows + (inputs["knowledge_weights"] * inputs["knowledge_mask"]).sum(1)
    return inputs["patch_mask"].any(1), rows > 0


def square_inputs(seed: int = 0, **sizes: Any) -> dict[str, Any]:
    inputs = make_inputs(5, 5, seed=seed, **sizes)
    inputs["knowledge_mask"][-1] = False  # with its token weights: a text without any row
    inputs["patch_mask"][-1] = True
    inputs["patch_mask"][1] = False  # an image without a patch, whose text stays a negative
    return inputs


@pytest.mark.parametrize("with_ids", [False, True])
@pytest.mark.parametrize("aggregation", ["mean", "lse"])
def test_loss_and_gradients_equal_cross_entropy_over_the_anchors(
    with_ids: bool, aggregation: str
) -> None:
    inputs = square_inputs()
    ids = torch.tensor([4, 9, 4, 7, 1]) if with_ids else None
    images, texts = valid_sides(inputs)
    assert images.tolist() == [True, False, True, True, True]
    assert texts.tolist() == [True, True, True, True, False]
    kappa = torch.tensor(14.3, dtype=torch.float64)
    truth_leaves, made = leaves(inputs | {"kappa": kappa}), leaves(inputs | {"kappa": kappa})
    truth_scale, scale = truth_leaves.pop("kappa"), made.pop("kappa")
    z = truth_scale * scores(truth_leaves, aggregation=aggregation)
    truth = contrastive(z, ids, images, texts)
    value = token_knowledge_patch_loss(
        **made, logit_scale=scale, pair_ids=ids, aggregation=aggregation
    )
    assert value.item() == pytest.approx(truth.item(), rel=1e-13)
    want = gradients(truth, truth_leaves | {"kappa": truth_scale})
    got = gradients(value, made | {"kappa": scale})
    for name in want:
        reached = want[name]
        if name.endswith("weights"):
            reached = torch.where(inputs[name] > 0, reached, 0.0)
        assert relative_error(got[name], reached) <= MACHINE * 10, name
    assert torch.count_nonzero(got["tokens"][-1]) == 0
    assert torch.count_nonzero(got["patches"][1]) == 0
    assert torch.count_nonzero(got["patches"][4]) > 0  # partner of the empty text: a negative


def test_nan_behind_a_mask_changes_neither_loss_nor_gradient() -> None:
    inputs = square_inputs(3)
    clean, dirty = leaves(inputs), leaves(poisoned(inputs))
    value = token_knowledge_patch_loss(**clean, logit_scale=10.0)
    again = token_knowledge_patch_loss(**dirty, logit_scale=10.0)
    assert torch.equal(value, again)
    want, got = gradients(value, clean), gradients(again, dirty)
    assert all(torch.equal(want[name], got[name]) for name in want)


def test_a_batch_without_anchors_loses_nothing_and_moves_nothing() -> None:
    inputs = square_inputs(5) | {"patch_mask": torch.zeros(5, 5, dtype=torch.bool)}
    made = leaves(inputs)
    value = token_knowledge_patch_loss(**made, logit_scale=10.0)
    assert value.item() == 0.0
    assert all(torch.count_nonzero(grad) == 0 for grad in gradients(value, made).values())


@pytest.mark.parametrize("side", ["image_valid", "text_valid"])
def test_nan_of_an_invalid_half_changes_neither_loss_nor_gradient(side: str) -> None:
    valid = {side: torch.tensor([True, True, False, True])}
    found = []
    for hidden in (0.0, math.nan, math.inf):
        s = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
        s[(2, ...) if side == "image_valid" else (..., 2)] = hidden
        made = {"s": s.requires_grad_(), "scale": torch.tensor(5.0, requires_grad=True)}
        value = contrastive_loss_from_scores(made["s"], logit_scale=made["scale"], **valid)
        found.append([value, *gradients(value, made).values()])
    assert found[0][0] > 0
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_equal_scores_lose_ln_of_the_batch() -> None:
    for count in (1, 2, 7):
        value = contrastive_loss_from_scores(torch.full((count, count), 0.3), logit_scale=50.0)
        assert value.item() == pytest.approx(math.log(count), abs=1e-6)


def test_all_pairs_with_one_id_lose_nothing() -> None:
    made = torch.randn(4, 4, requires_grad=True)
    value = contrastive_loss_from_scores(made, logit_scale=9.0, pair_ids=torch.full((4,), 3))
    assert value.item() == 0.0
    assert torch.count_nonzero(torch.autograd.grad(value, [made])[0]) == 0


@pytest.mark.parametrize("gap", [0.1, 0.25, 0.5])
def test_a_confident_batch_keeps_its_gradient_in_float32(gap: float) -> None:
    """Oracle: float64. At gap 0.25 the loss is about 1e-9, where softmax minus one is noise."""
    g = torch.Generator().manual_seed(0)
    s = torch.rand(16, 16, generator=g) * 0.02 + gap * torch.eye(16)
    wide, narrow = s.double().requires_grad_(), s.clone().requires_grad_()
    truth = contrastive_loss_from_scores(wide, logit_scale=100.0)
    value = contrastive_loss_from_scores(narrow, logit_scale=100.0)
    (want,) = torch.autograd.grad(truth, [wide])
    (got,) = torch.autograd.grad(value, [narrow])
    assert relative_error(value, truth) < 1e-4
    assert relative_error(got, want) < 1e-4
    assert relative_error(got.diagonal(), want.diagonal()) < 1e-4


def test_loss_is_invariant_to_pair_order() -> None:
    inputs = square_inputs(7)
    ids = torch.tensor([4, 9, 4, 7, 1])
    order = torch.tensor([3, 0, 4, 2, 1])
    shuffled = {name: value[order] for name, value in inputs.items()}
    value = token_knowledge_patch_loss(**inputs, logit_scale=10.0, pair_ids=ids)
    again = token_knowledge_patch_loss(**shuffled, logit_scale=10.0, pair_ids=ids[order])
    assert again.item() == pytest.approx(value.item(), rel=1e-13)


def test_scores_serve_a_second_loss_without_being_made_twice() -> None:
    made = leaves(square_inputs(9))
    s = token_knowledge_patch_scores(**made)
    images, texts = valid_sides(made)
    both = (
        contrastive_loss_from_scores(s, logit_scale=10.0, image_valid=images, text_valid=texts)
        + s.square().mean()
    )
    first = gradients(token_knowledge_patch_loss(**made, logit_scale=10.0), made)
    second = gradients(token_knowledge_patch_scores(**made).square().mean(), made)
    total = gradients(both, made)
    for name in total:
        assert relative_error(total[name], first[name] + second[name]) <= MACHINE * 10, name


def test_autocast_does_not_lower_the_precision_of_float32_inputs() -> None:
    inputs = {k: v.float() if v.is_floating_point() else v for k, v in square_inputs(11).items()}
    value = token_knowledge_patch_loss(**inputs, logit_scale=10.0)
    with torch.autocast("cpu", torch.bfloat16):
        again = token_knowledge_patch_loss(**inputs, logit_scale=10.0)
    assert torch.equal(value, again)


@pytest.mark.parametrize("budget", [2**29, 2**10])  # of the smaller one everything is made again
@pytest.mark.parametrize("pooling", ["attention", "context", "max"])
def test_backward_under_autocast_gives_the_gradients_of_backward_without(
    pooling: str, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "MEMORY_BUDGET_BYTES", budget)
    found = []
    for is_on in (False, True):
        made = leaves(square_inputs(11), torch.float32)
        with torch.autocast("cpu", torch.bfloat16, enabled=is_on):
            value = token_knowledge_patch_loss(**made, logit_scale=10.0, pooling=pooling)
            found.append(gradients(value, made))
    assert all(torch.equal(found[1][name], want) for name, want in found[0].items())


def test_gradients_are_made_only_where_they_are_asked_for() -> None:
    inputs = square_inputs(13)
    full = leaves(inputs)
    want = gradients(token_knowledge_patch_loss(**full, logit_scale=10.0), full)
    for name in ("patches", "tokens", "knowledge", "token_weights"):
        alone = dict(inputs) | {name: inputs[name].clone().requires_grad_()}
        value = token_knowledge_patch_loss(**alone, logit_scale=10.0)
        (got,) = torch.autograd.grad(value, [alone[name]])
        assert relative_error(got, want[name] / _direction()) <= MACHINE * 10, name
    with torch.no_grad():
        assert token_knowledge_patch_loss(**full, logit_scale=10.0).grad_fn is None


def _direction() -> float:
    g = torch.Generator().manual_seed(1)
    return torch.randn((), generator=g, dtype=torch.float64).item()


def test_activation_checkpointing_and_double_use_give_the_same_gradient() -> None:
    made = leaves(square_inputs(15))
    plain = gradients(token_knowledge_patch_loss(**made, logit_scale=10.0), made)

    def run(patches: Tensor) -> Tensor:
        rest = made | {"patches": patches.tanh()}
        return token_knowledge_patch_loss(**rest, logit_scale=10.0)

    direct = torch.autograd.grad(run(made["patches"]), [made["patches"]])[0]
    value = checkpoint(run, made["patches"], use_reentrant=False)
    assert torch.equal(torch.autograd.grad(value, [made["patches"]])[0], direct)
    twice = token_knowledge_patch_loss(**made, logit_scale=10.0)
    assert all(torch.equal(gradients(twice, made)[n], plain[n]) for n in plain)


def test_a_second_derivative_is_refused_and_never_wrong() -> None:
    made = leaves(square_inputs(17))
    value = token_knowledge_patch_loss(**made, logit_scale=10.0)
    (grad,) = torch.autograd.grad(value, [made["tokens"]], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(grad.square().sum(), [made["tokens"]])


def test_a_second_derivative_is_refused_by_way_of_the_incoming_gradient_too() -> None:
    """As of the norm of a gradient by a loss's weight (GradNorm)."""
    made = leaves(square_inputs(17))
    weight = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    total = weight * token_knowledge_patch_loss(**made, logit_scale=10.0)
    total = total + weight * made["tokens"].square().sum()
    (grad,) = torch.autograd.grad(total, [made["tokens"]], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(grad.norm(), [weight])


def test_a_graph_of_gradients_may_be_made_inside_a_checkpoint(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A checkpoint gives every saved tensor once. Rows are made in checkpoints where they are
    many."""
    monkeypatch.setattr(reference, "MEMORY_BUDGET_BYTES", 2**10)
    made = leaves(square_inputs(15))
    names = ("patches", "tokens", "knowledge")
    wanted = [made[name] for name in names]

    def run(*features: Tensor) -> Tensor:
        rest = made | dict(zip(names, features, strict=True))
        return token_knowledge_patch_loss(**rest, logit_scale=10.0)

    want = torch.autograd.grad(run(*wanted), wanted)
    value = checkpoint(run, *wanted, use_reentrant=False)
    got = torch.autograd.grad(value, wanted, create_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "dim": ({"tokens": torch.zeros(5, 6, 9)}, "D=8 as patches have, got D=9"),
    "ndim": ({"tokens": torch.zeros(5, 8)}, "3 dimensions"),
    "views": ({"tokens": torch.zeros(5, 8, 6, 8)}, "3 dimensions"),
    "integers": ({"tokens": torch.zeros(5, 6, 8, dtype=torch.int64)}, "floating point"),
    "empty": ({"tokens": torch.zeros(5, 0, 8)}, "without an empty dimension.*on all ranks alike"),
    "other texts": ({"knowledge": torch.zeros(4, 3, 8)}, r"shape \[5, 3, 8\], got \[4, 3, 8\]"),
    "entity weights": ({"knowledge_weights": torch.ones(5, 2)}, r"knowledge_weights \[N, K\]"),
    "entity mask": ({"knowledge_mask": torch.ones(5, 2).bool()}, r"knowledge_mask \[N, K\]"),
    "patch mask": ({"patch_mask": torch.ones(5, 4).bool()}, r"patch_mask \[M, P\]"),
    "weights shape": ({"token_weights": torch.ones(5, 7)}, r"shape \[5, 6\], got \[5, 7\]"),
    "negative": ({"token_weights": -torch.ones(5, 6)}, "token_weights >= 0"),
    "nan weight": ({"knowledge_weights": torch.full((5, 3), math.nan)}, "knowledge_weights >= 0"),
    "infinite": ({"token_weights": torch.full((5, 6), math.inf)}, "token_weights >= 0 and finite"),
    "integer mask": (
        {"token_weights": torch.ones(5, 6, dtype=torch.int64)},
        r"bool or in floating point, got torch.int64; .*mask.bool\(\)",
    ),
    "mask dtype": ({"patch_mask": torch.ones(5, 5)}, "patch_mask of dtype bool"),
    "entity mask dtype": ({"knowledge_mask": torch.ones(5, 3)}, "knowledge_mask of dtype bool"),
    "pooling": ({"pooling": "sum"}, "pooling one of"),
    "aggregation": ({"aggregation": "max"}, "aggregation one of"),
    "share": ({"knowledge_share": 1.5}, r"\[0, 1\]"),
    "negative share": ({"knowledge_share": -0.5}, r"\[0, 1\]"),
    "share tensor": ({"knowledge_share": torch.tensor(0.5)}, r"\[0, 1\]"),
    "scale": ({"attention_scale": -1.0}, "attention_scale finite and at least 0"),
    "infinite scale": ({"knowledge_scale": math.inf}, "knowledge_scale finite"),
    "gamma": ({"aggregation_scale": 0.0}, "aggregation_scale finite and greater than 0"),
    "small gamma": (
        {"aggregation_scale": 0.01, "aggregation": "lse"},
        'aggregation_scale of "lse" at least 0.02',
    ),
    "no scale": ({"logit_scale": None}, "logit_scale to be a number or a 0-dim tensor, got None"),
    "text scale": ({"attention_scale": "10"}, "attention_scale to be a number or a 0-dim.* str"),
    "no share": ({"knowledge_share": None}, r"knowledge_share a number in \[0, 1\], got None"),
    "scale shape": ({"attention_scale": torch.ones(2)}, "0-dim tensor"),
    "impl": ({"impl": "cuda"}, 'impl "auto", "triton" or "torch"'),
    "knowledge": ({"knowledge": None}, "expected knowledge beside"),
    "mask alone": ({"knowledge": None, "knowledge_weights": None}, "expected knowledge beside"),
    "pair ids": ({"pair_ids": torch.zeros(5)}, "int64"),
    "pair ids shape": ({"pair_ids": torch.zeros(4, dtype=torch.int64)}, "one entry per pair"),
    "unequal": ({"patches": torch.zeros(4, 5, 8)}, "as many images as texts"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_wrong_argument_is_named_with_what_came(case: str) -> None:
    change, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        token_knowledge_patch_loss(**(square_inputs() | {"logit_scale": 10.0} | change))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.zeros(3, 6), "pass the group that made the scores"),
        (torch.zeros(6, 3), "pass the group that made the scores"),
        (torch.zeros(3), r"scores \[M, N\]"),
        (torch.zeros(3, 3, dtype=torch.int64), "in floating point, got torch.int64"),
    ],
)
def test_scores_that_are_not_of_these_pairs_are_refused(given: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        contrastive_loss_from_scores(given, logit_scale=1.0)


@pytest.mark.parametrize("pooling", ["attention", "context", "max"])
@pytest.mark.parametrize("aggregation", ["mean", "lse"])
def test_the_module_is_the_function_with_learned_logarithms(pooling: str, aggregation: str) -> None:
    inputs = square_inputs(19)
    options: dict[str, Any] = {"pooling": pooling, "aggregation": aggregation, "logit_scale": 9.0}
    options |= {"knowledge_gain": 0.9, "knowledge_share": 0.4, "knowledge_scale": 3.0}
    options |= {"attention_scale": 6.0, "aggregation_scale": 4.0}
    module = TokenKnowledgePatchLoss(**options).double()
    ids = torch.tensor([4, 9, 4, 7, 1])
    value = module(**inputs, pair_ids=ids)
    want = token_knowledge_patch_loss(**inputs, pair_ids=ids, **options)
    assert value.item() == pytest.approx(want.item(), rel=1e-6)  # logarithms start in float32
    value.backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None and parameter.grad.item() != 0.0, name
    assert ("log_attention_scale" in dict(module.named_parameters())) == (pooling != "max")
    assert ("log_aggregation_scale" in dict(module.named_parameters())) == (aggregation == "lse")
    assert set(module(**inputs, output_dict=True)) == {"contrastive_loss"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"knowledge_share": 2.0}, r"\[0, 1\]"),
        ({"knowledge_gain": math.inf}, "knowledge_gain finite"),
        ({"attention_scale": 0.0}, "attention_scale finite and greater than 0"),
        ({"impl": "fast"}, "expected impl"),
        ({"pooling": "sum"}, "pooling one of"),
        ({"aggregation": "lse", "aggregation_scale": 0.01}, "at least 0.02"),
    ],
)
def test_a_wrong_option_is_named_where_the_module_is_made(
    change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        TokenKnowledgePatchLoss(**change)


@pytest.mark.parametrize("entities", [None, 0])
def test_without_entities_every_learned_scale_still_has_a_gradient(entities: int | None) -> None:
    """DistributedDataParallel waits for the gradient of every parameter."""
    module = TokenKnowledgePatchLoss()
    knowledge = None if entities is None else torch.zeros(3, entities, 8)
    module(torch.randn(3, 5, 8), torch.randn(3, 4, 8), knowledge).backward()
    assert all(parameter.grad is not None for parameter in module.parameters())
    assert module.log_knowledge_scale.grad == 0.0


def test_entities_of_a_batch_without_any_still_get_a_gradient() -> None:
    """Of a projection of entities, DistributedDataParallel waits for it."""
    shapes = {"patches": 5, "tokens": 4}
    made: dict[str, Any] = {n: torch.randn(3, k, 8, requires_grad=True) for n, k in shapes.items()}
    made["knowledge"] = torch.zeros(3, 0, 8, requires_grad=True)
    made["knowledge_weights"] = torch.zeros(3, 0, requires_grad=True)
    token_knowledge_patch_loss(**made, logit_scale=10.0).backward()
    assert all(x.grad is not None and x.grad.shape == x.shape for x in made.values())


def test_clamping_stops_the_logit_scale_at_100_and_the_softmax_scales_at_200() -> None:
    module = TokenKnowledgePatchLoss(logit_scale=5000.0, attention_scale=5000.0)
    module.clamp_scales_()
    assert module.log_logit_scale.exp().item() == pytest.approx(100.0, rel=1e-6)
    assert module.log_attention_scale.exp().item() == pytest.approx(200.0, rel=1e-5)
    assert module.log_knowledge_scale.exp().item() == pytest.approx(10.0, rel=1e-6)
    soft = TokenKnowledgePatchLoss(aggregation="lse")
    torch.nn.init.constant_(soft.log_aggregation_scale, -9.0)
    soft.clamp_scales_()
    assert soft.log_aggregation_scale.exp().item() == pytest.approx(0.02, rel=1e-6)
    fixed = TokenKnowledgePatchLoss(learn_scales=False, logit_scale=150.0)
    fixed.clamp_scales_()
    assert fixed.log_logit_scale.exp().item() == pytest.approx(150.0, rel=1e-6)
    assert list(fixed.parameters()) == []
    assert "log_logit_scale" in fixed.state_dict()
