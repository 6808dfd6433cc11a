"""Drawn partners: who may be drawn, how often, and on what the draw depends."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from mlip.batch import ABSENT, PRESENT, UNCERTAIN, Batch
from mlip.losses.context import LossContext, present_set_hash
from mlip.losses.partner import draw_partners
from tests.losses.loss_inputs import (
    EMPTY,
    PAIRS,
    FakeScales,
    context_of,
    make_batch,
    make_leaves,
    rows_of,
)


def _cosine(context: LossContext) -> Tensor:
    image, text = context.views_all[0], context.views_all[1]
    return image @ text.T


def _sets(batch: Batch) -> list[frozenset[int]]:
    return [
        frozenset(
            int(e)
            for e, s, m in zip(ids, states, mask, strict=True)
            if bool(m) and int(s) == PRESENT
        )
        for ids, states, mask in zip(
            batch.entity_ids, batch.entity_state, batch.entity_mask, strict=True
        )
    ]


def _allowed(batch: Batch) -> Tensor:
    """Oracle: Python sets."""
    sets, ids = _sets(batch), batch.pair_id.tolist()
    allowed = [
        [ids[i] != ids[j] and sets[i] != sets[j] and j != EMPTY for j in range(PAIRS)]
        for i in range(PAIRS)
    ]
    return torch.tensor(allowed)


def test_the_batch_of_these_tests_holds_the_awkward_cases() -> None:
    sets = _sets(make_batch())
    assert sets[1] == sets[6] and not sets[3] and not sets[EMPTY]


def test_allowed_partners_are_those_of_python_sets() -> None:
    batch = make_batch()
    assert torch.equal(context_of(make_leaves(), batch).partner_allowed, _allowed(batch))


def test_a_report_of_denied_findings_alone_is_empty() -> None:
    # their weight is 0: no row of the local score, so neither an anchor nor a partner
    batch = make_batch()
    batch.entity_mask[EMPTY] = True
    for state, is_valid in ((ABSENT, False), (UNCERTAIN, True)):
        batch.entity_state[EMPTY] = state
        valid = context_of(make_leaves(), batch).text_valid
        assert valid.tolist() == [i != EMPTY or is_valid for i in range(PAIRS)]


def test_hash_ignores_order_repeats_absent_and_masked_mentions() -> None:
    batch = make_batch()
    sets, hashes = _sets(batch), present_set_hash(batch).tolist()
    for i in range(PAIRS):
        for j in range(PAIRS):
            assert (hashes[i] == hashes[j]) == (sets[i] == sets[j]), (i, j)
    assert hashes[EMPTY] == 0


def test_no_two_of_three_thousand_sets_share_a_hash() -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 300, (3_000, 6), generator=generator)
    # the first concept of the table counts like any other
    ids[:3] = torch.tensor([[0] * 6, [0] + [1] * 5, [1] * 6])
    rows = torch.zeros(3_000, dtype=torch.int64)
    full = torch.ones_like(ids)
    batch = dataclasses.replace(
        make_batch(),
        entity_ids=ids,
        entity_state=torch.full_like(ids, PRESENT),
        entity_mask=full.bool(),
        pair_id=rows,
    )
    assert len(set(present_set_hash(batch).tolist())) == len(set(_sets(batch)))


@pytest.mark.parametrize("scale", [5.0, 100.0])
def test_partners_follow_the_softmax_over_what_is_allowed(
    scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    # oracle: the masked softmax; with the uniforms on an even grid of 400 every share is exact to
    # one grid point at each of its two ends. 100 is the most that a scale may be: e^100 is far
    # above the integers that hold the probabilities
    batch, leaves, points = make_batch(), make_leaves(), 400
    context = context_of(leaves, batch, FakeScales(scale).double())
    cosine = _cosine(context)
    counts = torch.zeros(PAIRS, PAIRS, dtype=torch.float64)
    for point in range(points):
        uniform = torch.full((PAIRS, 1), (point + 0.5) / points, dtype=torch.float64)
        monkeypatch.setattr("mlip.losses.partner.keyed_uniform", lambda *_, u=uniform: u)
        counts[torch.arange(PAIRS), draw_partners(context, "match_text", cosine)] += 1
    logits = context.scales.logit_scale().detach() * cosine
    expected = logits.masked_fill(~_allowed(batch), -torch.inf).softmax(dim=1)
    counted = context.has_partner
    assert counted.tolist() == [i != EMPTY for i in range(PAIRS)]
    share = (counts / points)[counted]
    assert float((share - expected[counted]).abs().max()) <= 1 / points + 1e-9


def test_partners_vary_over_steps_and_samples() -> None:
    batch, leaves = make_batch(), make_leaves()
    context = context_of(leaves, batch)
    even = torch.zeros(PAIRS, PAIRS)
    drawn = []
    for step in range(60):
        context.step = step
        drawn.append(draw_partners(context, "match_text", even)[context.has_partner])
    table = torch.stack(drawn)
    # 60 even draws among at least 5 candidates miss one of them with probability below 1e-5
    assert all(len(column.unique()) >= 5 for column in table.T)


def test_a_draw_does_not_depend_on_the_order_of_pairs() -> None:
    batch, leaves = make_batch(), make_leaves()
    plain = context_of(leaves, batch)
    drawn = batch.global_index[draw_partners(plain, "swap_partner", _cosine(plain))]
    order = torch.randperm(PAIRS, generator=torch.Generator().manual_seed(3))
    moved_batch = rows_of(batch, order)
    moved = context_of({n: v[order] for n, v in leaves.items()}, moved_batch)
    other = moved_batch.global_index[draw_partners(moved, "swap_partner", _cosine(moved))]
    counted = plain.has_partner[order]
    assert torch.equal(other[counted], drawn[order][counted])


def test_extreme_scales_and_equal_scores_still_draw_only_allowed_partners() -> None:
    batch, leaves = make_batch(), make_leaves(dtype=torch.float32)
    context = context_of(leaves, batch)
    allowed, counted = _allowed(batch), context.has_partner
    for cosine in (torch.zeros(PAIRS, PAIRS), _cosine(context) * 1e4, -1e4 * _cosine(context)):
        for step in range(50):
            context.step = step
            drawn = draw_partners(context, "match_image", cosine)
            assert bool(allowed[torch.arange(PAIRS), drawn][counted].all())


@pytest.mark.parametrize(("uniform", "position"), [(1e-17, 0), (1.0, -1)])
def test_the_ends_of_the_unit_interval_draw_the_first_and_last_allowed(
    uniform: float, position: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # by hand: nothing that is not allowed lies at either end of the distribution function
    batch = make_batch()
    context = context_of(make_leaves(), batch)
    ends = torch.full((PAIRS, 1), uniform, dtype=torch.float64)
    monkeypatch.setattr("mlip.losses.partner.keyed_uniform", lambda *_: ends)
    drawn = draw_partners(context, "match_text", torch.zeros(PAIRS, PAIRS))
    for row in range(PAIRS):
        if bool(context.has_partner[row]):
            assert int(drawn[row]) == int(_allowed(batch)[row].nonzero()[position])
