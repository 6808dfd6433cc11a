"""The plain-torch scores in float32, at scales and sizes where digits are easily lost.

Oracle: the same call in float64.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mlip.kernels.token_knowledge_patch import token_knowledge_patch_scores
from tests.kernels.oracle import gradients, leaves, make_inputs, relative_error


@pytest.mark.parametrize("alpha", [0.0, 1e-3, 74.0, 76.0, 200.0])
@pytest.mark.parametrize("pooling", ["attention", "context"])
def test_float32_stays_within_1e_5_of_float64_at_any_attention_scale(
    alpha: float, pooling: str
) -> None:
    inputs = make_inputs(4, 5, 33, 9, 3, 32, seed=11)
    options: dict[str, Any] = {"pooling": pooling, "attention_scale": alpha}
    truth_leaves, made = leaves(inputs), leaves(inputs, torch.float32)
    truth = token_knowledge_patch_scores(**truth_leaves, **options)
    value = token_knowledge_patch_scores(**made, **options)
    assert value.dtype == torch.float32
    assert relative_error(value, truth) <= 1e-5
    want, got = gradients(truth, truth_leaves), gradients(value, made)
    for name in want:
        # rounding the logit alpha * s to float32 alone moves a softmax weight by alpha * 2^-24
        assert relative_error(got[name], want[name]) <= max(1e-5, alpha * 2**-23), name


@pytest.mark.parametrize("pooling", ["attention", "context"])
def test_a_scale_whose_similarities_are_nearly_equal_keeps_its_digits_in_float32(
    pooling: str,
) -> None:
    # the gradient is a variance: a mean of squares less the square of the mean would lose them all
    inputs = make_inputs(seed=5)
    generator = torch.Generator().manual_seed(5)
    base = torch.randn(inputs["patches"].shape[-1], generator=generator, dtype=torch.float64)
    for name in ("patches", "tokens", "knowledge"):
        noise = torch.randn(inputs[name].shape, generator=generator, dtype=torch.float64)
        inputs[name] = base + 0.1 * noise
    found = []
    for dtype in (torch.float64, torch.float32):
        alpha = torch.tensor(10.0, dtype=dtype, requires_grad=True)
        cast = {n: x.to(dtype) if x.is_floating_point() else x for n, x in inputs.items()}
        value = token_knowledge_patch_scores(**cast, attention_scale=alpha, pooling=pooling)
        value.sum().backward()
        assert alpha.grad is not None
        found.append(float(alpha.grad))
    assert abs(found[1] / found[0] - 1.0) <= 1e-5


def test_lse_keeps_five_digits_at_the_smallest_aggregation_scale() -> None:
    inputs = make_inputs(4, 4, 20, 9, 3, 32, seed=5)
    options: dict[str, Any] = {"aggregation": "lse", "aggregation_scale": 0.02}
    found, wanted = (
        token_knowledge_patch_scores(**leaves(inputs, dtype), **options)
        for dtype in (torch.float32, torch.float64)
    )
    assert relative_error(found, wanted) <= 1e-5


@pytest.mark.parametrize("incoming", [1e-12, 1e7])
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("pooling", ["attention", "context"])
def test_gradients_of_any_size_pass_a_softmax_of_any_size(
    pooling: str, sign: float, incoming: float
) -> None:
    """As of a confident batch, or under a GradScaler; the softmax sums e^74 or e^-74."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(1, 1, 32, generator=generator, dtype=torch.float64)
    made = {"patches": (3, 20, 32), "tokens": (3, 6, 32)}
    inputs = {
        name: base + 0.05 * torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in made.items()
    }
    inputs["tokens"] = sign * inputs["tokens"]
    found = []
    for dtype in (torch.float64, torch.float32):
        cast = leaves(inputs, dtype)
        value = token_knowledge_patch_scores(**cast, attention_scale=74.0, pooling=pooling)
        found.append(gradients(value * incoming, cast))
    for name, want in found[0].items():
        # a softmax logit of 74 alone is rounded by 74 * 2^-24
        assert relative_error(found[1][name], want) <= 74 * 2**-20, name
