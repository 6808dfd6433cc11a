"""Category level: codes, queue, frozen start, and the terms that are there."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor

from mlip.losses.category import ENTITIES, Category, sinkhorn
from tests.losses.loss_inputs import (
    DIM,
    PAIRS,
    config_of,
    context_of,
    make_batch,
    make_leaves,
    rows_of,
    with_grad,
)


def _make(*overrides: str, dim: int = DIM) -> Category:
    torch.manual_seed(0)
    return Category(config_of(f"model.embed_dim={dim}", *overrides), dim).double()


def _cosine(views: int = 2, samples: int = 12, columns: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(views, samples, 4, generator=generator)
    columns_CD = torch.randn(columns, 4, generator=generator)
    unit = torch.nn.functional.normalize
    return unit(rows, dim=-1) @ unit(columns_CD, dim=-1).T


def _plain_sinkhorn(cosine: Tensor, temperature: float, iterations: int) -> Tensor:
    """SwAV's algorithm as published, in float64: scale columns, then rows."""
    q = torch.exp(cosine.double() / temperature)
    q = q / q.sum()
    samples, columns = q.shape
    for _ in range(iterations):
        q = q / q.sum(dim=0, keepdim=True) / columns
        q = q / q.sum(dim=1, keepdim=True) / samples
    return q * samples


# 0.05 takes the scaling form, 0.02 the log-space form
@pytest.mark.parametrize("temperature", [0.05, 0.02])
@pytest.mark.parametrize("iterations", [1, 3])
def test_codes_equal_the_published_algorithm_in_float64(
    temperature: float, iterations: int
) -> None:
    cosine = _cosine()
    valid = torch.ones(2, 12, dtype=torch.bool)
    code = sinkhorn(cosine, valid, temperature=temperature, iterations=iterations, rows=slice(3, 9))
    for view in range(2):
        expected = _plain_sinkhorn(cosine[view], temperature, iterations)[3:9]
        torch.testing.assert_close(code[view].double(), expected, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("temperature", [0.05, 0.02])
def test_rows_sum_to_one_and_columns_balance(temperature: float) -> None:
    code = sinkhorn(
        _cosine(),
        torch.ones(2, 12, dtype=torch.bool),
        temperature=temperature,
        iterations=2000,
        rows=slice(None),
    )
    torch.testing.assert_close(code.sum(dim=2), torch.ones(2, 12))
    torch.testing.assert_close(code.sum(dim=1), torch.full((2, 5), 12 / 5), rtol=1e-3, atol=0.0)


@pytest.mark.parametrize("temperature", [0.05, 0.02])
def test_invalid_rows_are_zero_and_do_not_count(temperature: float) -> None:
    cosine = _cosine()
    valid = torch.ones(2, 12, dtype=torch.bool)
    valid[0, [2, 7]] = False
    valid[1] = False
    dirty = cosine.clone()
    dirty[0, 2] = torch.nan
    keys = {"temperature": temperature, "iterations": 3, "rows": slice(None)}
    code = sinkhorn(dirty, valid, **keys)  # type: ignore[arg-type]
    assert not bool(code[~valid].any())
    kept = valid[0]
    alone = sinkhorn(cosine[:1, kept], valid[:1, kept], **keys)  # type: ignore[arg-type]
    torch.testing.assert_close(code[0, kept], alone[0])


@pytest.mark.parametrize("temperature", [0.05, 0.034, 0.02, 0.001])
def test_codes_stay_finite_where_one_prototype_is_far_from_everyone(temperature: float) -> None:
    cosine = torch.ones(1, 64, 8)
    cosine[..., 0] = -1.0
    code = sinkhorn(
        cosine,
        torch.ones(1, 64, dtype=torch.bool),
        temperature=temperature,
        iterations=3,
        rows=slice(None),
    )
    # equal rows can only share every prototype equally
    torch.testing.assert_close(code, torch.full_like(code, 1 / 8), rtol=1e-4, atol=0.0)


def test_known_value_of_two_samples_on_two_prototypes() -> None:
    # by hand: prototypes are the axes and the samples lie on them, so balancing changes nothing;
    # q = sigmoid(+-1/0.05), p = sigmoid(+-1/0.2) for every view
    loss = _make("loss.category.prototypes=2", dim=2).eval()
    loss.prototypes.data = 3.0 * torch.eye(2, dtype=torch.float64)
    batch = rows_of(make_batch(), slice(2))
    leaves = {n: v[:2, ..., :2] for n, v in make_leaves().items()}
    leaves["image"] = leaves["text"] = torch.eye(2, dtype=torch.float64)
    leaves["entities"] = leaves["image"][:, None].expand_as(leaves["entities"])
    q, p = 1 / (1 + math.exp(-20.0)), 1 / (1 + math.exp(-5.0))
    expected = -(q * math.log(p) + (1 - q) * math.log(1 - p))
    assert math.isclose(float(loss(context_of(leaves, batch)).detach()), expected, rel_tol=1e-6)


def _terms(loss: Category, leaves: dict[str, Tensor], names: str) -> float:
    """Oracle: the mean of cross-entropies, term by term, over the samples that have them."""
    context = context_of(leaves, make_batch())
    prototypes = torch.nn.functional.normalize(loss.prototypes.detach(), dim=1)
    views = dict(zip("vtr", context.views_all, strict=True))
    valid = {n: torch.ones(PAIRS, dtype=torch.bool) for n in "vt"}
    valid["r"] = context.has_present_N
    values: list[Tensor] = []
    for name in names.split():
        code_view, view = name[0], name[1]
        keep = valid[code_view]
        code = torch.zeros(PAIRS, len(prototypes), dtype=torch.float64)
        code[keep] = _plain_sinkhorn(views[code_view][keep] @ prototypes.T, 0.05, 3)
        log_p = torch.log_softmax(views[view] @ prototypes.T / 0.2, dim=1)
        values += [*(-(code * log_p).sum(dim=1)[keep])]
    return float(torch.stack(values).mean())


def test_samples_without_present_entities_drop_the_knowledge_terms() -> None:
    loss, leaves = _make().eval(), make_leaves()
    value = float(loss(context_of(leaves, make_batch())).detach())
    assert math.isclose(value, _terms(loss, leaves, "tv vt rv rt"), rel_tol=1e-5)


def test_plain_prototypes_have_two_terms() -> None:
    loss, leaves = _make("loss.category.knowledge_terms=false").eval(), make_leaves()
    value = float(loss(context_of(leaves, make_batch())).detach())
    assert math.isclose(value, _terms(loss, leaves, "tv vt"), rel_tol=1e-5)
    assert loss.queue.shape[0] == 2


def test_queued_features_take_part_in_balancing_only() -> None:
    loss, leaves, batch = _make(), make_leaves(), make_batch()
    loss(context_of(leaves, batch))
    queued = copy.deepcopy(loss)
    first = float(queued(context_of(make_leaves(1), batch)).detach())
    fresh = float(_make()(context_of(make_leaves(1), batch)).detach())
    assert abs(first - fresh) > 1e-4
    prototypes = torch.nn.functional.normalize(loss.prototypes.detach(), dim=1)
    both = torch.cat(
        [context_of(make_leaves(s), batch).views_all[0] @ prototypes.T for s in (1, 0)]
    )
    expected = _plain_sinkhorn(both, 0.05, 3)[:PAIRS]
    codes = loss._codes(context_of(make_leaves(1), batch), prototypes)
    torch.testing.assert_close(codes[0].double(), expected, rtol=1e-4, atol=1e-6)


def test_the_queue_keeps_the_last_four_per_prototype_newest_first() -> None:
    loss, batch = _make("loss.category.prototypes=4"), make_batch()
    views = []
    for step in range(3):
        context = context_of(make_leaves(step), batch)
        loss(context)
        views.append(context.views_all)
    expected = torch.cat(views[::-1], dim=1)[:, :16]
    assert torch.equal(loss.queue, expected)
    has_present = torch.cat([context.has_present_N] * 3)[:16]
    assert torch.equal(loss.queue_valid[ENTITIES], has_present)
    assert bool(loss.queue_valid[:ENTITIES].all())


def test_a_large_batch_leaves_the_queue_alone_and_evaluation_does_too() -> None:
    large = _make("loss.category.prototypes=2")
    large(context_of(make_leaves(), make_batch()))
    waiting = _make().eval()
    waiting(context_of(make_leaves(), make_batch()))
    assert not bool(large.queue_valid.any()) and not bool(waiting.queue_valid.any())


def test_features_that_are_not_finite_never_enter_the_queue() -> None:
    loss, leaves = _make(), make_leaves()
    leaves["image"][3] = torch.nan
    loss(context_of(leaves, make_batch()))
    assert bool(loss.queue.isfinite().all())
    assert loss.queue_valid[0, :PAIRS].tolist() == [i != 3 for i in range(PAIRS)]
    assert bool(loss(context_of(make_leaves(1), make_batch())).isfinite())


def test_a_saved_state_continues_with_the_same_value() -> None:
    loss = _make()
    loss(context_of(make_leaves(), make_batch()))
    other = _make()
    other.load_state_dict(loss.state_dict())
    assert torch.equal(
        other(context_of(make_leaves(1), make_batch())),
        loss(context_of(make_leaves(1), make_batch())),
    )


def test_prototypes_are_frozen_in_the_first_epoch_and_features_are_not() -> None:
    loss = _make("loss.category.freeze_epochs=1.0")
    for progress, moves in ((0.0, False), (0.99, False), (1.0, True)):
        leaves = with_grad(make_leaves())
        loss.zero_grad()
        loss(context_of(leaves, make_batch(), progress=progress)).backward()
        grad = loss.prototypes.grad
        assert grad is not None and bool(grad.any()) == moves
        assert leaves["image"].grad is not None and bool(leaves["image"].grad.any())


def test_the_length_of_prototypes_does_not_matter_and_is_not_changed_in_place() -> None:
    loss = _make().eval()
    value = loss(context_of(make_leaves(), make_batch()))
    loss.prototypes.data *= 7.0
    before = loss.prototypes.detach().clone()
    torch.testing.assert_close(loss(context_of(make_leaves(), make_batch())), value)
    assert torch.equal(loss.prototypes, before)


def test_prototypes_start_from_given_vectors_at_unit_length() -> None:
    loss = _make("loss.category.prototypes=3")
    vectors = torch.randn(3, DIM, dtype=torch.float64)
    loss.initialise(vectors)
    torch.testing.assert_close(
        loss.prototypes.detach(), torch.nn.functional.normalize(vectors, dim=1)
    )
    with pytest.raises(ValueError, match=r"\[3, 8\].*loss.category.prototypes.*\[2, 8\]"):
        loss.initialise(vectors[:2])
