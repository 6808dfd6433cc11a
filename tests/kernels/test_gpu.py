"""The kernels on an NVIDIA GPU are exact at every size, dtype, mask and scale.

Run by `make gpu-check`. Oracle: plain torch in float64 on the same (rounded) inputs.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from mlip.kernels.info_nce import info_nce_loss, info_nce_views_loss
from mlip.kernels.keyed_uniform import splitmix_uniform
from mlip.kernels.token_knowledge_patch import (
    token_knowledge_patch_loss,
    token_knowledge_patch_scores,
)
from tests.kernels.gpu_inputs import FEATURES, compare, on_gpu
from tests.kernels.oracle import (
    LEARNED_SCALES,
    assert_broken_inputs_show,
    assert_broken_weights_show,
    gradients,
    learned_scale_errors,
    leaves,
    leaves_as_they_are,
    make_inputs,
    poisoned,
    relative_error,
)

pytestmark = pytest.mark.gpu

VARIANTS = [(p, a) for p in ("attention", "context", "max") for a in ("mean", "lse")]
GATE = {"attention": 5e-3, "max": 5e-3, "context": 1.5e-2}


@pytest.mark.parametrize("width", [1, 3, 512])
def test_keyed_draws_are_the_cpu_s_to_the_bit(width: int) -> None:
    index = torch.cat([torch.arange(1000), torch.tensor([-1, 2**62, -(2**63)])])
    for word in (0, 7, 2**63 - 16, 2**63, 2**64 - 1):
        made = splitmix_uniform(word, index.cuda(), width, impl="triton").cpu()
        assert torch.equal(made, splitmix_uniform(word, index, width))


@pytest.mark.parametrize(("pooling", "aggregation"), VARIANTS)
@pytest.mark.parametrize("features", [torch.float32, torch.bfloat16])
def test_loss_is_exact_and_masks_hide(pooling: str, aggregation: str, features) -> None:
    inputs = make_inputs(5, 5, 197, 40, 7, 128, seed=1)
    inputs["patch_mask"][-1] = True
    clean = on_gpu(inputs, features)
    dirty = on_gpu(poisoned(inputs), features)
    made, truth_leaves = leaves_as_they_are(dirty), leaves(clean)
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


@pytest.mark.parametrize(
    ("patches", "tokens", "dims"),  # every size compiles kernels of its own: two dims each
    [
        (1, 1, (32, 256)),
        (49, 2, (128, 192)),
        (50, 31, (96, 256)),
        (196, 33, (128, 256)),
        (197, 77, (32, 192)),
        (256, 100, (96, 128)),
        (576, 127, (192, 256)),
        (577, 128, (32, 128)),
    ],
)
def test_any_size_is_exact_in_float32(patches: int, tokens: int, dims: tuple[int, int]) -> None:
    for dim in dims:
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
    made = leaves_as_they_are(narrow)
    value = token_knowledge_patch_scores(**made, pooling="max")
    truth = token_knowledge_patch_scores(**leaves(narrow), pooling="max", impl="torch")
    assert relative_error(value, truth) <= 5e-3


@pytest.mark.parametrize("alpha", [0.0, 1e-3, 10.0, 74.0, 76.0, 200.0])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_any_attention_scale_is_exact(alpha: float, as_tensor: bool) -> None:
    inputs = make_inputs(3, 4, 50, 9, 2, 32, seed=5)
    scale = torch.tensor(alpha, device="cuda") if as_tensor else alpha
    compare(inputs, max(1e-5, alpha * 2**-22), attention_scale=scale)


@pytest.mark.parametrize("alpha", LEARNED_SCALES)
@pytest.mark.parametrize("features", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pooling", ["attention", "context"])
def test_a_learned_attention_scale_is_exact_on_every_way(
    alpha: float, features, pooling: str
) -> None:
    errors = learned_scale_errors(alpha, features, "cuda", 128, 196, pooling)
    # rounding to bfloat16 moves a softmax logit by up to alpha 2^-9: 0.4 at 200
    narrow = 1.5e-2 if alpha <= 100 else 2.5e-2
    if pooling == "context":  # whose weights are rounded too
        narrow = max(narrow, alpha * 2**-9)
    most = max(1e-5, alpha * 2**-20) if features == torch.float32 else narrow
    assert all(error <= most for error in errors.values()), errors


@pytest.mark.parametrize("pooling", ["attention", "context", "max"])
@pytest.mark.parametrize("aggregation", ["mean", "lse"])
def test_what_is_not_a_number_shows_in_the_score(pooling: str, aggregation: str) -> None:
    """A chip's maximum passes NaN over, the interpreter's does not."""
    assert_broken_inputs_show("triton", "cuda", pooling, aggregation)


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_a_weight_that_is_not_a_number_shows_in_the_score(impl: str) -> None:
    for bad in (torch.nan, torch.inf):
        assert_broken_weights_show(impl, "cuda", "mean", bad)


def test_autocast_narrows_float32_inputs_and_gradients_stay_float32() -> None:
    inputs = on_gpu(make_inputs(4, 4, 49, 20, 3, 64, seed=8, masks=False))
    made = leaves_as_they_are(inputs)
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
    made, truth_leaves = leaves_as_they_are(narrow), leaves(narrow)
    value = token_knowledge_patch_loss(**made, logit_scale=10.0) * 1024.0
    truth = token_knowledge_patch_loss(**truth_leaves, impl="torch", logit_scale=10.0) * 1024.0
    got, want = gradients(value, made), gradients(truth, truth_leaves)
    for name in FEATURES:
        assert relative_error(got[name], want[name]) <= 1e-2, name


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
@pytest.mark.parametrize("scale", [30.0, 100.0])  # 100: logits need a running maximum
def test_info_nce_is_exact(count: int, dim: int, features: torch.dtype, scale: float) -> None:
    g = torch.Generator().manual_seed(10)
    image = F.normalize(torch.randn(count, dim, generator=g), dim=-1)
    # cosines of pairs near 0.3: nearer pairs at scale 100 leave gradients that float32 cannot hold
    text = F.normalize(image + 3.0 * torch.randn(count, dim, generator=g) / dim**0.5, dim=-1)
    ids = (torch.arange(count) // 2).cuda()
    results = []
    narrow = [x.to("cuda", features) for x in (image, text)]
    for impl, dtype in (("triton", features), ("torch", torch.float64)):
        made = [x.to(dtype).clone().requires_grad_() for x in narrow]
        scale_dtype = torch.float64 if impl == "torch" else torch.float32
        made.append(torch.tensor(scale, device="cuda", dtype=scale_dtype, requires_grad=True))
        value = info_nce_loss(made[0], made[1], made[2], pair_ids=ids, impl=impl)
        results.append([value.detach(), *torch.autograd.grad(value, made)])
    # rounding a logit to float32 alone moves its power by scale * 2^-24
    tolerance = max(1e-5, scale * 2**-21) if features == torch.float32 else 5e-3
    # the terms of d scale are of both signs and nearly cancel: 4.1e-4 of float32 on an H200
    cancelled = 20 if features == torch.float32 else 1
    for got, want, terms in zip(*results, (1, 1, 1, cancelled), strict=True):
        assert count == 1 or want.abs().mean() > 1e-12  # one pair has no negative, and no gradient
        assert relative_error(got, want) <= terms * tolerance


@pytest.mark.parametrize("features", [torch.float32, torch.bfloat16])
def test_info_nce_over_views_is_exact(features: torch.dtype) -> None:
    g = torch.Generator().manual_seed(13)
    views = [F.normalize(torch.randn(300, 128, generator=g), dim=-1) for _ in range(4)]
    narrow = [x.to("cuda", features) for x in views]
    results = []
    for impl, dtype in (("triton", features), ("torch", torch.float64)):
        made = [x.to(dtype).clone().requires_grad_() for x in narrow]
        value = info_nce_views_loss(made[:2], made[2:], 20.0, impl=impl)
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
