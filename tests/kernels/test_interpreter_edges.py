"""Kernels in Triton's interpreter where a case has a rule of its own: nothing to see, no length."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mlip.kernels.info_nce import info_nce_loss
from mlip.kernels.token_knowledge_patch import token_knowledge_patch_scores
from tests.kernels.interpreting import compare, interpreted
from tests.kernels.oracle import learned_scale_errors, make_inputs, relative_error

pytest.importorskip("triton", reason="triton is not installed")

pytestmark = pytest.mark.usefixtures("round_like_a_gpu")


@interpreted
@pytest.mark.parametrize("aggregation", ["mean", "lse"])
@pytest.mark.parametrize("pooling", ["attention", "context", "max"])
def test_an_image_without_a_patch_scores_0_and_moves_nothing(
    pooling: str, aggregation: str
) -> None:
    """Whatever gradient its scores get: weights of the texts are what it could reach."""
    inputs = make_inputs(3, 2, 7, 4, 2, 16, seed=8)
    inputs["patch_mask"][1] = False
    compare(inputs, 1e-5, pooling=pooling, aggregation=aggregation)


@interpreted
def test_a_context_that_all_but_cancels_is_exact() -> None:
    """Shorter than its floor it is divided by that, and has no direction to project away."""
    patches, tokens = torch.zeros(1, 2, 32), torch.zeros(1, 1, 32)
    patches[0, 0, 0], patches[0, 1, 0], patches[0, 1, 1] = 1.0, -1.0, 5e-7
    tokens[0, 0, :3] = torch.tensor([0.0, 0.8, 0.6])
    compare({"patches": patches, "tokens": tokens}, 1e-4, pooling="context", attention_scale=1.0)


@interpreted
def test_a_large_learned_scale_is_finite_where_rows_are_unlike_every_patch() -> None:
    """A weight of the padding behind the last patch would be e^alpha, and d alpha NaN."""
    generator = torch.Generator().manual_seed(4)
    base = torch.randn(32, generator=generator)
    patches, tokens = (
        (sign * base + 0.05 * torch.randn(2, n, 32, generator=generator)).bfloat16()
        for sign, n in ((1.0, 40), (-1.0, 5))
    )
    for alpha in (0.0, 30.0, 100.0):
        scale = torch.tensor(alpha, requires_grad=True)
        made = [patches.clone().requires_grad_(), tokens.clone().requires_grad_()]
        scores = token_knowledge_patch_scores(*made, attention_scale=scale, impl="triton")
        grads = torch.autograd.grad(scores.square().sum(), [*made, scale])
        assert all(bool(torch.isfinite(x).all()) for x in (scores, *grads))


@interpreted
@pytest.mark.parametrize(("dim", "patches"), [(32, 230), (144, 80)])
def test_a_learned_scale_is_exact_where_an_image_takes_several_tiles(
    dim: int, patches: int
) -> None:
    """By two passes and by library products: what stands for a whole image is added once."""
    errors = learned_scale_errors(10.0, torch.bfloat16, "cpu", dim, patches)
    assert all(error <= 1.5e-2 for error in errors.values()), errors


@interpreted
def test_a_sum_of_powers_that_are_each_in_range_stays_in_range() -> None:
    """40 powers of 2^123: one is bounded without a maximum, their sum is not."""
    generator = torch.Generator().manual_seed(5)
    image, text = (
        F.normalize(torch.eye(1, 32) + 1e-3 * torch.randn(40, 32, generator=generator), dim=-1)
        for _ in range(2)
    )
    value = info_nce_loss(image, text, 85.5, impl="triton")
    truth = info_nce_loss(image.double(), text.double(), 85.5, impl="torch")
    assert relative_error(value, truth) <= 1e-5
