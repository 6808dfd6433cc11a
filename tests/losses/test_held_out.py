"""Scores of held-out pairs against the evaluation's own ranks, and what they leave alone."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from mlip.losses.held_out import recall_terms
from mlip.objective import Objective
from mlip.transfer.alignment.retrieval import first_right_rank
from tests.losses.loss_inputs import FakeModel, config_of, make_batch


def _context(seed: int, *, pairs: int = 40, dim: int = 4, levels: int = 0) -> Any:
    """A context of N pairs, some of one pair_id, some without a report; levels > 0 makes ties."""
    generator = torch.Generator().manual_seed(seed)
    views = torch.randn(3, pairs, dim, generator=generator)
    if levels:
        views = (views * levels).round().clamp(-1, 1) + 0.25
    pair_id = torch.randint(0, pairs * 2 // 3, (pairs,), generator=generator)
    valid = torch.rand(pairs, generator=generator) > 0.2
    return SimpleNamespace(views_all=views, pair_id_N=pair_id, text_valid_N=valid)


@pytest.mark.parametrize("levels", [0, 1])
@pytest.mark.parametrize("at", [1, 3, 10])
def test_recall_is_that_of_the_evaluation(levels, at):
    # oracle: first_right_rank over the pairs that have a report
    for seed in range(20):
        context = _context(seed, levels=levels)
        kept = context.text_valid_N
        image, text, _ = (view[kept].double().numpy() for view in context.views_all)
        pairs = context.pair_id_N[kept].numpy()
        scores = _rounded(image @ text.T)
        found = recall_terms(context, at=at)
        for name, matrix in (("image to text", scores), ("text to image", scores.T)):
            expected = np.mean(first_right_rank(matrix, pairs, pairs) <= at)
            assert float(found[f"recall@{at} {name}"]) == pytest.approx(expected)


def _rounded(scores: np.ndarray) -> np.ndarray:
    """Ties of float32 are ties; here they are sums of a few quarters, exact in both."""
    return scores.round(5)


def test_collapsed_and_broken_embeddings_find_nothing():
    context = _context(1)
    context.text_valid_N = torch.ones(40, dtype=torch.bool)
    context.pair_id_N = torch.arange(40)
    for value in (0.5, float("nan")):
        context.views_all = torch.full((3, 40, 4), value)
        assert all(float(share) == 0.0 for share in recall_terms(context).values())
    context.text_valid_N = torch.zeros(40, dtype=torch.bool)  # nothing to ask
    assert all(float(share) == 0.0 for share in recall_terms(context).values())


def test_held_out_pairs_are_scored_by_the_contrastive_losses_alone():
    torch.manual_seed(0)
    objective = Objective(config_of("loss.global_contrastive.weight=2"), FakeModel()).double()
    batch = make_batch()
    batch = dataclasses.replace(batch, image=batch.image.double())
    objective(batch, step=3, progress=2.0)  # so that buffers hold something
    before = {name: value.clone() for name, value in objective.named_buffers()}
    generator = torch.get_rng_state()
    objective.eval()
    with torch.no_grad():
        total, terms = objective(batch, step=0, progress=0.0, held_out=True)
        again, _ = objective(batch, step=9, progress=5.0, held_out=True)
    losses = {n: v for n, v in terms.items() if not n.startswith("recall@")}
    assert set(losses) == {"global_contrastive", "local_alignment"}
    assert float(total) == float(2 * losses["global_contrastive"] + losses["local_alignment"])
    assert float(again) == float(total)  # no step in it: nothing is drawn
    assert torch.equal(generator, torch.get_rng_state())
    for name, value in objective.named_buffers():
        assert torch.equal(value, before[name]), name
    assert len(terms) == 4 and all(0.0 <= float(v) <= 1.0 for n, v in terms.items() if "@" in n)
