"""The losses on devices without float64, as Apple's GPUs are: nothing asks for it there.

Stands in for such a device, which is not at hand: a CPU whose every float64 result is an error.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mlip.kernels._scalars import widest_dtype
from mlip.kernels.info_nce import info_nce_loss
from mlip.kernels.token_knowledge_patch import (
    reference,
    rows_reference,
    token_knowledge_patch_loss,
)
from tests.kernels.oracle import leaves, make_inputs, relative_error

APPLE = torch.device("mps")


class _NoFloat64(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if any(isinstance(x, torch.Tensor) and x.dtype == torch.float64 for x in tree_leaves(out)):
            raise TypeError(f"{func} makes float64, which this device does not have")
        return out


def test_sums_are_float64_where_there_is_one() -> None:
    assert widest_dtype(torch.device("cpu")) == widest_dtype(torch.device("cuda")) == torch.float64
    assert widest_dtype(APPLE) == widest_dtype(torch.device("xpu")) == torch.float32


@pytest.mark.parametrize("pooling", ["attention", "context", "max"])
def test_the_token_knowledge_patch_loss_needs_no_float64(
    pooling: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = make_inputs(4, 4, 9, 7, 3, 16, seed=3)
    names = ("attention_scale", "knowledge_scale", "aggregation_scale", "logit_scale")

    def inputs_as(dtype: torch.dtype) -> dict[str, Any]:
        scales = {n: torch.tensor(9.0, dtype=dtype, requires_grad=True) for n in names}
        return leaves(inputs, dtype) | scales

    def loss_and_gradients(made: dict[str, Any]) -> tuple[torch.Tensor, ...]:
        value = token_knowledge_patch_loss(**made, pooling=pooling, aggregation="lse")
        wanted = [x for x in made.values() if x.requires_grad]
        return value.detach(), *torch.autograd.grad(value, wanted, materialize_grads=True)

    truth, single = loss_and_gradients(inputs_as(torch.float64)), inputs_as(torch.float32)
    for module in (reference, rows_reference):
        monkeypatch.setattr(module, "widest_dtype", lambda device: widest_dtype(APPLE))
    with _NoFloat64():
        found = loss_and_gradients(single)
    for want, got in zip(truth, found, strict=True):
        assert relative_error(got, want) <= 1e-4


def test_info_nce_needs_no_float64() -> None:
    generator = torch.Generator().manual_seed(0)
    image, text = torch.randn(2, 6, 16, generator=generator).requires_grad_().unbind()
    with _NoFloat64():
        info_nce_loss(image, text, torch.tensor(14.0), pair_ids=torch.arange(6)).backward()
