"""Text swapping: the margin, the share of swapped samples, and the local score's part."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mlip.losses.context import LossContext
from mlip.losses.swapping import Swapping
from tests.losses.loss_inputs import (
    DIM,
    PAIRS,
    FakeScales,
    config_of,
    features_of,
    make_batch,
    make_leaves,
    rows_of,
)

ALWAYS = "loss.swapping.probability=1.0"


def _context(
    cosine: float, scores: Tensor | None, step: int = 0, rows: slice = slice(1, 3)
) -> LossContext:
    """Two pairs with v_i . t_i = 1 and v_i . t_j = cosine (the pairs' texts mirror each other)."""
    batch = rows_of(make_batch(), rows)
    leaves = {n: v[rows] for n, v in make_leaves().items()}
    if rows == slice(1, 3):
        first = torch.zeros(DIM, dtype=torch.float64)
        first[0] = 1.0
        second = first * cosine
        second[1] = math.sqrt(1 - cosine**2)
        leaves["image"] = leaves["text"] = torch.stack([first, second])
    return LossContext(
        features_of(leaves, batch),
        batch,
        scales=FakeScales().double(),
        seed=0,
        step=step,
        progress=0.0,
        local_scores=lambda group: scores,
    )


def test_known_value_of_two_pairs() -> None:
    # by hand: sim true = 1 + 0.5 * 0.2, sim swapped = 0.8 + 0.5 * 0.3; 0.4 - 1.1 + 0.95 = 0.25
    scores = torch.tensor([[0.2, 0.3], [0.3, 0.2]]).double()
    value = Swapping(config_of(ALWAYS), DIM)(_context(0.8, scores))
    assert math.isclose(float(value), 0.25, rel_tol=1e-6)


def test_pairs_apart_by_the_margin_cost_nothing() -> None:
    scores = torch.zeros(2, 2).double()
    assert float(Swapping(config_of(ALWAYS), DIM)(_context(0.59, scores))) == 0.0
    assert math.isclose(
        float(Swapping(config_of(ALWAYS), DIM)(_context(0.61, scores))), 0.01, rel_tol=1e-6
    )


def test_a_local_share_of_zero_asks_for_no_scores() -> None:
    loss = Swapping(config_of(ALWAYS, "loss.swapping.local_share=0.0"), DIM)
    assert math.isclose(float(loss(_context(0.8, None)).detach()), 0.2, rel_tol=1e-6)


def test_the_share_of_swapped_samples_is_the_probability_and_zero_swaps_none() -> None:
    # oracle: with margin 100 every swapped sample costs about 100, an unswapped one does not count;
    # the count is read from the gradient: samples not swapped have none
    loss = Swapping(config_of("loss.swapping.margin=100.0", "loss.swapping.probability=0.3"), DIM)
    swapped = 0
    for step in range(200):
        scores = torch.zeros(PAIRS, PAIRS).double().requires_grad_()
        loss(_context(0.0, scores, step, slice(None))).backward()
        assert scores.grad is not None
        swapped += int((scores.grad.diagonal() != 0).sum())
    # 200 x 8 draws (the empty report never swaps): standard error 0.0115
    assert abs(swapped / 1600 - 0.3) < 0.05
    never = Swapping(config_of("loss.swapping.probability=0.0"), DIM)
    assert float(never(_context(0.8, torch.zeros(2, 2).double()))) == 0.0
