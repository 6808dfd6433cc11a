"""The plain-torch scores against loops in float64, closed forms and gradcheck."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.harness import peak_bytes
from mlip.kernels.token_knowledge_patch import reference, token_knowledge_patch_scores
from tests.kernels.oracle import (
    LAYOUTS,
    assert_broken_inputs_show,
    gradients,
    laid_out,
    leaves,
    make_inputs,
    poisoned,
    relative_error,
    scores,
)

VARIANTS = [(p, a) for p in ("attention", "context", "max") for a in ("mean", "lse")]
MACHINE = 1e-12  # float64 arithmetic in another order


def scalars(**values: float) -> dict[str, Tensor]:
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}


def learned() -> dict[str, Tensor]:
    return scalars(
        attention_scale=7.0, knowledge_scale=6.0, knowledge_gain=0.4, aggregation_scale=4.0
    )


def assert_equal_to_oracle(inputs: dict[str, Any], tolerance: float, **options: Any) -> None:
    truth_leaves, own_leaves = leaves(inputs), leaves(inputs)
    truth = scores(truth_leaves, **options)
    value = token_knowledge_patch_scores(**own_leaves, **options)
    assert relative_error(value, truth) <= tolerance
    want, got = gradients(truth, truth_leaves), gradients(value, own_leaves)
    for name in want:
        reached = want[name]
        if name.endswith("weights"):  # a weight of 0 is a mask: the product defines its gradient 0
            reached = torch.where(inputs[name] > 0, reached, 0.0)
        assert relative_error(got[name], reached) <= tolerance * 10, name


@pytest.mark.parametrize(("pooling", "aggregation"), VARIANTS)
def test_scores_and_all_gradients_equal_the_loop_over_pairs(pooling: str, aggregation: str) -> None:
    inputs = make_inputs() | learned()
    options = {"pooling": pooling, "aggregation": aggregation, "knowledge_share": 0.4}
    assert_equal_to_oracle(inputs, MACHINE, **options)


@pytest.mark.parametrize(("pooling", "aggregation"), VARIANTS)
def test_gradcheck_holds_in_every_float_input(pooling: str, aggregation: str) -> None:
    inputs = leaves(make_inputs(2, 3, 3, 3, 2, 4, seed=3) | learned())
    # finite differences step across the mask where a weight is 0, so weights stay positive here
    for name in ("token_weights", "knowledge_weights"):
        inputs[name] = (inputs[name].detach() + 0.2).requires_grad_()
    names = [n for n, v in inputs.items() if isinstance(v, Tensor) and v.requires_grad]
    if pooling == "max":
        names.remove("attention_scale")
    if aggregation == "mean":
        names.remove("aggregation_scale")

    def run(*values: Tensor) -> Tensor:
        made = inputs | dict(zip(names, values, strict=True))
        return token_knowledge_patch_scores(**made, pooling=pooling, aggregation=aggregation)

    assert torch.autograd.gradcheck(run, tuple(inputs[name] for name in names))


def test_gradcheck_holds_where_a_context_is_shorter_than_its_floor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reference, "CONTEXT_FLOOR", 10.0)
    made = make_inputs(2, 2, 3, 3, 0, 4, seed=3, masks=False) | scalars(attention_scale=7.0)
    names, wanted = list(made), tuple(leaves(made).values())

    def run(*values: Tensor) -> Tensor:
        named: dict[str, Any] = dict(zip(names, values, strict=True))
        return token_knowledge_patch_scores(**named, pooling="context")

    assert torch.autograd.gradcheck(run, wanted)


def test_scores_by_hand() -> None:
    """One token along x; patches along x and y: r = e^2 / (e^2 + 1) at attention_scale 2."""
    patches = torch.tensor([[[3.0, 0.0], [0.0, 5.0]]], dtype=torch.float64)
    tokens = torch.tensor([[[2.0, 0.0]]], dtype=torch.float64)
    weight = math.exp(2) / (math.exp(2) + 1)
    expected = {
        "attention": weight,
        "context": weight / math.hypot(weight, 1 - weight),
        "max": 1.0,
    }
    for pooling, value in expected.items():
        got = token_knowledge_patch_scores(patches, tokens, attention_scale=2.0, pooling=pooling)
        assert got.item() == pytest.approx(value, rel=1e-14)


def test_knowledge_by_hand() -> None:
    """A token along x and an entity along y: w' = (1, gain) / |.|, rows weigh 1 - share, share."""
    patches = torch.tensor([[[1.0, 0.0]]], dtype=torch.float64)
    tokens = torch.tensor([[[4.0, 0.0]]], dtype=torch.float64)
    knowledge = torch.tensor([[[0.0, 7.0]]], dtype=torch.float64)
    for gain in (0.75, -0.75):
        got = token_knowledge_patch_scores(patches, tokens, knowledge, knowledge_gain=gain)
        assert got.item() == pytest.approx(0.75 * (1 / 1.25) + 0.25 * 0.0, rel=1e-14)
    enriching_only = token_knowledge_patch_scores(
        patches, tokens, knowledge, knowledge_weights=torch.zeros(1, 1), knowledge_gain=0.75
    )
    assert enriching_only.item() == pytest.approx(1 / 1.25, rel=1e-14)


@pytest.mark.parametrize(("pooling", "aggregation"), VARIANTS)
def test_what_is_not_a_number_shows_in_the_score(pooling: str, aggregation: str) -> None:
    assert_broken_inputs_show("torch", "cpu", pooling, aggregation)


@pytest.mark.parametrize(("pooling", "aggregation"), VARIANTS)
def test_what_a_mask_hides_is_never_read(pooling: str, aggregation: str) -> None:
    inputs = make_inputs(seed=5)
    clean, dirty = leaves(inputs), leaves(poisoned(inputs))
    options: dict[str, Any] = {"pooling": pooling, "aggregation": aggregation}
    value = token_knowledge_patch_scores(**clean, **options)
    again = token_knowledge_patch_scores(**dirty, **options)
    assert torch.equal(value, again)
    want, got = gradients(value, clean), gradients(again, dirty)
    for name in want:
        assert torch.equal(want[name], got[name]), name
    hidden = gradients(again, dirty)["tokens"][inputs["token_weights"] == 0]
    assert torch.equal(hidden, torch.zeros_like(hidden))


@pytest.mark.parametrize("aggregation", ["mean", "lse"])
def test_empty_texts_and_images_score_zero_with_zero_gradient(aggregation: str) -> None:
    inputs = make_inputs(seed=7)
    inputs["knowledge_mask"][-1] = False  # the last text has no token either
    made = leaves(inputs)
    value = token_knowledge_patch_scores(**made, aggregation=aggregation)
    assert torch.equal(value[-1], torch.zeros(4, dtype=torch.float64))
    assert torch.equal(value[:, -1], torch.zeros(3, dtype=torch.float64))
    grads = gradients(value, made)
    for name in ("tokens", "knowledge", "token_weights", "knowledge_weights"):
        assert torch.count_nonzero(grads[name][-1]) == 0, name
    assert torch.count_nonzero(grads["patches"][-1]) == 0
    everything_empty = inputs | {"patch_mask": torch.zeros(3, 5, dtype=torch.bool)}
    made = leaves(everything_empty)
    value = token_knowledge_patch_scores(**made, aggregation=aggregation)
    assert torch.count_nonzero(value) == 0
    assert all(torch.count_nonzero(grad) == 0 for grad in gradients(value, made).values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_of_any_finite_length_are_normalised_and_zero_rows_have_no_gradient(dtype) -> None:
    huge, tiny = (1e20, 1e-20) if dtype == torch.float32 else (1e200, 1e-200)
    patches = torch.randn(1, 4, 8, dtype=dtype, generator=torch.Generator().manual_seed(0))
    scaled = patches.clone()
    scaled[0, 1] *= huge
    scaled[0, 2] *= tiny
    scaled[0, 3] = 0.0
    equal = patches.clone()
    equal[0, 2:] = 0.0
    tokens = torch.randn(1, 3, 8, dtype=dtype, generator=torch.Generator().manual_seed(1))
    made = scaled.clone().requires_grad_()
    value = token_knowledge_patch_scores(made, tokens)
    want = token_knowledge_patch_scores(equal, tokens)
    assert relative_error(value, want) <= 4 * torch.finfo(dtype).eps
    (grad,) = torch.autograd.grad(value.sum(), [made])
    assert torch.isfinite(grad).all()
    assert torch.count_nonzero(grad[0, 2:]) == 0
    assert torch.count_nonzero(grad[0, 0]) == 8


def test_a_row_no_longer_than_1e_6_is_the_zero_row() -> None:
    rows = torch.eye(3, dtype=torch.float64)[:, None]
    patches = rows * torch.tensor([9e-7, 1.1e-6, 1.0]).double()[:, None, None]
    value = token_knowledge_patch_scores(patches, rows)
    assert value.diagonal().tolist() == pytest.approx([0.0, 1.0, 1.0], abs=1e-15)


@pytest.mark.parametrize("gamma", [0.1, 50.0])
def test_lse_aggregation_is_exact_at_extreme_scales(gamma: float) -> None:
    inputs = make_inputs(seed=13) | scalars(aggregation_scale=gamma)
    assert_equal_to_oracle(inputs, 1e-11, aggregation="lse")


def test_bfloat16_inputs_are_computed_in_float32() -> None:
    inputs = make_inputs(4, 5, 20, 9, 3, 32, seed=17)
    names = ("patches", "tokens", "knowledge")
    half = inputs | {name: inputs[name].bfloat16() for name in names}
    wide = inputs | {name: half[name].double() for name in names}
    value = token_knowledge_patch_scores(**half)
    assert value.dtype == torch.float32
    assert relative_error(value, token_knowledge_patch_scores(**wide)) <= 1e-6
    made = half | {name: half[name].requires_grad_() for name in names}
    made_wide = leaves(wide)
    got = gradients(token_knowledge_patch_scores(**made), made)
    want = gradients(token_knowledge_patch_scores(**made_wide), made_wide)
    for name in names:
        assert got[name].dtype == torch.bfloat16
        assert relative_error(got[name], want[name]) <= 2e-3, name  # its own output rounding


def test_the_lowest_of_equal_maxima_takes_the_gradient() -> None:
    patches = torch.tensor([[[0.6, 0.8], [0.6, 0.8], [-1.0, 0.0]]], requires_grad=True)
    tokens = torch.tensor([[[1.0, 0.0]]])
    value = token_knowledge_patch_scores(patches, tokens, pooling="max")
    (grad,) = torch.autograd.grad(value.sum(), [patches])
    assert torch.count_nonzero(grad[0, 0]) == 2
    assert torch.count_nonzero(grad[0, 1:]) == 0


def test_padding_does_not_win_where_every_similarity_is_negative() -> None:
    patches = torch.tensor([[[-1.0, 0.0], [5.0, 5.0]]])
    mask = torch.tensor([[True, False]])
    tokens = torch.tensor([[[1.0, 0.0]]])
    # e^90 is no float32, nor is e^-110: there a row's maximum is subtracted
    for scale in (10.0, 90.0, 110.0):
        for pooling in ("attention", "max", "context"):
            options: dict[str, Any] = {"pooling": pooling, "attention_scale": scale}
            for sign in (1.0, -1.0):
                value = token_knowledge_patch_scores(
                    patches, sign * tokens, patch_mask=mask, **options
                )
                assert value.item() == pytest.approx(-sign)


def test_a_context_that_cancels_to_zero_is_finite() -> None:
    patches = torch.tensor([[[0.0, 1.0], [0.0, -1.0]]], dtype=torch.float64, requires_grad=True)
    tokens = torch.tensor([[[1.0, 0.0]]], dtype=torch.float64, requires_grad=True)
    value = token_knowledge_patch_scores(patches, tokens, pooling="context")
    assert value.item() == 0.0
    for grad in torch.autograd.grad(value.sum(), [patches, tokens]):
        assert torch.isfinite(grad).all()


@pytest.mark.parametrize("budget", [2**14, 1])
@pytest.mark.parametrize(("pooling", "aggregation"), VARIANTS)
def test_tiles_and_recomputation_change_nothing(
    pooling: str, aggregation: str, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the same call in one tile that keeps its similarities."""
    inputs = make_inputs(5, 6, 7, 6, 3, 8, seed=19) | learned()
    options: dict[str, Any] = {"pooling": pooling, "aggregation": aggregation}
    whole = leaves(inputs)
    value = token_knowledge_patch_scores(**whole, **options)
    want = gradients(value, whole)
    monkeypatch.setattr(reference, "MEMORY_BUDGET_BYTES", budget)
    monkeypatch.setattr(reference, "CPU_TILE_ELEMENTS", 100)
    cut = leaves(inputs)
    again = token_knowledge_patch_scores(**cut, **options)
    assert relative_error(again, value) <= MACHINE
    got = gradients(again, cut)
    for name in want:
        assert relative_error(got[name], want[name]) <= MACHINE * 10, name


@pytest.mark.parametrize("budget", [2**20, 2**26])
def test_memory_kept_for_backward_stays_below_the_budget(
    budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the storages that autograd holds between the passes, counted one by one."""
    monkeypatch.setattr(reference, "MEMORY_BUDGET_BYTES", budget)
    inputs = leaves(make_inputs(16, 16, 64, 32, 0, 16, masks=False), torch.float32)
    similarities = 16 * 16 * 64 * 32 * 4
    sizes: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        value = token_knowledge_patch_scores(**inputs)
    assert sum(sizes.values()) <= budget
    assert (sum(sizes.values()) >= similarities) == (budget == 2**26)
    del value


def test_scores_do_not_depend_on_the_other_texts_or_images() -> None:
    inputs = make_inputs(4, 6, 5, 6, 3, 8, seed=23)
    whole = token_knowledge_patch_scores(**inputs)
    part = {
        name: value[1:3] if name in ("patches", "patch_mask") else value[2:5]
        for name, value in inputs.items()
    }
    assert relative_error(token_knowledge_patch_scores(**part), whole[1:3, 2:5]) <= MACHINE


def test_scaling_token_weights_and_adding_padding_changes_nothing() -> None:
    inputs = make_inputs(seed=29)
    value = token_knowledge_patch_scores(**inputs)
    heavier = inputs | {"token_weights": inputs["token_weights"] * 37.0}
    assert relative_error(token_knowledge_patch_scores(**heavier), value) <= MACHINE
    padding = torch.full((4, 3, 8), math.nan, dtype=torch.float64)
    longer = inputs | {
        "tokens": torch.cat([inputs["tokens"], padding], 1),
        "token_weights": torch.cat([inputs["token_weights"], torch.zeros(4, 3).double()], 1),
    }
    assert relative_error(token_knowledge_patch_scores(**longer), value) <= MACHINE


@pytest.mark.parametrize("pooling", ["attention", "context", "max"])
@pytest.mark.parametrize("order", LAYOUTS)
def test_any_strides_are_accepted_forward_and_backward(
    order: tuple[int, int, int], pooling: str
) -> None:
    """Feature maps turned to patches, a sequence first, features first. Oracle: a copy in rows."""
    inputs = make_inputs(seed=31)
    turned = {
        n: laid_out(x, order) if x.ndim == 3 else x.T.contiguous().T for n, x in inputs.items()
    }
    assert not turned["patches"].is_contiguous() and not turned["patch_mask"].is_contiguous()
    made, plain = leaves(turned), leaves(inputs)
    value = token_knowledge_patch_scores(**made, pooling=pooling)
    truth = token_knowledge_patch_scores(**plain, pooling=pooling)
    assert relative_error(value, truth) <= MACHINE
    got, want = gradients(value, made), gradients(truth, plain)
    for name in want:
        assert relative_error(got[name], want[name]) <= 1e-12, name


def test_one_patch_may_stand_for_all() -> None:
    inputs = make_inputs(seed=31)
    one = inputs["patches"][:1, :1]
    spread = token_knowledge_patch_scores(one.expand(1, 5, 8), inputs["tokens"])
    single = token_knowledge_patch_scores(one, inputs["tokens"])
    assert relative_error(spread, single) <= MACHINE


@pytest.mark.parametrize("pooling", ["attention", "context", "max"])
@pytest.mark.parametrize("budget", [2**24, 42 * 2**20, 2**26])
def test_extra_memory_of_forward_and_backward_stays_below_the_budget(
    budget: int, pooling: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: torch's own count of every allocation, less the gradients that are handed out.

    The similarities alone (37 MB) pass the smaller budgets, of which they may take a half, so they
    are made again there.
    """
    monkeypatch.setattr(reference, "MEMORY_BUDGET_BYTES", budget)
    monkeypatch.setattr(reference, "CPU_TILE_ELEMENTS", 2**30)  # the budget alone bounds a tile
    inputs = leaves(make_inputs(48, 48, 64, 64, 2, 16, seed=37), torch.float32)
    wanted = [x for x in inputs.values() if x.requires_grad]

    def step() -> tuple[Tensor, ...]:
        value = token_knowledge_patch_scores(**inputs, pooling=pooling, aggregation="lse")
        return torch.autograd.grad(value.sum(), wanted)

    extra = peak_bytes(step, "cpu") - sum(x.nbytes for x in wanted)
    assert extra <= budget
    if pooling != "max":
        assert (extra > 2**25) == (budget == 2**26), extra  # the similarities were kept, or not


def test_nothing_is_kept_where_no_gradient_will_be_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a leaf autograd says that it needs a gradient, under no_grad too."""
    monkeypatch.setattr(reference, "CPU_TILE_ELEMENTS", 2**14)
    inputs = make_inputs(24, 24, 49, 16, 0, 16, masks=False)
    inputs = {k: v.float() for k, v in inputs.items()}
    scale = torch.nn.Parameter(torch.tensor(10.0))

    def memory(alpha: float | Tensor) -> int:
        run = token_knowledge_patch_scores
        return peak_bytes(lambda: run(**inputs, attention_scale=alpha), "cpu")

    with torch.no_grad():
        assert memory(scale) <= memory(10.0) + 4096
    assert memory(scale) > 1.5 * memory(10.0)
