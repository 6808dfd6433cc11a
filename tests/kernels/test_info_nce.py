"""InfoNCE against cross-entropy in float64, and open_clip's call signature."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import peak_bytes
from mlip.kernels import _chip, _contrastive
from mlip.kernels.info_nce import ClipLoss, info_nce_loss, info_nce_views_loss, op
from mlip.kernels.token_knowledge_patch import contrastive_loss_from_scores
from tests.kernels.oracle import contrastive, nearly_collapsed, relative_error

MACHINE = 1e-12


def unit(count: int, dim: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(count, dim, generator=g, dtype=torch.float64), dim=-1).to(dtype)


def value_and_gradients(loss: Any, image: Tensor, text: Tensor, scale: float) -> list[Tensor]:
    leaves = [image.clone().requires_grad_(), text.clone().requires_grad_()]
    leaves.append(torch.tensor(scale, dtype=image.dtype, requires_grad=True))
    value = loss(*leaves)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


@pytest.mark.parametrize("with_ids", [False, True])
@pytest.mark.parametrize("count", [1, 2, 7])
def test_loss_and_gradients_equal_cross_entropy(count: int, with_ids: bool) -> None:
    image, text = unit(count, 5, 0), unit(count, 5, 1)
    ids = torch.arange(count) // 2 if with_ids else None
    want = value_and_gradients(lambda x, y, k: contrastive(k * x @ y.T, ids), image, text, 14.3)
    got = value_and_gradients(
        lambda x, y, k: info_nce_loss(x, y, k, pair_ids=ids), image, text, 14.3
    )
    for a, b in zip(got, want, strict=True):
        assert (a - b).norm().item() <= MACHINE * (1 + b.norm().item())


@pytest.mark.parametrize("counts", [(1, 2), (2, 2), (3, 1)])
def test_views_give_the_mean_over_all_pairings(counts: tuple[int, int]) -> None:
    """Oracle: cross-entropy of every pairing by itself, float64."""
    images = [unit(7, 5, seed).requires_grad_() for seed in range(counts[0])]
    texts = [unit(7, 5, 10 + seed).requires_grad_() for seed in range(counts[1])]
    scale = torch.tensor(14.3, dtype=torch.float64, requires_grad=True)
    ids = torch.arange(7) // 2
    leaves = [*images, *texts, scale]
    want = torch.stack([contrastive(scale * x @ y.T, ids) for x in images for y in texts]).mean()
    got = info_nce_views_loss(images, texts, scale, pair_ids=ids)
    grads = (torch.autograd.grad(loss, leaves) for loss in (got, want))
    for a, b in zip([got, *next(grads)], [want, *next(grads)], strict=True):
        assert (a - b).norm().item() <= MACHINE * (1 + b.norm().item())


@pytest.mark.parametrize("with_ids", [False, True])
def test_a_second_derivative_is_refused_and_a_first_one_with_its_graph_is_not(
    with_ids: bool,
) -> None:
    """As `loss.backward(create_graph=True)` asks for it, with and without ids."""
    image, text = unit(5, 4, 0).requires_grad_(), unit(5, 4, 1)
    scale = torch.tensor(10.0, dtype=torch.float64, requires_grad=True)
    value = info_nce_loss(image, text, scale, pair_ids=torch.arange(5) if with_ids else None)
    for wanted in (image, scale):
        (plain,) = torch.autograd.grad(value, [wanted], retain_graph=True)
        (grad,) = torch.autograd.grad(value, [wanted], create_graph=True)
        assert torch.equal(grad, plain)
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(grad.square().sum(), [image], retain_graph=True)


@pytest.mark.parametrize("create_graph", [False, True])
def test_backward_under_autocast_gives_the_gradients_of_backward_without(
    create_graph: bool,
) -> None:
    found = []
    for is_on in (False, True):
        leaves = [unit(7, 5, seed, torch.float32).requires_grad_() for seed in (0, 1)]
        with torch.autocast("cpu", torch.bfloat16, enabled=is_on):
            value = info_nce_loss(leaves[0], leaves[1], 10.0)
            found.append(torch.autograd.grad(value, leaves, create_graph=create_graph))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_no_view_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one image view"):
        info_nce_views_loss([], [unit(2, 5, 0)], 1.0)


def test_views_may_lie_in_one_tensor() -> None:
    views: list[Any] = [
        torch.stack([unit(4, 5, 2 * side), unit(4, 5, 2 * side + 1)]) for side in range(2)
    ]
    want = info_nce_views_loss(list(views[0]), list(views[1]), 3.0)
    assert torch.equal(info_nce_views_loss(views[0], views[1], 3.0), want)


def test_gradcheck_holds_in_features_and_scale() -> None:
    leaves = (
        unit(4, 3, 0).requires_grad_(),
        unit(4, 3, 1).requires_grad_(),
        torch.tensor(3.0, dtype=torch.float64, requires_grad=True),
    )
    ids = torch.tensor([1, 2, 1, 5])
    assert torch.autograd.gradcheck(lambda x, y, k: info_nce_loss(x, y, k, pair_ids=ids), leaves)


def test_value_by_hand() -> None:
    """Orthogonal pairs at scale s: the positive scores s, each of two negatives 0."""
    eye = torch.eye(3, dtype=torch.float64)
    value = info_nce_loss(eye, eye, 2.0)
    assert value.item() == pytest.approx(math.log(1 + 2 * math.exp(-2.0)), rel=1e-14)


@pytest.mark.parametrize("noise", [0.1, 0.03])
def test_a_confident_batch_keeps_its_gradient_in_float32(noise: float) -> None:
    """Oracle: the same in float64; at the smaller noise the loss is far below float32's epsilon."""
    image = unit(32, 64, 0)
    text = F.normalize(image + noise * unit(32, 64, 1), dim=-1)
    run = info_nce_loss
    want = value_and_gradients(run, image.float().double(), text.float().double(), 40.0)
    got = value_and_gradients(run, image.float(), text.float(), 40.0)
    assert 0 < want[0].item() < 1e-8
    for a, b in zip(got, want, strict=True):
        assert relative_error(a, b) < 1e-4


@pytest.mark.parametrize("of_scores", [False, True])
def test_a_scale_keeps_its_digits_where_a_batch_has_nearly_collapsed(of_scores: bool) -> None:
    """All cosines are near 1. Oracle: float64."""
    found = []
    for dtype in (torch.float32, torch.float64):
        image, text = (x.to(dtype) for x in nearly_collapsed())
        scale = torch.tensor(14.0, dtype=dtype, requires_grad=True)
        loss = (
            contrastive_loss_from_scores(image @ text.T, logit_scale=scale)
            if of_scores
            else info_nce_loss(image, text, scale, impl="torch")
        )
        found.append(float(torch.autograd.grad(loss, scale)[0]))
    assert abs(found[0] / found[1] - 1.0) <= 1e-4, found


@pytest.mark.parametrize("elements", [30, 1])  # two rows, and less than one
def test_chunks_change_nothing(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    image, text = unit(13, 5, 0), unit(13, 5, 1)
    ids = torch.arange(13) // 3

    def run(x: Tensor, y: Tensor, k: Tensor) -> Tensor:
        return info_nce_loss(x, y, k, pair_ids=ids)

    want = value_and_gradients(run, image, text, 20.0)
    monkeypatch.setattr(_contrastive, "CHUNK_ELEMENTS", elements)
    got = value_and_gradients(run, image, text, 20.0)
    for a, b in zip(got, want, strict=True):
        assert relative_error(a, b) <= MACHINE


def test_chunks_of_masked_scores_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = unit(9, 9, 2).requires_grad_()
    at = torch.arange(9)
    valid = {"image_valid": at % 4 != 1, "text_valid": at % 5 != 3}

    def run() -> list[Tensor]:
        value = contrastive_loss_from_scores(scores, logit_scale=9.0, pair_ids=at // 2, **valid)
        return [value, *torch.autograd.grad(value, [scores])]

    want = run()
    monkeypatch.setattr(_contrastive, "CHUNK_ELEMENTS", 20)
    assert all(relative_error(a, b) <= MACHINE for a, b in zip(run(), want, strict=True))


def test_half_precision_features_are_computed_in_float32() -> None:
    image, text = unit(9, 16, 0, torch.bfloat16), unit(9, 16, 1, torch.bfloat16)
    value = info_nce_loss(image, text, 20.0)
    assert value.dtype == torch.float32
    assert relative_error(value, info_nce_loss(image.double(), text.double(), 20.0)) <= 1e-6


def test_nothing_of_batch_squared_is_kept_for_backward() -> None:
    count, dim = 512, 4
    image, text = unit(count, dim, 0).requires_grad_(), unit(count, dim, 1).requires_grad_()
    held: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        held[x.untyped_storage().data_ptr()] = x.numel()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        value = info_nce_loss(image, text, 20.0)
    # both features, both log-sum-exps, positives, weights, the scale
    assert sum(held.values()) <= 2 * count * dim + 4 * count + 1
    value.backward()


def memory_law(count: int, dim: int, processors: int) -> int:
    """The law at the top of info_nce/triton_kernels.py for bf16 pairs, in bytes.

    With what that leaves out: both gradients, some thirty vectors, and what an allocator rounds up
    """
    forward = 8 * count * min(-(-count // 128), 2 * processors)
    width = -(-count // 64) * 64
    chunk = min(count, max(128, 2**28 // (2 * width) // 128 * 128))
    backward = chunk * (2 * width + 4 * dim) + 4 * count * dim
    return max(forward, backward) + 4 * count * dim + 128 * count + 4 * 2**20


@pytest.mark.parametrize("dim", [256, 512])
@pytest.mark.parametrize("count", [8191, 32768, 65536])
def test_launchers_allocate_what_the_law_allows(
    count: int, dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted without a GPU: launchers run, kernels and products do not. test_gpu_runtime.py
    measures it with real ones."""
    pytest.importorskip("triton", reason="triton is not installed")
    from mlip.kernels.info_nce import triton_kernels

    class NoKernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *args, **keywords: None

    def no_product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
        return torch.empty(a.shape[0], b.shape[1]) if out is None else out

    monkeypatch.undo()  # no poisoned torch.empty: memory that nobody writes costs no page
    for name in vars(triton_kernels):
        if name.endswith("_kernel"):
            monkeypatch.setattr(triton_kernels, name, NoKernel())
    monkeypatch.setattr(triton_kernels, "wide_product", no_product)
    monkeypatch.setattr(triton_kernels, "chip_facts", lambda _: _chip.chip_of((9, 0), 132))
    monkeypatch.setattr(op, "resolve", lambda *_: "triton")
    x, y = (torch.empty(count, dim, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    used = peak_bytes(lambda: torch.autograd.grad(info_nce_loss(x, y, 20.0), (x, y)), "cpu")
    assert used <= memory_law(count, dim, 132)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_features": torch.zeros(3, 4)}, r"one shape \[B, D\]"),
        ({"image_features": torch.zeros(2, 4).long()}, "floating-point"),
        ({"text_features": torch.zeros(2, 4).long()}, "floating-point"),
        ({"text_features": torch.zeros(2, 4, device="meta")}, "one device, got cpu and meta"),
        ({"pair_ids": torch.zeros(2)}, "int64"),
        ({"pair_ids": torch.zeros(3, dtype=torch.int64)}, r"of shape \[2\]"),
        ({"impl": "fast"}, "expected impl"),
        ({"logit_scale": None}, "logit_scale to be a number or a 0-dim tensor, got NoneType"),
        ({"logit_scale": "14.3"}, "logit_scale to be a number or a 0-dim tensor, got str"),
    ],
)
def test_a_wrong_argument_is_named(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "image_features": torch.zeros(2, 4),
        "text_features": torch.zeros(2, 4),
        "logit_scale": 1.0,
    }
    with pytest.raises(ValueError, match=message):
        info_nce_loss(**(arguments | change))


def test_clip_loss_takes_open_clips_call() -> None:
    image, text = unit(5, 8, 0, torch.float32), unit(5, 8, 1, torch.float32)
    scale = torch.tensor(14.3)
    loss = ClipLoss(
        local_loss=False,
        gather_with_grad=False,
        cache_labels=True,
        rank=0,
        world_size=1,
        use_horovod=False,
    )
    labels = torch.arange(5)
    logits = scale * image @ text.T
    want = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    assert loss(image, text, scale).item() == pytest.approx(want.item(), rel=1e-6)
    bias = torch.tensor(-10.0, requires_grad=True)
    made = loss(image, text, scale, logit_bias=bias, output_dict=True)
    assert made["contrastive_loss"].item() == pytest.approx(want.item(), rel=1e-6)
    assert torch.autograd.grad(made["contrastive_loss"], [bias])[0].item() == 0.0
    assert loss(image, text, scale, logit_bias=-10.0).item() == pytest.approx(want.item(), rel=1e-6)


def test_clip_loss_gives_the_logits_that_its_subclasses_ask_for() -> None:
    image, text = unit(5, 8, 0), unit(5, 8, 1)
    for local_loss in (False, True):
        loss = ClipLoss(local_loss=local_loss)
        of_images, of_texts = loss.get_logits(image, text, 14.3, -2.0)
        assert torch.equal(of_images, 14.3 * image @ text.T - 2.0)
        assert relative_error(of_texts, of_images.T) <= MACHINE
        labels = loss.get_ground_truth(image.device, 5)
        sides = F.cross_entropy(of_images, labels) + F.cross_entropy(of_texts, labels)
        assert float(sides / 2) == pytest.approx(loss(image, text, 14.3).item(), rel=1e-12)


def test_clip_loss_refuses_what_it_cannot_honour() -> None:
    with pytest.raises(ValueError, match="gather_with_grad=True"):
        ClipLoss(world_size=2)
    with pytest.raises(ValueError, match="use_horovod=False"):
        ClipLoss(use_horovod=True)
    with pytest.raises(ValueError, match="initialised process group of 2"):
        ClipLoss(gather_with_grad=True, world_size=2)(torch.eye(2), torch.eye(2), 1.0)
