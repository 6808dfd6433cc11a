"""Muon: its direction against the SVD, its step against torch's, its place in the engines."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn as nn

from mlip.settings.config import ConfigError, load
from mlip.training.muon import Muon, matrix_names, orthogonalised
from tests import rank_farm
from tests.training.exact_step import exact_engine
from tests.training.muon_ranks import MORE, MUON, PAIRS, STEPS, muon_engine, run_engines, train


@pytest.mark.parametrize("shape", [(3, 16, 40), (2, 40, 16), (1, 32, 32)])
def test_the_direction_is_that_of_the_svd_with_singular_values_near_one(shape):
    torch.manual_seed(0)
    matrices = torch.randn(shape, dtype=torch.float64)
    found = orthogonalised(matrices)
    left, values, right = torch.linalg.svd(matrices, full_matrices=False)
    # in the matrix's own singular bases: diagonal, positive, near 1
    inside = left.mT @ found @ right.mT
    diagonal = torch.diagonal(inside, dim1=1, dim2=2)
    assert (inside - torch.diag_embed(diagonal)).abs().max() < 1e-9
    is_large = values > 0.02 * values[:, :1]  # five rounds lift what is smaller less
    assert diagonal[is_large].min() > 0.6 and diagonal.max() < 1.3


def test_bfloat16_gives_the_same_direction_to_a_twentieth():
    # what a GPU computes in
    torch.manual_seed(3)
    matrices = torch.randn(2, 24, 40)
    found = orthogonalised(matrices.bfloat16()).float()
    expected = orthogonalised(matrices)
    # 0.034: five rounds of products with 8 bits; singular values move by up to 0.026
    assert (found - expected).norm() < 0.05 * expected.norm()
    values, exact = torch.linalg.svdvals(found), torch.linalg.svdvals(expected)
    assert (values - exact).abs().max() < 0.05
    weight = nn.Parameter(torch.zeros(24, 40))
    weight.data.add_(found[0].bfloat16(), alpha=0.1)  # a float32 weight takes it
    assert weight.dtype == torch.float32 and weight.any()


def test_a_zero_matrix_has_no_direction():
    assert not orthogonalised(torch.zeros(1, 16, 16)).any()


def test_a_step_is_that_of_torchs_own_muon():
    torch_muon = getattr(torch.optim, "Muon", None)
    if torch_muon is None:
        pytest.skip("this torch has no Muon of its own")
    torch.manual_seed(1)
    start = torch.randn(24, 48)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    muon = Muon(
        [{"params": [ours], "is_matrix": True, "weight_decay": 0.1}],
        momentum=0.95, lr=0.02, fused=True,
    )  # fmt: skip
    oracle = torch_muon(
        [theirs], lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    for _ in range(3):
        ours.grad = torch.randn_like(start)
        theirs.grad = ours.grad.clone()
        muon.step()
        oracle.step()
    # torch's direction is in bfloat16: a hundredth of what the weight moved
    moved = (theirs - start).abs().max()
    assert (ours - theirs).abs().max() < 0.03 * moved


def test_a_convolution_counts_as_the_matrix_of_its_outputs():
    torch.manual_seed(2)
    weight = torch.randn(32, 16, 3, 3)
    whole = nn.Parameter(weight.clone(memory_format=torch.channels_last))
    flat = nn.Parameter(weight.flatten(1).clone())
    gradient = torch.randn_like(weight)
    for parameter, grad in ((whole, gradient), (flat, gradient.flatten(1))):
        parameter.grad = grad.clone()
        groups = [{"params": [parameter], "is_matrix": True, "weight_decay": 0.0}]
        Muon(groups, momentum=0.9, lr=0.1, fused=True).step()
    assert torch.equal(whole.flatten(1), flat)


def test_a_matrix_without_a_gradient_stays_and_a_skipped_step_counts_as_none():
    idle, moved = (nn.Parameter(torch.ones(16, 16)) for _ in range(2))
    groups = [{"params": [idle, moved], "is_matrix": True, "weight_decay": 0.1}]
    optimizer: Any = Muon(groups, momentum=0.9, lr=0.1, fused=True)
    for found in (0.0, 1.0, 0.0):
        moved.grad = torch.eye(16)
        optimizer.found_inf = torch.tensor(found)
        optimizer.step()
    assert torch.equal(idle, torch.ones(16, 16)) and idle not in optimizer.state
    assert not torch.equal(moved, torch.ones(16, 16))
    assert float(optimizer.state[moved]["step"]) == 2.0


def test_adamw_moves_what_is_no_matrix_of_a_layer():
    engine = exact_engine(PAIRS, more=MUON)
    names = matrix_names(engine.objective)
    assert any("query" in name for name in names)
    for name in names:
        assert name.endswith("weight") and engine.parameters[name].ndim >= 2
    for part in ("embedding", "norm", "bias", "prototypes", "position", "stored"):
        left = {n for n in names if part in n.lower() and "patch_embeddings" not in n}
        assert not left, left
    # logits of two classes: no sixteen directions
    (classifier,) = [n for n in engine.parameters if n.endswith("matching.classifier.weight")]
    assert classifier not in names
    train(engine, 0, 1)
    state = engine.state()
    assert set(state.moments["exp_avg"]) == set(engine.parameters)
    assert set(engine.parameters) - set(state.moments["exp_avg_sq"]) == names


def test_two_ranks_of_both_engines_equal_one_process(tmp_path):
    out = tmp_path / "found.pt"
    rank_farm.run(run_engines, 2, str(out))  # which holds a resumed run to the bit
    found = torch.load(out, weights_only=True)
    alone = muon_engine("plain")
    losses = train(alone, 0, STEPS)
    parameters = {n: t.clone() for n, t in alone.state().parameters.items()}
    losses += train(alone, STEPS, MORE)
    for name, other in found.items():
        torch.testing.assert_close(other["losses"], losses, rtol=1e-5, atol=0.0, msg=name)
        # the matrices; AdamW divides a key bias's rounding error by itself
        for key in matrix_names(alone.objective):
            value = parameters[key]
            torch.testing.assert_close(other["parameters"][key], value, rtol=1e-3, atol=1e-4)


def test_muon_under_zero_is_refused():
    with pytest.raises(ConfigError, match=r"train\.zero_stage=1 splits them"):
        load([], ["train.optimizer=muon", "train.zero_stage=1"])


def test_moments_of_another_optimiser_are_refused_by_name():
    muon, adamw = exact_engine(PAIRS, more=MUON), exact_engine(PAIRS)
    train(muon, 0, 1)
    with pytest.raises(ValueError, match="trained with another train.optimizer"):
        adamw.load(muon.state())
