"""The losses inside training code that is not ours: torch.compile, masks that are used again,
tensors without values, subclasses.

Oracle: the same call outside of it; for a mask changed too early the error that torch has for it.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from mlip.kernels._autograd import savable
from mlip.kernels._distributed import row_counts
from mlip.kernels.info_nce import ClipLoss, info_nce_loss
from mlip.kernels.token_knowledge_patch import (
    TokenKnowledgePatchLoss,
    contrastive_loss_from_scores,
    token_knowledge_patch_loss,
    token_knowledge_patch_scores,
)
from tests.kernels.oracle import assert_inference_mode_serves, relative_error

ROOT = Path(__file__).resolve().parents[2]


def _batch(size: int, seed: int = 0) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)
    batch = {
        "patches": torch.randn(size, 5, 8, generator=g),
        "tokens": torch.randn(size, 6, 8, generator=g),
        "token_weights": torch.rand(size, 6, generator=g) > 0.4,
        "patch_mask": torch.rand(size, 5, generator=g) > 0.4,
    }
    for name in ("token_weights", "patch_mask"):
        batch[name][:, 0] = True
    return batch


class _Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = nn.Linear(8, 4), nn.Linear(8, 4)
        self.local, self.clip = TokenKnowledgePatchLoss(), ClipLoss()

    def forward(self, patches: Tensor, tokens: Tensor, **masks: Tensor) -> Tensor:
        patches, tokens = self.image(patches), self.text(tokens)
        unit = [F.normalize(x.mean(1), dim=-1) for x in (patches, tokens)]
        scale = self.local.log_logit_scale.exp()
        return self.local(patches, tokens, **masks) + self.clip(*unit, scale)


@pytest.mark.parametrize("dynamic", [None, True])
def test_a_compiled_model_may_have_other_padding_and_another_size_in_every_batch(
    dynamic: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second mask was an error of the compiler's, whatever the size."""
    monkeypatch.undo()  # torch.compile cannot trace the poisoned torch.empty of tests/conftest.py
    torch._dynamo.reset()
    model = _Towers()
    compiled = torch.compile(model, backend="aot_eager", dynamic=dynamic)
    for seed, size in enumerate((4, 4, 4, 3, 5)):
        grads = []
        for run in (model, compiled):
            model.zero_grad()
            run(**_batch(size, seed)).backward()
            grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        assert len(grads[0]) == len(list(model.parameters()))
        torch.testing.assert_close(grads[1], grads[0], rtol=1e-5, atol=1e-7)


def test_scores_of_a_cpu_are_left_uncompiled_by_torch_before_2_13_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To whose compilers every graph is one that is being exported: they traced the call."""
    from mlip.kernels.token_knowledge_patch import op, uncompiled

    monkeypatch.undo()
    torch._dynamo.reset()
    left: list[int] = []

    def scores(*given: Any) -> Any:
        left.append(1)
        return op.scores_by_torch(*given)

    monkeypatch.setattr(uncompiled, "scores_by_torch_uncompiled", torch.compiler.disable(scores))
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: torch.compiler.is_compiling())
    batch = _batch(4)
    made = torch.compile(token_knowledge_patch_scores, backend="eager")(**batch)
    assert left == [1] and torch.equal(made, token_knowledge_patch_scores(**batch))


SCHEDULED: dict[str, Callable[[Tensor, float], Tensor]] = {
    "InfoNCE": lambda x, number: info_nce_loss(x, x.flip(0), number, impl="torch"),
    "scores": lambda x, number: contrastive_loss_from_scores(x @ x.T, logit_scale=number),
}


@pytest.mark.parametrize("name", SCHEDULED)
def test_a_scale_by_schedule_is_one_graph_and_one_more(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new graph a number would be torch.compile's limit of eight after eight steps."""
    monkeypatch.undo()
    torch._dynamo.reset()
    from torch._dynamo.testing import CompileCounterWithBackend  # asks for more than torch

    counter = CompileCounterWithBackend("aot_eager")
    run = SCHEDULED[name]
    compiled = torch.compile(run, backend=counter, fullgraph=True)
    x = F.normalize(_batch(4)["tokens"][:, 0], dim=-1)
    for step in range(10):
        number = 10.0 + step / 3
        assert relative_error(compiled(x, number), run(x, number)) <= 1e-6
    assert counter.frame_count == 2


OF_ANY_VALUE = """
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from mlip.kernels.token_knowledge_patch import token_knowledge_patch_loss

def run(x, alpha, share):
    return token_knowledge_patch_loss(
        x, x.flip(0), logit_scale=10.0, attention_scale=alpha, knowledge_share=share, impl="triton")

counter = CompileCounterWithBackend("aot_eager")
compiled = torch.compile(run, backend=counter, fullgraph=True, dynamic=True)
for batch, alpha in ((2, 5.0), (3, 6.0), (4, 7.5)):
    x = torch.randn(batch, 5, 16)
    torch.testing.assert_close(
        compiled(x, alpha, alpha / 9), run(x, alpha, alpha / 9), rtol=1e-5, atol=1e-6)
print(counter.frame_count, "graphs")
"""


def test_kernels_are_one_graph_for_sizes_and_numbers_of_any_value() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-P", "-c", OF_ANY_VALUE]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    assert int(run.stdout.split()[0]) <= 2, run.stdout


@pytest.mark.parametrize("pooling", ["attention", "context", "max"])
def test_a_patch_mask_filled_again_before_the_backward_pass_is_an_error(pooling: str) -> None:
    batch = _batch(4)
    batch["patches"].requires_grad_()
    scores = token_knowledge_patch_scores(**batch, pooling=pooling)
    batch["patch_mask"].fill_(True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        scores.sum().backward()


def test_all_but_one_side_may_come_out_of_inference_mode() -> None:
    assert_inference_mode_serves("torch")
    with torch.inference_mode():  # where nothing is saved, nothing is copied
        x = torch.zeros(2)
        assert savable(x) is x


@pytest.mark.parametrize("name", ["pair_ids", "image_valid", "text_valid"])
def test_ids_and_masks_filled_again_before_the_backward_pass_are_an_error(name: str) -> None:
    given = {
        "pair_ids": torch.tensor([0, 1, 0, 2]),
        "image_valid": torch.tensor([True, True, False, True]),
        "text_valid": torch.tensor([True, False, True, True]),
    }
    scores = torch.eye(4).requires_grad_()
    loss = contrastive_loss_from_scores(scores, logit_scale=3.0, **given)
    given[name].fill_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("device", ["meta", "cpu"])
@pytest.mark.parametrize("pooling", ["attention", "context", "max"])
def test_tensors_without_values_give_the_shapes_of_the_call(device: str, pooling: str) -> None:
    """As tools that plan a run's memory ask for them: on the meta device, and in FakeTensorMode."""
    from torch._subclasses import FakeTensorMode  # asks for more than torch

    mode: Any = FakeTensorMode() if device == "cpu" else contextlib.nullcontext()
    with mode:
        batch = {k: torch.empty_like(v, device=device) for k, v in _batch(4).items()}
        batch["patches"].requires_grad_()
        loss = token_knowledge_patch_loss(**batch, logit_scale=10.0, pooling=pooling)  # type: ignore[arg-type]
        unit = batch["patches"].mean(1)
        loss = loss + ClipLoss()(unit, batch["tokens"].mean(1), torch.empty((), device=device))
        loss.backward()
        grad = batch["patches"].grad
    assert loss.shape == () and grad is not None and grad.shape == (4, 5, 8)


def test_clamping_leaves_what_a_subclass_learns_beside_the_scales() -> None:
    class WithHead(TokenKnowledgePatchLoss):
        def __init__(self) -> None:
            super().__init__()
            self.own, self.head = nn.Parameter(torch.tensor(40.0)), nn.Linear(2, 2)
            nn.init.constant_(self.head.weight, 50.0)

    module = WithHead()
    with torch.no_grad():
        module.log_logit_scale.fill_(9.0)
    module.clamp_scales_()
    assert module.own.item() == 40.0 and module.head.weight.min() == 50.0
    assert module.log_logit_scale.exp().item() == pytest.approx(100.0)


def test_rows_are_counted_on_the_cpu_whatever_the_default_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mlip.kernels._distributed.group_size", lambda group: 2)

    def all_gather(parts: list[Tensor], mine: Tensor, group: Any) -> None:
        for part in parts:
            part.copy_(mine)

    monkeypatch.setattr(torch.distributed, "all_gather", all_gather)
    with torch.device("meta"):
        assert row_counts(torch.zeros(3, 2, device="cpu"), object()) == [3, 3]
