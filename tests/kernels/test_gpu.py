"""The kernels on an NVIDIA GPU: exact, repeatable, within their memory law, never synchronising.

Run by `make gpu-check`. Oracle: plain torch in float64 on the same (rounded) inputs.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mlip.kernels.info_nce import info_nce_loss
from mlip.kernels.token_knowledge_patch import (
    TokenKnowledgePatchLoss,
    contrastive_loss_from_scores,
    tiling,
    token_knowledge_patch_loss,
    token_knowledge_patch_scores,
)
from tests.kernels.oracle import gradients, leaves, make_inputs, poisoned, relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

VARIANTS = [(p, a) for p in ("attention", "context", "max") for a in ("mean", "lse")]
FEATURES = ("patches", "tokens", "knowledge")
GATE = {"attention": 5e-3, "max": 5e-3, "context": 1.5e-2}


def on_gpu(inputs: dict[str, Any], features: torch.dtype = torch.float32) -> dict[str, Any]:
    """Inputs on the GPU: features in one dtype, weights in float32, masks as they are."""
    out = {}
    for name, value in inputs.items():
        if not value.is_floating_point():
            out[name] = value.cuda()
        else:
            out[name] = value.to("cuda", features if name in FEATURES else torch.float32)
    return out


def trainable(inputs: dict[str, Any]) -> dict[str, Any]:
    return {
        k: v.detach().clone().requires_grad_() if v.is_floating_point() else v
        for k, v in inputs.items()
    }


def compare(
    inputs: dict[str, Any], tolerance: float, features: torch.dtype = torch.float32, **options: Any
) -> None:
    """Scores and gradients by Triton and by torch in the same dtype, both against float64."""
    narrow = on_gpu(inputs, features)
    results = []
    for impl, made in (
        ("triton", trainable(narrow)),
        ("torch", leaves(narrow)),
        ("torch", trainable(narrow)),
    ):
        value = token_knowledge_patch_scores(**made, impl=impl, **options)
        results.append((value, gradients(value, made)))
    (value, got), (truth, want), (same_value, same) = results
    assert relative_error(value, truth) <= max(
        tolerance, 2 * relative_error(same_value, truth) + 1e-6
    )
    for name in want if features == torch.float32 else FEATURES:
        if name in want:
            allowed = max(tolerance, 2 * relative_error(same[name], want[name]) + 1e-6)
            assert relative_error(got[name], want[name]) <= allowed, name


@pytest.mark.parametrize(("pooling", "aggregation"), VARIANTS)
@pytest.mark.parametrize("features", [torch.float32, torch.bfloat16])
def test_loss_is_exact_and_masks_hide(pooling: str, aggregation: str, features) -> None:
    inputs = make_inputs(5, 5, 197, 40, 7, 128, seed=1)
    inputs["patch_mask"][-1] = True
    clean = on_gpu(inputs, features)
    dirty = on_gpu(poisoned(inputs), features)
    made, truth_leaves = trainable(dirty), leaves(clean)
    options: dict[str, Any] = {"pooling": pooling, "aggregation": aggregation, "logit_scale": 10.0}
    value = token_knowledge_patch_loss(**made, **options)
    truth = token_knowledge_patch_loss(**truth_leaves, impl="torch", **options)
    is_wide = features == torch.float32
    assert relative_error(value, truth) <= (1e-5 if is_wide else 2e-3)
    got, want = gradients(value, made), gradients(truth, truth_leaves)
    if pooling == "max" and not is_wide:
        return  # rounding swaps nearly equal maxima: gradients have a test of their own
    for name in want if is_wide else FEATURES:
        assert relative_error(got[name], want[name]) <= (1e-5 if is_wide else GATE[pooling]), name


@pytest.mark.parametrize("dim", [32, 96, 128, 192, 256])
@pytest.mark.parametrize("patches", [1, 49, 50, 196, 197, 256, 576, 577])
def test_any_size_is_exact_in_float32(dim: int, patches: int) -> None:
    tokens = {1: 1, 49: 2, 50: 31, 196: 33, 197: 77, 256: 100, 576: 127, 577: 128}[patches]
    inputs = make_inputs(3, 2, patches, tokens, 2, dim, seed=2, masks=False)
    compare(inputs, 1e-5)


@pytest.mark.parametrize("pooling", ["attention", "context", "max"])
@pytest.mark.parametrize(("patches", "dim"), [(49, 128), (196, 128), (196, 256), (576, 256)])
def test_bfloat16_is_within_its_gate(pooling: str, patches: int, dim: int) -> None:
    inputs = make_inputs(4, 6, patches, 64, 5, dim, seed=3, masks=False)
    if pooling != "max":
        compare(inputs, GATE[pooling], torch.bfloat16, pooling=pooling)
        return
    # one clear best patch for every token: rounding cannot swap it
    g = torch.Generator().manual_seed(4)
    basis = torch.linalg.qr(torch.randn(dim, dim, generator=g, dtype=torch.float64))[0]
    count = min(patches, dim)
    inputs = {
        "patches": torch.stack([basis[torch.randperm(dim, generator=g)[:count]] for _ in range(4)]),
        "tokens": basis[torch.randint(dim, (6, 64), generator=g)]
        + 0.01 * torch.randn(6, 64, dim, generator=g, dtype=torch.float64),
    }
    narrow = on_gpu(inputs, torch.bfloat16)
    made = trainable(narrow)
    value = token_knowledge_patch_scores(**made, pooling="max")
    truth = token_knowledge_patch_scores(**leaves(narrow), pooling="max", impl="torch")
    assert relative_error(value, truth) <= 5e-3


@pytest.mark.parametrize("alpha", [0.0, 1e-3, 10.0, 79.0, 81.0, 200.0])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_any_attention_scale_is_exact(alpha: float, as_tensor: bool) -> None:
    inputs = make_inputs(3, 4, 50, 9, 2, 32, seed=5)
    scale = torch.tensor(alpha, device="cuda") if as_tensor else alpha
    compare(inputs, max(1e-5, alpha * 2**-22), attention_scale=scale)


def _training_inputs(batch: int, tokens: int, patches: int, dim: int, fill: float = 0.6):
    g = torch.Generator(device="cuda").manual_seed(6)
    half = torch.bfloat16
    made = {
        "patches": torch.randn(batch, patches, dim, generator=g, device="cuda", dtype=half),
        "tokens": torch.randn(batch, tokens, dim, generator=g, device="cuda", dtype=half),
        "knowledge": torch.randn(batch, 8, dim, generator=g, device="cuda", dtype=half),
        "token_weights": (torch.rand(batch, tokens, generator=g, device="cuda") < fill).float(),
    }
    for name in FEATURES:
        made[name].requires_grad_()
    return made


@pytest.mark.parametrize("pooling", ["attention", "max", "context"])
def test_a_hundred_repeats_are_bit_equal(pooling: str) -> None:
    made = _training_inputs(48, 40, 100, 128)
    first: list[Tensor] | None = None
    for _ in range(100):
        value = token_knowledge_patch_loss(**made, logit_scale=10.0, pooling=pooling)
        now = [value, *torch.autograd.grad(value, [made[n] for n in FEATURES])]
        first = now if first is None else first
        assert all(torch.equal(a, b) for a, b in zip(now, first, strict=True))


def test_info_nce_repeats_bit_for_bit() -> None:
    g = torch.Generator(device="cuda").manual_seed(7)
    x, y = (
        F.normalize(torch.randn(3000, 256, generator=g, device="cuda"), dim=-1)
        .bfloat16()
        .requires_grad_()
        for _ in range(2)
    )
    runs = []
    for _ in range(20):
        value = info_nce_loss(x, y, 50.0)
        runs.append([value, *torch.autograd.grad(value, [x, y])])
    assert all(torch.equal(a, b) for run in runs for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("batch", [128, 384])
def test_memory_follows_its_law(batch: int) -> None:
    """Beside inputs and gradients: one unit copy, 8 N^2, min(20 N^2 J, 1 GiB) and 64 MiB."""
    tokens, patches, dim = 112, 196, 128
    made = _training_inputs(batch, tokens, patches, dim, fill=2.0)

    def step() -> None:
        value = token_knowledge_patch_loss(**made, logit_scale=10.0)
        value.backward()

    step()
    for name in FEATURES:
        made[name].grad = None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    used = torch.cuda.max_memory_allocated() - before
    rows = tokens + 8
    copies = 2 * dim * batch * (rows + tiling.padded_patches(patches))
    law = 2 * copies + 8 * batch**2 + min(20 * batch**2 * rows, 2**30) + 64 * 2**20
    assert used <= law, (used, law)


def test_info_nce_needs_memory_in_proportion_to_the_batch() -> None:
    used = []
    for count in (8192, 32768):
        x, y = (
            F.normalize(torch.randn(count, 256, device="cuda"), dim=-1).bfloat16().requires_grad_()
            for _ in range(2)
        )
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        info_nce_loss(x, y, 20.0).backward()
        torch.cuda.synchronize()
        used.append(torch.cuda.max_memory_allocated() - before)
        del x, y
    assert used[1] <= 4.5 * used[0] + 2**25


@pytest.mark.parametrize("learned", [False, True])
def test_nothing_synchronises(learned: bool) -> None:
    made = _training_inputs(16, 20, 49, 64)
    ids = torch.arange(16, device="cuda") // 2
    module = TokenKnowledgePatchLoss(learn_scales=learned).cuda()
    mask = torch.ones(16, 49, dtype=torch.bool, device="cuda")
    module(**made, patch_mask=mask, pair_ids=ids).backward()  # compiles, allocates
    x, y = (F.normalize(made[n][:, 0], dim=-1) for n in ("patches", "tokens"))
    info_nce_loss(x, y, 10.0, pair_ids=ids)
    torch.cuda.set_sync_debug_mode("error")
    try:
        module(**made, patch_mask=mask, pair_ids=ids).backward()
        x, y = (F.normalize(made[n][:, 0], dim=-1) for n in ("patches", "tokens"))
        info_nce_loss(x, y, 10.0, pair_ids=ids).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_cuda_graph_replays_forward_and_backward() -> None:
    made = _training_inputs(16, 20, 49, 64)
    leaves_ = [made[n] for n in FEATURES]

    def step() -> tuple[Tensor, ...]:
        value = token_knowledge_patch_loss(**made, logit_scale=10.0)
        return value, *torch.autograd.grad(value, leaves_)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        made["tokens"].copy_(torch.randn_like(made["tokens"]))
    graph.replay()
    torch.cuda.synchronize()
    for got, want in zip(captured, step(), strict=True):
        assert torch.equal(got, want)


def test_torch_compile_keeps_one_graph() -> None:
    made = _training_inputs(16, 20, 49, 64)
    leaves_ = [made[n] for n in FEATURES]

    def run(patches: Tensor, tokens: Tensor, knowledge: Tensor) -> Tensor:
        rest = made | {"patches": patches, "tokens": tokens, "knowledge": knowledge}
        scores = token_knowledge_patch_scores(**rest)
        return contrastive_loss_from_scores(scores, logit_scale=10.0) * 2.0

    truth = run(*leaves_)
    value = torch.compile(run, fullgraph=True)(*leaves_)
    assert relative_error(value, truth) <= 1e-6
    pairs = zip(
        torch.autograd.grad(value, leaves_), torch.autograd.grad(truth, leaves_), strict=True
    )
    for got, want in pairs:
        assert relative_error(got, want) <= 1e-3


def test_autocast_narrows_float32_inputs_and_gradients_stay_float32() -> None:
    inputs = on_gpu(make_inputs(4, 4, 49, 20, 3, 64, seed=8, masks=False))
    made = trainable(inputs)
    truth_leaves = leaves(inputs)
    truth = token_knowledge_patch_scores(**truth_leaves, impl="torch")
    with torch.autocast("cuda", torch.bfloat16):
        value = token_knowledge_patch_scores(**made)
    assert value.dtype == torch.float32
    assert 1e-7 < relative_error(value, truth) <= 5e-3
    got, want = gradients(value, made), gradients(truth, truth_leaves)
    for name in FEATURES:
        assert got[name].dtype == torch.float32
        assert relative_error(got[name], want[name]) <= 1e-2


def test_float16_gradients_do_not_underflow() -> None:
    inputs = make_inputs(4, 4, 196, 64, 3, 128, seed=9, masks=False)
    narrow = on_gpu(inputs, torch.float16)
    made, truth_leaves = trainable(narrow), leaves(narrow)
    value = token_knowledge_patch_loss(**made, logit_scale=10.0) * 1024.0
    truth = token_knowledge_patch_loss(**truth_leaves, impl="torch", logit_scale=10.0) * 1024.0
    got, want = gradients(value, made), gradients(truth, truth_leaves)
    for name in FEATURES:
        assert relative_error(got[name], want[name]) <= 1e-2, name


def test_offsets_beyond_32_bits_are_right() -> None:
    """Two images whose rows lie more than 2^31 elements apart, in a storage of 4.3 GB."""
    dim, patches = 64, 49
    far = 2**31 + 64
    storage = torch.zeros(far + patches * dim, dtype=torch.bfloat16, device="cuda")
    apart = torch.as_strided(storage, (2, patches, dim), (far, dim, 1))
    with torch.no_grad():
        apart.copy_(torch.randn(2, patches, dim, device="cuda"))
    tokens = torch.randn(3, 8, dim, device="cuda", dtype=torch.bfloat16)
    value = token_knowledge_patch_scores(apart, tokens)
    assert torch.equal(value, token_knowledge_patch_scores(apart.contiguous(), tokens))


def test_statistics_beyond_32_bits_are_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """M x rows above 2^31: the corner blocks equal those of small calls."""
    monkeypatch.setattr(tiling, "WORKSPACE_CAP_BYTES", 2**38)
    batch, tokens = 4352, 128
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of free GPU memory")
    patches = torch.randn(batch, 16, 32, device="cuda", dtype=torch.bfloat16).requires_grad_()
    text = torch.randn(batch, tokens, 32, device="cuda", dtype=torch.bfloat16)
    value = token_knowledge_patch_scores(patches, text)
    corner = token_knowledge_patch_scores(patches[-3:], text[-3:])
    assert torch.equal(value[-3:, -3:], corner)
    weights = torch.zeros_like(value)
    weights[-3:, -3:] = 1.0
    (got,) = torch.autograd.grad((value * weights).sum(), [patches])
    (want,) = torch.autograd.grad(corner.sum(), [patches])
    assert relative_error(got[-3:], want[-3:]) <= 1e-3
    assert torch.count_nonzero(got[:-3]) == 0


def test_changing_lengths_compile_nothing_new() -> None:
    from mlip.kernels.token_knowledge_patch.forward_triton_kernels import _pair_fwd_kernel

    patches = torch.randn(4, 49, 64, device="cuda", dtype=torch.bfloat16)

    def compiled() -> int:
        return sum(len(cache[0]) for cache in _pair_fwd_kernel.device_caches.values())

    def run(tokens: int) -> None:
        text = torch.randn(4, tokens, 64, device="cuda", dtype=torch.bfloat16)
        token_knowledge_patch_scores(patches, text)

    for tokens in (16, 17, 33):
        run(tokens)
    before = compiled()
    for tokens in range(18, 60, 3):
        run(tokens)
    # integers divisible by 16 or equal to 1 are specialised by Triton: a handful, not one a length
    assert compiled() - before <= 3


@pytest.mark.parametrize(
    ("count", "dim", "features"),
    [
        (1, 64, torch.float32),
        (65, 100, torch.float32),
        (3000, 256, torch.float32),
        (65, 100, torch.bfloat16),
        (1000, 512, torch.bfloat16),
        (3000, 256, torch.bfloat16),
    ],
)
def test_info_nce_is_exact(count: int, dim: int, features: torch.dtype) -> None:
    g = torch.Generator().manual_seed(10)
    image = F.normalize(torch.randn(count, dim, generator=g), dim=-1)
    text = F.normalize(image + 0.3 * torch.randn(count, dim, generator=g) / dim**0.5, dim=-1)
    ids = (torch.arange(count) // 2).cuda()
    results = []
    narrow = [x.to("cuda", features) for x in (image, text)]
    for impl, dtype in (("triton", features), ("torch", torch.float64)):
        made = [x.to(dtype).clone().requires_grad_() for x in narrow]
        scale_dtype = torch.float64 if impl == "torch" else torch.float32
        made.append(torch.tensor(30.0, device="cuda", dtype=scale_dtype, requires_grad=True))
        value = info_nce_loss(made[0], made[1], made[2], pair_ids=ids, impl=impl)
        results.append([value.detach(), *torch.autograd.grad(value, made)])
    tolerance = 1e-5 if features == torch.float32 else 5e-3
    for got, want in zip(*results, strict=True):
        assert relative_error(got, want) <= tolerance


def test_info_nce_keeps_the_gradient_of_a_confident_batch() -> None:
    g = torch.Generator().manual_seed(11)
    image = F.normalize(torch.randn(256, 128, generator=g), dim=-1)
    text = F.normalize(image + 0.01 * torch.randn(256, 128, generator=g), dim=-1)
    results = []
    for dtype, impl in ((torch.float32, "triton"), (torch.float64, "torch")):
        made = [x.to("cuda", dtype).requires_grad_() for x in (image, text)]
        value = info_nce_loss(made[0], made[1], 60.0, impl=impl)
        results.append([value.detach(), *torch.autograd.grad(value, made)])
    assert 0 < results[1][0].item() < 1e-8
    for got, want in zip(*results, strict=True):
        assert relative_error(got, want) < 1e-4


def test_fused_and_torch_training_curves_lie_on_each_other() -> None:
    """Forty steps of two linear towers on fixed features: the losses agree to 1 percent."""
    curves = []
    for impl in ("triton", "torch"):
        g = torch.Generator().manual_seed(12)
        base = torch.randn(32, 16, 64, generator=g).cuda()
        noise = [torch.randn(32, 16, 64, generator=g).cuda() for _ in range(2)]
        towers = [torch.nn.Linear(64, 64).cuda() for _ in range(2)]
        with torch.no_grad():
            for tower in towers:
                tower.weight.copy_(torch.randn(64, 64, generator=g) / 8)
                tower.bias.zero_()
        optimiser = torch.optim.Adam([p for t in towers for p in t.parameters()], lr=1e-3)
        curve = []
        for _ in range(40):
            with torch.autocast("cuda", torch.bfloat16):
                patches, tokens = towers[0](base + noise[0]), towers[1](base + noise[1])
            loss = token_knowledge_patch_loss(patches, tokens, logit_scale=14.3, impl=impl)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            curve.append(loss.item())
        curves.append(curve)
    assert curves[1][-1] < 0.8 * curves[1][0]
    for got, want in zip(*curves, strict=True):
        assert got == pytest.approx(want, rel=1e-2, abs=1e-3)
