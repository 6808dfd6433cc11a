"""What holds for every loss alike: gradients, order, masks, empty reports, nothing to do."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn as nn
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mlip.losses import LOSSES
from mlip.losses.category import Category
from tests.losses.loss_inputs import (
    DIM,
    EMPTY,
    LEAVES,
    PAIRS,
    FakeScales,
    config_of,
    context_of,
    make_batch,
    make_leaves,
    rows_of,
    with_grad,
)

CASES = {
    "global_contrastive": ("global_contrastive", []),
    "global_dropout": ("global_contrastive", ["model.divergence.kind=dropout"]),
    "local_alignment": ("local_alignment", []),
    "local_mgca": ("local_alignment", ["loss.local_alignment.kind=mgca"]),
    "category": ("category", []),
    "matching": ("matching", []),
    # a margin that keeps every hinge open, so that gradients are not 0 by luck
    "swapping": ("swapping", ["loss.swapping.probability=1.0", "loss.swapping.margin=3.0"]),
}


def _make(case: str) -> nn.Module:
    name, overrides = CASES[case]
    torch.manual_seed(1)
    loss = LOSSES[name](config_of(*overrides), DIM).double()
    with torch.no_grad():
        for parameter in loss.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return loss


def test_every_loss_has_a_case() -> None:
    assert {name for name, _ in CASES.values()} == set(LOSSES)


@pytest.mark.parametrize("case", CASES)
def test_gradients_agree_with_finite_differences(case: str) -> None:
    loss, scales, batch = _make(case), FakeScales().double(), make_batch()
    if isinstance(loss, Category):
        # codes have no gradient by definition: held fixed, else the difference quotient moves them
        codes = loss._codes(
            context_of(make_leaves(), batch, scales), nn.functional.normalize(loss.prototypes)
        )
        loss._codes = lambda *_: codes
    parameters = [p for p in [*loss.parameters(), *scales.parameters()]]

    def value(*tensors: Tensor) -> Tensor:
        context = context_of(dict(zip(LEAVES, tensors[:5], strict=True)), batch, scales)
        return loss(context) + sum(context.regularisers.values())

    leaves = with_grad(make_leaves())
    used = [p for p in parameters if p.requires_grad]
    assert torch.autograd.gradcheck(value, (*leaves.values(), *used), fast_mode=True)


@pytest.mark.parametrize("case", CASES)
def test_loss_is_invariant_to_pair_order(case: str) -> None:
    batch, leaves = make_batch(), make_leaves()
    order = torch.randperm(PAIRS, generator=torch.Generator().manual_seed(2))
    plain = _make(case)(context_of(leaves, batch))
    moved = {n: v[order] for n, v in leaves.items()}
    other = _make(case)(context_of(moved, rows_of(batch, order)))
    # 1e-7: the category codes are made in float32
    torch.testing.assert_close(other, plain, rtol=1e-7, atol=0.0)


@pytest.mark.parametrize("case", CASES)
def test_what_a_mask_hides_changes_nothing_and_gets_no_gradient(case: str) -> None:
    batch, clean = make_batch(), make_leaves()
    dirty = {n: v.clone() for n, v in clean.items()}
    dirty["tokens"][~batch.content_mask] = torch.nan
    dirty["entities"][~batch.entity_mask] = torch.inf
    grads, values = [], []
    for leaves in (with_grad(clean), with_grad(dirty)):
        value = _make(case)(context_of(leaves, batch))
        value.backward()
        values.append(value.detach())
        grads.append({n: v.grad for n, v in leaves.items()})
    torch.testing.assert_close(values[1], values[0], rtol=0.0, atol=0.0)
    torch.testing.assert_close(grads[1], grads[0], rtol=0.0, atol=0.0)
    tokens, entities = grads[1]["tokens"], grads[1]["entities"]
    assert tokens is None or not bool(tokens[~batch.content_mask].any())
    assert entities is None or not bool(entities[~batch.entity_mask].any())


@pytest.mark.parametrize("case", ["local_alignment", "local_mgca", "matching", "swapping"])
def test_an_empty_report_gets_no_gradient(case: str) -> None:
    leaves = with_grad(make_leaves())
    _make(case)(context_of(leaves, make_batch())).backward()
    for name in ("text", "tokens", "entities"):
        grad = leaves[name].grad
        assert grad is None or not bool(grad[EMPTY].any()), name


@pytest.mark.parametrize("case", ["local_alignment", "local_mgca", "matching", "swapping"])
def test_only_empty_reports_give_zero_with_zero_gradients(case: str) -> None:
    batch = make_batch()
    nothing = {"content_mask": torch.zeros_like(batch.content_mask),
               "entity_mask": torch.zeros_like(batch.entity_mask)}  # fmt: skip
    leaves, loss = with_grad(make_leaves()), _make(case)
    value = loss(context_of(leaves, dataclasses.replace(batch, **nothing)))
    assert float(value.detach()) == 0.0
    value.backward()
    used = [*leaves.values(), *loss.parameters()]
    assert all(p.grad is None or not bool(p.grad.any()) for p in used)


@pytest.mark.parametrize("case", ["matching", "swapping"])
def test_without_any_possible_partner_the_term_is_zero(case: str) -> None:
    batch = make_batch()
    leaves = with_grad(make_leaves())
    alike = dataclasses.replace(batch, pair_id=torch.zeros_like(batch.pair_id))
    value = _make(case)(context_of(leaves, alike))
    assert float(value.detach()) == 0.0
    value.backward()
    assert all(v.grad is None or not bool(v.grad.any()) for v in leaves.values())


@pytest.mark.parametrize("case", CASES)
def test_loss_is_the_same_at_the_same_step_and_finite_in_float32(case: str) -> None:
    batch = make_batch()
    leaves = make_leaves(dtype=torch.float32)
    scales = FakeScales()

    def run() -> Any:
        return _make(case).float()(context_of(leaves, batch, scales, step=11)).detach()

    first = run()
    assert first.dtype == torch.float32 and bool(first.isfinite())
    assert torch.equal(first, run())


class _NarrowExponentials(TorchDispatchMode):
    """Notes every exponential, softmax and logarithm whose result has 16 bits."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.__name__.split(".")[0].strip("_")
        is_one = name in ("exp", "log", "softmax", "log_softmax", "logsumexp", "softplus")
        if is_one and isinstance(out, Tensor) and out.dtype in (torch.bfloat16, torch.float16):
            self.found.append(name)
        return out


@pytest.mark.parametrize("case", CASES)
def test_exponentials_are_float32_whatever_the_parameters_are(case: str) -> None:
    # method.md: all softmax, log-sum-exp and loss arithmetic in float32 or better
    leaves = {n: x.bfloat16() for n, x in make_leaves(dtype=torch.float32).items()}
    with _NarrowExponentials() as seen:
        value = _make(case).bfloat16()(context_of(leaves, make_batch(), FakeScales()))
    assert value.dtype == torch.float32 and seen.found == []


@pytest.mark.parametrize("case", ["global_contrastive", "local_alignment", "category", "swapping"])
def test_gradient_steps_from_perfect_alignment_do_not_pay(case: str) -> None:
    # oracle: text = image and every token of a report = its patches is no worse than 20 random
    # departures of the text side from it
    batch, leaves = make_batch(), make_leaves()
    basis = torch.eye(PAIRS, DIM, dtype=torch.float64)
    basis[-1] = -1.0
    leaves["image"] = leaves["text"] = basis
    for name in ("patches", "tokens", "entities"):
        leaves[name] = basis[:, None].expand_as(leaves[name]).clone()
    distinct = dataclasses.replace(batch, pair_id=torch.arange(PAIRS))
    generator = torch.Generator().manual_seed(4)

    def run(values: dict[str, Tensor]) -> float:
        loss = _make(case).eval()
        if isinstance(loss, Category):
            loss.prototypes.data = basis[:6]
        return float(loss(context_of(values, distinct)).detach())

    best = run(leaves)
    for _ in range(20):
        moved = dict(leaves)
        for name in ("text", "tokens"):
            noise = torch.randn(leaves[name].shape, generator=generator, dtype=torch.float64)
            moved[name] = leaves[name] + noise
        assert run(moved) > best - 1e-12
