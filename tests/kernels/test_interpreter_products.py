"""The benchmark's other backward design computes the gradients of the one that ships."""

from __future__ import annotations

import pytest
import torch

from mlip.kernels.token_knowledge_patch import token_knowledge_patch_loss
from tests.kernels.interpreting import interpreted, leaves_of
from tests.kernels.oracle import gradients, leaves, make_inputs, poisoned, relative_error

pytest.importorskip("triton", reason="triton is not installed")
from benchmarks import backward_by_products  # noqa: E402

pytestmark = pytest.mark.usefixtures("round_like_a_gpu")


@interpreted
@pytest.mark.parametrize("chunk_bytes", [1, 2**20])
@pytest.mark.parametrize("aggregation", ["mean", "lse"])
def test_every_gradient_is_that_of_float64(
    chunk_bytes: int, aggregation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: torch in float64. Masked rows and patches hold NaN, and whole row tiles are empty."""
    monkeypatch.setattr(backward_by_products, "CHUNK_BYTES", chunk_bytes)
    inputs = make_inputs(4, 5, 19, 21, 3, 24, seed=3)
    inputs["token_weights"][1:, 4:] = 0.0
    extra = {"attention_scale": torch.tensor(7.0, dtype=torch.float64)}
    options = {"aggregation": aggregation, "logit_scale": 9.0}
    inputs = {name: x[:4] for name, x in inputs.items()}
    made, truth = leaves(poisoned(inputs) | extra, torch.float32), leaves(inputs | extra)
    want = gradients(token_knowledge_patch_loss(**truth, impl="torch", **options), truth)
    with backward_by_products.in_place():
        value = token_knowledge_patch_loss(**made, impl="triton", **options)
        got = gradients(value, made)
    plain = leaves(inputs | extra, torch.float32)
    same = gradients(token_knowledge_patch_loss(**plain, impl="torch", **options), plain)
    for name in want:
        allowed = max(1e-5, 2 * relative_error(same[name], want[name]))
        assert relative_error(got[name], want[name]) <= allowed, name


@interpreted
def test_bfloat16_gradients_are_as_near_to_float64_as_those_of_the_design_that_ships() -> None:
    inputs = make_inputs(3, 3, 20, 9, 3, 24, seed=2)
    names = ("patches", "tokens", "knowledge")
    rounded = {k: x.bfloat16() if k in names else x for k, x in inputs.items()}
    truth = leaves(rounded)
    want = gradients(token_knowledge_patch_loss(**truth, logit_scale=9.0, impl="torch"), truth)

    def errors() -> dict[str, float]:
        made = leaves_of(rounded)
        value = token_knowledge_patch_loss(**made, logit_scale=9.0, impl="triton")
        got = gradients(value, made)
        return {name: relative_error(got[name], want[name]) for name in names}

    shipped = errors()
    with backward_by_products.in_place():
        assert all(error <= 1.1 * shipped[name] for name, error in errors().items())


@interpreted
def test_what_it_cannot_compute_is_refused() -> None:
    made = leaves(make_inputs(2, 2, 5, 4, 0, 16, seed=1), torch.float32)
    with backward_by_products.in_place():
        loss = token_knowledge_patch_loss(**made, logit_scale=9.0, pooling="max", impl="triton")
        with pytest.raises(ValueError, match="expected attention pooling"):
            loss.backward()
