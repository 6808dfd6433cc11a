"""torch.compile and torch.export: what they record of the autograd Functions is what every torch
computes.

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
from mlip.kernels.token_knowledge_patch import (
    TokenKnowledgePatchLoss,
    contrastive_loss_from_scores,
    token_knowledge_patch_scores,
)
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


class _Scores(torch.nn.Module):
    def __init__(self, **options: str) -> None:
        super().__init__()
        self.options: dict[str, Any] = options

    def forward(self, patches: Tensor, tokens: Tensor, knowledge: Tensor, **masks: Any):
        return token_knowledge_patch_scores(
            patches, tokens, knowledge, impl="torch", **masks, **self.options
        )


EXPORTED = {
    "attention": _Scores(),
    "max": _Scores(pooling="max"),
    "context": _Scores(pooling="context", aggregation="lse"),
    "loss": TokenKnowledgePatchLoss(impl="torch"),
    "loss by default": TokenKnowledgePatchLoss(),
}


def _batch(seed: int) -> dict[str, Tensor]:
    made = torch.Generator().manual_seed(seed)
    return {
        "patches": torch.randn(4, 6, 8, generator=made),
        "tokens": torch.randn(4, 5, 8, generator=made),
        "knowledge": torch.randn(4, 3, 8, generator=made),
        "token_weights": torch.rand(4, 5, generator=made).round(),
        "knowledge_mask": torch.rand(4, 3, generator=made) > 0.4,
        "patch_mask": torch.rand(4, 6, generator=made) > 0.4,
    }


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", EXPORTED)
def test_an_exported_graph_gives_the_values_of_the_call(
    name: str, strict: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padding was dropped by its values, which torch.export has not. Oracle: the call itself, on
    another batch, with other padding, a text without weight and an image without a patch."""
    monkeypatch.undo()
    module = EXPORTED[name]
    graph = torch.export.export(module, (), kwargs=_batch(0), strict=strict).module()
    other = _batch(1)
    other["token_weights"][1] = 0.0
    other["knowledge_mask"][1] = other["patch_mask"][2] = False
    torch.testing.assert_close(graph(**other), module(**other), rtol=1e-5, atol=1e-6)
