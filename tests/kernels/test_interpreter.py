"""The Triton kernels on CPU tensors in Triton's interpreter: runs every file of those tests, and
what torch.compile and autograd see of the operators."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mlip.kernels.token_knowledge_patch import op, token_knowledge_patch_scores
from tests.kernels.interpreting import INTERPRETING, interpreted
from tests.kernels.oracle import leaves, make_inputs

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(Path(__file__).parent.glob("test_interpreter*.py"))
pytestmark = pytest.mark.usefixtures("round_like_a_gpu")

pytest.importorskip("triton", reason="triton is not installed")


@pytest.mark.skipif(INTERPRETING, reason="this is the process that it starts")
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem.removeprefix("test_"))
def test_every_kernel_is_right_in_the_interpreter(file: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-x", "-o", "addopts=", "--import-mode=importlib"]
    run = subprocess.run(
        [*command, "-q", "-p", "no:cacheprovider", "--durations=5", str(file)],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " passed" in run.stdout


COMPILED = """
import torch, torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from mlip.kernels.info_nce import info_nce_loss
from mlip.kernels.token_knowledge_patch import (
    contrastive_loss_from_scores, token_knowledge_patch_scores)
from tests.kernels.oracle import leaves, make_inputs

def run(inputs, scale):
    scores = token_knowledge_patch_scores(**inputs, attention_scale=scale, impl="triton")
    loss = contrastive_loss_from_scores(scores, logit_scale=scale)
    unit = [F.normalize(inputs[name][:, 0], dim=-1) for name in ("patches", "tokens")]
    return loss + info_nce_loss(unit[0], unit[1], scale, impl="triton")

counter = CompileCounterWithBackend("aot_eager")
compiled = torch.compile(run, backend=counter, fullgraph=True)
for batch in (2, 3, 4, 5):
    inputs = leaves(make_inputs(batch, batch, 16, 3, 2, 16, seed=10), torch.float32)
    scale = torch.tensor(5.0, requires_grad=True)
    wanted = [inputs["patches"], inputs["tokens"], inputs["knowledge"], scale]
    value = compiled(inputs, scale)
    truth = run(inputs, scale)
    torch.testing.assert_close(value, truth, rtol=1e-6, atol=0)
    if batch == 4:  # gradients of a batch whose size was never compiled for
        grads = [torch.autograd.grad(x, wanted) for x in (value, truth)]
        for got, want in zip(*grads, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-7)
print(counter.frame_count, "graphs")
"""


@pytest.mark.skipif(INTERPRETING, reason="torch.compile cannot trace conftest's poisoned memory")
def test_losses_are_one_graph_to_torch_compile_and_one_more_for_every_other_batch() -> None:
    """Oracle: the same call without torch.compile; fullgraph=True refuses a graph break."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-P", "-c", COMPILED]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0 and "2 graphs" in run.stdout, run.stdout + run.stderr[-4000:]


@interpreted
def test_statistics_are_kept_only_where_a_gradient_will_be_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[int] = []  # by the forward operator: what is not kept is made in small chunks
    plain = op.pair_scores_op

    def counted(*args: object) -> tuple[Tensor, ...]:
        out = plain(*args)
        made.append(out[1].numel())
        return out

    monkeypatch.setattr(op, "pair_scores_op", counted)
    inputs = leaves(make_inputs(2, 2, 20, 5, 0, 16, masks=False), torch.float32)
    held: list[int] = []

    def pack(x: Tensor) -> Tensor:
        held.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        token_knowledge_patch_scores(**inputs, impl="triton")
        kept = sum(held)
        held.clear()
        with torch.no_grad():
            token_knowledge_patch_scores(**inputs, impl="triton")
    assert kept > 0 and not held
    assert made[0] > 0 and made[1] == 0


@interpreted
def test_operators_describe_themselves_to_torch_compile() -> None:
    """Oracle: torch.library.opcheck runs each operator real and fake and compares."""
    from mlip.kernels.token_knowledge_patch import operators

    g = torch.Generator().manual_seed(0)
    patches = torch.randn(2, 20, 16, generator=g)
    tokens = torch.randn(2, 5, 16, generator=g)
    one = torch.tensor(0.5)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(operators.unit_patches, (patches, None, False), test_utils=tests)
    rows_arguments = (tokens, None, None, None, one, one, False)
    torch.library.opcheck(operators.query_rows, rows_arguments, test_utils=tests)
    v, bias = operators.unit_patches(patches, None, False)
    rows = operators.query_rows(*rows_arguments)
    weight = torch.full((2, 5), 0.2)
    torch.library.opcheck(operators.pack_rows, (rows, weight), test_utils=tests)
    inputs = (*operators.pack_rows(rows, weight), weight, v, bias, one, one, None)
    for pooling in ("attention", "context", "max"):
        problem = (20, pooling, "lse")
        torch.library.opcheck(operators.pair_scores_op, (*inputs, *problem, True), test_utils=tests)
        made = operators.pair_scores_op(*inputs, *problem, True)
        backward = (made[0], *inputs, *made, *problem, True)
        torch.library.opcheck(operators.pair_scores_bwd_op, backward, test_utils=tests)
        both = (*rows_arguments[:6], *backward)
        torch.library.opcheck(operators.pair_scores_and_rows_bwd, both, test_utils=tests)
    torch.library.opcheck(operators.unit_patches_bwd, (patches, None, v), test_utils=tests)
    torch.library.opcheck(operators.query_rows_bwd, (*rows_arguments[:6], rows), test_utils=tests)
