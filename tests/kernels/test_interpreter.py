"""The Triton kernels on CPU tensors in Triton's interpreter, against plain torch in float64.

TRITON_INTERPRET must be set before the kernels are imported, and would break GPU tests in the same
process: here, without it, one test runs this file in a process that has it. Sizes are small: the
interpreter takes about 2 ms for every tile of every program.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mlip.kernels import _chip
from mlip.kernels.info_nce import info_nce_loss
from mlip.kernels.token_knowledge_patch import (
    tiling,
    token_knowledge_patch_loss,
    token_knowledge_patch_scores,
)
from tests.kernels.oracle import gradients, leaves, make_inputs, poisoned, relative_error

ROOT = Path(__file__).resolve().parents[2]
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETING, reason="runs inside the test below")

pytest.importorskip("triton", reason="triton is not installed")


@pytest.mark.skipif(INTERPRETING, reason="this is the process that it starts")
def test_every_kernel_is_right_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-x", "-o", "addopts=", "--import-mode=importlib"]
    run = subprocess.run(
        [*command, "-q", "-p", "no:cacheprovider", "--durations=5", str(Path(__file__))],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " passed" in run.stdout


COMPILED = """
import torch, torch.nn.functional as F
from mlip.kernels.info_nce import info_nce_loss
from mlip.kernels.token_knowledge_patch import (
    contrastive_loss_from_scores, token_knowledge_patch_scores)
from tests.kernels.oracle import leaves, make_inputs

inputs = leaves(make_inputs(2, 2, 20, 5, 2, 16, seed=10), torch.float32)

def run(patches, tokens, scale):
    rest = inputs | {"patches": patches, "tokens": tokens, "attention_scale": scale}
    scores = token_knowledge_patch_scores(**rest, impl="triton")
    loss = contrastive_loss_from_scores(scores, logit_scale=scale)
    unit = [F.normalize(x[:, 0], dim=-1) for x in (patches, tokens)]
    return loss + info_nce_loss(unit[0], unit[1], scale, impl="triton")

wanted = [inputs["patches"], inputs["tokens"], torch.tensor(5.0, requires_grad=True)]
truth = run(*wanted)
value = torch.compile(run, backend="aot_eager", fullgraph=True)(*wanted)
torch.testing.assert_close(value, truth, rtol=1e-6, atol=0)
grads = [torch.autograd.grad(x, wanted) for x in (value, truth)]
for got, want in zip(*grads, strict=True):
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-7)
print("one graph")
"""


@pytest.mark.skipif(INTERPRETING, reason="torch.compile cannot trace conftest's poisoned memory")
def test_losses_are_one_graph_to_torch_compile() -> None:
    """Oracle: the same call without torch.compile; fullgraph=True refuses a graph break."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-P", "-c", COMPILED]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0 and "one graph" in run.stdout, run.stderr[-4000:]


@pytest.fixture(autouse=True)
def _round_like_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The interpreter truncates float32 to bfloat16; every chip rounds to the nearest even.

    And float32 tiles of 16 x 16, made for registers, would cost the interpreter minutes: 32 x 32.
    """
    if INTERPRETING:
        wide = tiling.Choice([(32, (32, 0, 0), 4)], [])
        monkeypatch.setattr(tiling, "FLOAT32_OTHERS", {128: wide, 256: wide})
        tiling.choose_tiling.cache_clear()
        import numpy as np
        import triton.language as tl
        import triton.runtime.interpreter as interpreter

        plain = interpreter.InterpreterBuilder.cast_impl

        def cast(self: Any, source: Any, target: Any) -> Any:
            if source.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16:
                value = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16()
                bits = value.view(torch.int16).numpy().view(np.uint16)
                return interpreter.TensorHandle(bits, target.scalar)
            return plain(self, source, target)

        for name in ("cast_impl", "create_fp_trunc"):
            monkeypatch.setattr(interpreter.InterpreterBuilder, name, cast)
    yield


VARIANTS = [(p, a) for p in ("attention", "context", "max") for a in ("mean", "lse")]
LEARNED = {
    "attention_scale": 7.0,
    "knowledge_scale": 6.0,
    "knowledge_gain": 0.4,
    "aggregation_scale": 4.0,
}


def compare(
    inputs: dict[str, Any],
    tolerance: float,
    dtype: torch.dtype = torch.float32,
    features: torch.dtype | None = None,
    **options: Any,
) -> None:
    """Scores and gradients by Triton against torch in float64 on the same (rounded) numbers.

    A gradient may also be twice as wrong as torch in the same dtype: that of a weight is a
    difference of nearly equal numbers, which no float32 arithmetic resolves better.
    """
    names = ("patches", "tokens", "knowledge")
    rounded = {
        k: v.to(features) if features is not None and k in names else v for k, v in inputs.items()
    }
    results = []
    for impl, wide in (("triton", False), ("torch", True), ("torch", False)):
        if wide:
            made = leaves(rounded)
        else:
            made = leaves(rounded, dtype) if features is None else leaves_of(rounded)
        value = token_knowledge_patch_scores(**made, impl=impl, **options)
        results.append((value, gradients(value, made)))
    (value, got), (truth, want), (_, same) = results
    assert relative_error(value, truth) <= tolerance
    # the gates of half precision are for features
    for name in want if features is None else names:
        error = relative_error(got[name], want[name])
        assert error <= max(tolerance, 2 * relative_error(same[name], want[name]) + 1e-6), name


def leaves_of(inputs: dict[str, Any]) -> dict[str, Any]:
    return {
        k: v.detach().clone().requires_grad_() if v.is_floating_point() else v
        for k, v in inputs.items()
    }


@interpreted
@pytest.mark.parametrize(("pooling", "aggregation"), VARIANTS)
def test_loss_and_all_gradients_are_exact_and_masks_hide(pooling: str, aggregation: str) -> None:
    inputs = make_inputs(3, 3, 20, 9, 3, 24, seed=2)
    inputs["patch_mask"][-1, 3:7] = True
    extra = {k: torch.tensor(v, dtype=torch.float64) for k, v in LEARNED.items()}
    extra["logit_scale"] = torch.tensor(9.0, dtype=torch.float64)
    options = {"pooling": pooling, "aggregation": aggregation}
    made, truth_leaves = leaves(poisoned(inputs) | extra, torch.float32), leaves(inputs | extra)
    value = token_knowledge_patch_loss(**made, impl="triton", **options)
    truth = token_knowledge_patch_loss(**truth_leaves, impl="torch", **options)
    assert relative_error(value, truth) <= 1e-5
    got, want = gradients(value, made), gradients(truth, truth_leaves)
    for name in want:
        assert relative_error(got[name], want[name]) <= 1e-5, name


@interpreted
@pytest.mark.parametrize(
    ("images", "texts", "patches", "tokens", "entities", "dim"),
    [(2, 3, 1, 1, 0, 32), (2, 2, 50, 17, 1, 96), (1, 2, 209, 2, 17, 20), (2, 1, 64, 33, 0, 16)],
)
def test_any_size_is_exact(images, texts, patches, tokens, entities, dim) -> None:
    inputs = make_inputs(images, texts, patches, tokens, entities, dim, seed=3, masks=False)
    for pooling in ("attention", "context", "max"):
        compare(inputs, 1e-5, pooling=pooling)


@interpreted
@pytest.mark.parametrize("alpha", [0.0, 79.0, 81.0, 200.0])
@pytest.mark.parametrize("pooling", ["attention", "context"])
def test_any_attention_scale_is_exact(alpha: float, pooling: str) -> None:
    inputs = make_inputs(2, 2, 20, 5, 2, 16, seed=4)
    # rounding the logit alpha * s to float32 alone moves a softmax weight by alpha * 2^-24
    compare(inputs, max(1e-5, alpha * 2**-22), pooling=pooling, attention_scale=alpha)


@interpreted
@pytest.mark.parametrize(("pooling", "gate"), [("attention", 5e-3), ("context", 1.5e-2)])
def test_bfloat16_stays_within_its_gate(pooling: str, gate: float) -> None:
    inputs = make_inputs(2, 2, 100, 24, 3, 128, seed=5)
    inputs["patch_mask"][-1] = True
    compare(inputs, gate, features=torch.bfloat16, pooling=pooling)


@interpreted
def test_bfloat16_max_pooling_stays_within_its_gate_where_no_maximum_is_near_a_tie() -> None:
    """Rounding may swap two nearly equal maxima: this seed's smallest gap is 0.0098."""
    inputs = make_inputs(2, 2, 20, 12, 3, 128, seed=10)
    inputs["patch_mask"][-1] = True
    compare(inputs, 5e-3, features=torch.bfloat16, pooling="max")


@interpreted
@pytest.mark.parametrize("pooling", ["attention", "context", "max"])
def test_chunks_of_texts_change_nothing(pooling: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: one chunk whose statistics the forward pass keeps."""
    inputs = make_inputs(2, 5, 20, 6, 2, 16, seed=6)
    whole, cut = leaves(inputs, torch.float32), leaves(inputs, torch.float32)
    value = token_knowledge_patch_scores(**whole, pooling=pooling, impl="triton")
    want = gradients(value, whole)
    from mlip.kernels.token_knowledge_patch import triton_kernels

    problem = tiling.Problem(2, 5, 8, 20, 16, 4, pooling, "mean", False)
    two_texts = 3 * tiling.chunk_bytes(problem, 1) - 1  # a context's share is three quarters
    for module in (tiling, triton_kernels):
        monkeypatch.setattr(module, "workspace_bytes", lambda p: two_texts)
    monkeypatch.setattr(triton_kernels, "FORWARD_CHUNK_BYTES", 1)
    assert tiling.text_chunks(problem) == [(0, 2), (2, 4), (4, 5)]
    again = token_knowledge_patch_scores(**cut, pooling=pooling, impl="triton")
    assert torch.equal(again, value)
    got = gradients(again, cut)
    for name in want:
        assert relative_error(got[name], want[name]) <= 1e-6, name


@interpreted
def test_a_score_does_not_depend_on_its_neighbours_bit_for_bit() -> None:
    inputs = {
        k: v.float() if v.is_floating_point() else v
        for k, v in make_inputs(3, 4, 20, 9, 3, 16, seed=7).items()
    }
    value = token_knowledge_patch_scores(**inputs, impl="triton")
    order = torch.tensor([2, 0, 3, 1])
    images = ("patches", "patch_mask")
    shuffled = {k: v if k in images else v[order] for k, v in inputs.items()}
    assert torch.equal(token_knowledge_patch_scores(**shuffled, impl="triton"), value[:, order])
    part = {k: v[1:] if k in images else v[1:3] for k, v in inputs.items()}
    assert torch.equal(token_knowledge_patch_scores(**part, impl="triton"), value[1:, 1:3])


@interpreted
def test_any_strides_are_read_in_place() -> None:
    inputs = make_inputs(2, 3, 20, 5, 2, 16, seed=8)
    names = ("patches", "tokens", "knowledge")
    strided = inputs | {n: inputs[n].permute(2, 0, 1).contiguous().permute(1, 2, 0) for n in names}
    strided = {k: v.float() if v.is_floating_point() else v for k, v in strided.items()}
    assert not strided["tokens"].is_contiguous()
    made = {k: v.requires_grad_() if k in names else v for k, v in strided.items()}
    value = token_knowledge_patch_scores(**made, impl="triton")
    truth_leaves = leaves(inputs)
    truth = token_knowledge_patch_scores(**truth_leaves)
    assert relative_error(value, truth) <= 1e-6
    got, want = gradients(value, made), gradients(truth, truth_leaves)
    for name in names:
        assert relative_error(got[name], want[name]) <= 1e-5, name


@interpreted
@pytest.mark.parametrize("aggregation", ["mean", "lse"])
def test_a_batch_without_anchors_loses_nothing_and_moves_nothing(aggregation: str) -> None:
    inputs = make_inputs(2, 2, 20, 5, 2, 16, seed=9)
    inputs["patch_mask"] = torch.zeros(2, 20, dtype=torch.bool)
    made = leaves(inputs, torch.float32)
    value = token_knowledge_patch_loss(
        **made, logit_scale=10.0, aggregation=aggregation, impl="triton"
    )
    assert value.item() == 0.0
    assert all(torch.count_nonzero(grad) == 0 for grad in gradients(value, made).values())


@interpreted
def test_the_lowest_of_equal_maxima_takes_the_gradient() -> None:
    row = torch.tensor([0.6, 0.8])
    patches = torch.stack([-row, *[row] * 40])[None].requires_grad_()
    value = token_knowledge_patch_scores(
        patches, torch.tensor([[[1.0, 0.0]]]), pooling="max", impl="triton"
    )
    (grad,) = torch.autograd.grad(value.sum(), [patches])
    assert grad[0].abs().sum(1).nonzero()[:, 0].tolist() == [1]


@interpreted
def test_rows_of_any_finite_length_are_normalised() -> None:
    patches = torch.randn(1, 4, 16, generator=torch.Generator().manual_seed(0))
    scaled = patches.clone()
    scaled[0, 1] *= 1e20
    scaled[0, 2] *= 1e-20
    scaled[0, 3] = 0.0
    equal = patches.clone()
    equal[0, 2:] = 0.0
    tokens = torch.randn(1, 3, 16, generator=torch.Generator().manual_seed(1))
    made = scaled.requires_grad_()
    value = token_knowledge_patch_scores(made, tokens, impl="triton")
    assert relative_error(value, token_knowledge_patch_scores(equal, tokens)) <= 1e-6
    (grad,) = torch.autograd.grad(value.sum(), [made])
    assert torch.isfinite(grad).all() and torch.count_nonzero(grad[0, 2:]) == 0


@interpreted
def test_zero_rows_of_tokens_and_entities_are_exact() -> None:
    inputs = make_inputs(2, 2, 20, 5, 2, 16, seed=13, masks=False)
    inputs["tokens"][0, 1] = 0.0
    inputs["knowledge"][1, 0] = 0.0
    compare(inputs, 1e-5)


@interpreted
def test_mixed_dtypes_are_multiplied_in_bfloat16_and_an_unused_scale_gets_gradient_zero() -> None:
    inputs = make_inputs(2, 2, 20, 5, 0, 64, seed=14, masks=False)
    mixed = {"patches": inputs["patches"].bfloat16(), "tokens": inputs["tokens"].float()}
    made, truth_leaves = leaves_of(mixed), leaves(mixed)
    unused = torch.tensor(5.0, requires_grad=True)
    value = token_knowledge_patch_scores(**made, aggregation_scale=unused, impl="triton")
    truth = token_knowledge_patch_scores(**truth_leaves, impl="torch")
    assert relative_error(value, truth) <= 5e-3
    got, want = gradients(value, made | {"unused": unused}), gradients(truth, truth_leaves)
    for name, dtype in (("patches", torch.bfloat16), ("tokens", torch.float32)):
        assert got[name].dtype == dtype
        assert relative_error(got[name], want[name]) <= 1e-2, name
    assert got["unused"].item() == 0.0


@interpreted
def test_statistics_are_kept_only_where_a_gradient_will_be_asked_for() -> None:
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
    arguments = (rows, weight, v, bias, one, one, None, 20, "attention", "lse", False, True)
    torch.library.opcheck(operators.pair_scores_op, arguments, test_utils=tests)
    made = operators.pair_scores_op(*arguments)
    backward = (made[0], *arguments[:7], *made, *arguments[7:11], True)
    torch.library.opcheck(operators.pair_scores_bwd_op, backward, test_utils=tests)
    torch.library.opcheck(operators.unit_patches_bwd, (patches, None, v), test_utils=tests)
    torch.library.opcheck(operators.query_rows_bwd, (*rows_arguments[:6], rows), test_utils=tests)


def info_nce_pair(count: int, dim: int, seed: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    made = [torch.randn(count, dim, generator=g, dtype=torch.float64) for _ in range(2)]
    return F.normalize(made[0], dim=-1), F.normalize(made[1], dim=-1)


def compare_info_nce(image: Tensor, text: Tensor, tolerance: float, scale: float, ids=None) -> None:
    results = []
    for dtype, impl in ((image.dtype, "triton"), (torch.float64, "torch")):
        made = [x.to(dtype).clone().requires_grad_() for x in (image, text)]
        kappa = torch.tensor(scale, dtype=torch.float64 if impl == "torch" else torch.float32)
        made.append(kappa.requires_grad_())
        value = info_nce_loss(*made, pair_ids=ids, impl=impl)
        results.append([value.detach(), *torch.autograd.grad(value, made)])
    for got, want in zip(*results, strict=True):
        assert relative_error(got, want) <= tolerance


@interpreted
@pytest.mark.parametrize(("count", "dim"), [(1, 16), (3, 20), (65, 24), (150, 130)])
@pytest.mark.parametrize("with_ids", [False, True])
def test_info_nce_is_exact(count: int, dim: int, with_ids: bool) -> None:
    image, text = info_nce_pair(count, dim, 0)
    ids = torch.arange(count) // 2 if with_ids else None
    compare_info_nce(image.float(), text.float(), 1e-5, 20.0, ids)


@interpreted
def test_info_nce_in_bfloat16_stays_within_its_gate() -> None:
    image, text = info_nce_pair(65, 64, 1)
    compare_info_nce(image.bfloat16(), text.bfloat16(), 5e-3, 20.0)


@interpreted
def test_info_nce_keeps_the_gradient_of_a_confident_batch() -> None:
    image, noise = info_nce_pair(32, 64, 2)
    text = F.normalize(image + 0.05 * noise, dim=-1)
    image, text = image.float(), text.float()
    value = info_nce_loss(image, text, 40.0, impl="triton")
    assert 0 < value.item() < 1e-8
    compare_info_nce(image, text, 1e-4, 40.0)


@interpreted
def test_info_nce_row_and_column_shares_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: one program. With three multiprocessors rows and columns are split over programs."""
    from mlip.kernels.info_nce import triton_kernels

    image, text = info_nce_pair(300, 16, 3)
    monkeypatch.setattr(triton_kernels, "chip_facts", lambda _: (_chip.SHARED_MEMORY[9, 0], 3))
    compare_info_nce(image.float(), text.float(), 1e-5, 20.0)


@interpreted
def test_scores_split_over_programs_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: float64. With many multiprocessors each pass is cut into partial sums."""
    from mlip.kernels.token_knowledge_patch import triton_kernels

    monkeypatch.setattr(triton_kernels, "chip_facts", lambda _: (_chip.SHARED_MEMORY[9, 0], 64))
    inputs = make_inputs(3, 4, 20, 40, 2, 16, seed=12)
    for pooling in ("attention", "context", "max"):
        compare(inputs, 1e-5, pooling=pooling)
