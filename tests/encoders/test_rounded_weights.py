"""Weights rounded together are autocast's own: every loss, gradient and update to the bit."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn as nn
from torch.utils._python_dispatch import TorchDispatchMode

from mlip.encoders.rounded_weights import RoundedTogether
from mlip.ranks import distributed
from mlip.settings.config import load
from mlip.training.engine import build_engine
from mlip.training.step import Engine
from tests.training.exact_step import (
    PROGRESS,
    SETTINGS,
    exact_engine,
    make_batch,
    make_objective,
)

BF16 = ("train.precision=bf16",)
RESNET = (
    "model.vision={kind: resnet, norm: group, patch_stage: 1, options: {embedding_size: 32, "
    "hidden_sizes: [32, 64], depths: [1, 1], layer_type: basic}}",
)
WAYS: dict[str, tuple[int, tuple[str, ...]]] = {
    "vit and padded reports": (1, BF16),
    "packed reports": (1, (*BF16, "model.text.packed=true")),
    "residual": (1, (*BF16, "train.residual=bf16", "model.text.packed=true")),
    "gradient cache": (3, BF16),
    "checkpointed layers": (
        1,
        (*BF16, "model.vision.checkpointing=true", "model.text.checkpointing=true"),
    ),
    "resnet": (1, (*BF16, *RESNET)),
}


def _engine(way: str, *, is_together: bool) -> Engine:
    passes, more = WAYS[way]
    if way == "resnet":
        settings = [s for s in SETTINGS if not s.startswith("model.vision")]
        config = load([], [*settings, *more, "batch.global_pairs=8", "train.engine=plain"])
        engine = build_engine(make_objective(config).to(distributed.device()), config)
    else:
        engine = exact_engine(8, passes=passes, more=more)
    engine.objective.model.round_weights_together(is_together)
    return engine


def test_it_is_off_where_it_would_cost_memory_or_is_done_elsewhere() -> None:
    def is_on(*more: str, passes: int = 1) -> bool:
        engine = exact_engine(8, passes=passes, more=more)
        return isinstance(engine.objective.model._image_weights, RoundedTogether)

    assert is_on(*BF16) and not is_on() and not is_on(*BF16, passes=2)
    assert not is_on(*BF16, "train.compile=true")


class _Counted(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("way", WAYS)
def test_steps_are_autocast_s_own_to_the_bit(way: str) -> None:
    made = []
    for is_together in (True, False):
        engine = _engine(way, is_together=is_together)
        results = [
            engine.start_step(make_batch(n, 8), step=n, progress=PROGRESS, lr=0.01).result()
            for n in range(3)
        ]
        numbers = [(r.total, r.grad_norm, tuple(r.terms.values())) for r in results]
        made.append((numbers, {n: p.detach().clone() for n, p in engine.parameters.items()}))
        assert all(isinstance(p, nn.Parameter) for p in engine.objective.parameters())
    assert made[0][0] == made[1][0]
    for name, value in made[0][1].items():
        assert torch.equal(value, made[1][1][name]), name


@pytest.mark.gpu
@pytest.mark.parametrize("way", WAYS)
def test_on_a_gpu_steps_are_autocast_s_own(way: str) -> None:
    """The first loss to the bit; what atomics have summed since, to rounding."""
    totals = []
    for is_together in (True, False):
        engine = _engine(way, is_together=is_together)
        assert engine.device.type == "cuda"
        batches = [make_batch(n, 8) for n in range(3)]
        steps = enumerate(batches)
        # a small rate: Adam's first step is lr times the sign of a gradient that may be noise
        totals.append(
            [engine.start_step(b, step=n, progress=PROGRESS, lr=1e-4).result() for n, b in steps]
        )
    assert totals[0][0].total == totals[1][0].total
    for one, other in zip(*totals, strict=True):
        assert one.total == pytest.approx(other.total, rel=1e-3)
        assert one.grad_norm == pytest.approx(other.grad_norm, rel=1e-2)


def test_casts_of_weights_and_gradients_are_two_operations_a_tower() -> None:
    counts = []
    for is_together in (True, False):
        engine = _engine("vit and padded reports", is_together=is_together)
        with _Counted() as counted:
            engine.start_step(make_batch(0, 8), step=0, progress=PROGRESS, lr=0.01).result()
        counts.append(counted.calls)
    model = engine.objective.model
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    assert counts[0]["aten::_foreach_copy_"] - counts[1]["aten::_foreach_copy_"] == 4
    spared = counts[1]["aten::_to_copy"] - counts[0]["aten::_to_copy"]
    weights = 2 * len([m for m in layers if m not in set(model.knowledge_projection.modules())])
    assert spared == 2 * weights  # there and back, a weight and a bias each


def _tower() -> nn.Sequential:
    torch.manual_seed(0)
    tower = nn.Sequential(nn.Linear(5, 6), nn.GELU(), nn.Linear(6, 5))
    tower.append(tower[0])  # a layer under two names
    return tower


def test_a_shared_layer_a_frozen_one_and_one_that_is_not_used() -> None:
    found = []
    for is_together in (True, False):
        tower, idle = _tower(), nn.Linear(3, 3)
        tower[2].requires_grad_(False)
        rounded = RoundedTogether([tower, idle] if is_together else [])
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(1))
        with torch.autocast("cpu", torch.bfloat16), rounded():
            out = tower(x)
        with _Counted() as counted:
            out.float().square().sum().backward()
        assert idle.weight.grad is None and tower[2].weight.grad is None
        found.append((out, tower[0].weight.grad, tower[0].bias.grad))
        # a product for the frozen layer's input, none for its weight; the first one's input is data
        assert counted.calls["aten::mm"] == 4
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_a_frozen_tower_keeps_no_activations() -> None:
    tower = _tower().requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16), RoundedTogether([tower, nn.Linear(2, 2)])():
        assert not tower(torch.randn(4, 5)).requires_grad


class _NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> None:
        return None


def test_a_loss_that_hands_back_no_gradient_at_all() -> None:
    tower = _tower()
    with torch.autocast("cpu", torch.bfloat16), RoundedTogether([tower])():
        out = tower(torch.randn(4, 5))
    _NoGradient.apply(out).sum().backward()
    assert all(p.grad is None for p in tower.parameters())


def test_parameters_are_back_in_their_places_after_an_error_and_untouched_without_autocast() -> (
    None
):
    tower = _tower()
    before = [id(p) for p in tower.parameters()]
    rounded = RoundedTogether([tower])
    with pytest.raises(KeyError), torch.autocast("cpu", torch.bfloat16), rounded():
        assert tower[0].weight.dtype == torch.bfloat16
        raise KeyError
    assert [id(p) for p in tower.parameters()] == before
    with rounded():
        assert tower[0].weight.dtype == torch.float32
