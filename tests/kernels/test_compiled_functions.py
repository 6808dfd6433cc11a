"""torch.compile of the autograd Functions: what it records of them is what every torch computes.

Oracle: the recorded graph. torch 2.11 gives a Function whose result was changed in place by a
method (`x.mul_(y)`, then `return x`) the gradient 0 without a word (pytorch issue 180642); newer
ones do not, so that comparing gradients shows it on that version alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from mlip.kernels.info_nce import info_nce_loss
from mlip.kernels.token_knowledge_patch import contrastive_loss_from_scores
from mlip.kernels.token_knowledge_patch.rows_reference import unit_rows

FEATURES = torch.linspace(-1.0, 1.0, 24).reshape(4, 6).requires_grad_()
MASK = torch.tensor([True, True, False, True])


class _DoubledInPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x * 1.0
        x.mul_(2.0)
        return x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * 2.0


CALLS: dict[str, Callable[[Tensor], Tensor]] = {
    "unit rows": lambda x: unit_rows(x, None, torch.float32),
    "masked unit rows": lambda x: unit_rows(x, MASK, torch.float32),
    "InfoNCE": lambda x: info_nce_loss(x * 1.0, x.detach(), 10.0, impl="torch"),
    "from scores": lambda x: contrastive_loss_from_scores(x @ x.T, logit_scale=10.0),
}


def _result_changed_in_place(run: Callable[[Tensor], Tensor]) -> list[bool]:
    """Of every Function that torch.compile records: whether its result was changed in place."""
    found: list[bool] = []

    def look(module: torch.fx.GraphModule, inputs: Any) -> Any:
        for name, part in module.named_modules():
            if name.startswith("fwd_body") and isinstance(part, torch.fx.GraphModule):
                (output,) = (node for node in part.graph.nodes if node.op == "output")
                result = tree_leaves(output.args)[0]  # then what is saved for the backward pass
                calls = [result, *(user for user in result.users if user.args[0] is result)]
                methods = [str(call.target) for call in calls if call.op == "call_method"]
                found.append(any(name.endswith("_") for name in methods))
        return module

    torch._dynamo.reset()
    torch.compile(run, backend=look, fullgraph=True)(FEATURES)
    return found


@pytest.mark.parametrize("name", CALLS)
def test_no_function_returns_what_it_changed_in_place(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # torch.compile cannot trace the poisoned torch.empty of tests/conftest.py
    assert _result_changed_in_place(CALLS[name]) == [False]


def test_the_search_finds_what_it_must(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert _result_changed_in_place(_DoubledInPlace.apply) == [True]


@pytest.mark.parametrize("name", CALLS)
def test_gradients_are_those_of_the_call_as_it_is(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    torch._dynamo.reset()
    compiled = torch.compile(CALLS[name], backend="eager", fullgraph=True)
    weight = torch.arange(6.0)
    got, want = (
        torch.autograd.grad((run(FEATURES) * weight).sum(), [FEATURES])[0]
        for run in (compiled, CALLS[name])
    )
    assert want.norm() > 0 and torch.allclose(got, want, rtol=1e-5, atol=1e-6)
