"""cached_forward against the same towers without a cache."""

from __future__ import annotations

import sys
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mlip.training import grad_cache
from mlip.training.grad_cache import cached_forward, num_micro_batches


class _Tower(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.calls = 0
        self.net = nn.Sequential(
            nn.Linear(6, 16), nn.GELU(), nn.Dropout(dropout), nn.LayerNorm(16), nn.Linear(16, 8)
        )

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        self.calls += 1
        hidden = self.net(x * mask[:, None])
        return hidden, hidden.square().mean(dim=1)


def _loss(outputs: Any) -> Tensor:
    features, scores = outputs
    logits = features @ features.T
    return torch.logsumexp(logits, dim=1).mean() + (scores * scores.flip(0)).sum()


def _run(dropout: float, how: str, micro_size: int) -> tuple[Tensor, list[Tensor], _Tower]:
    torch.manual_seed(0)
    tower = _Tower(dropout)
    x, mask = torch.randn(12, 6), (torch.rand(12) > 0.2).float()
    torch.manual_seed(1)
    if how == "cached":
        outputs = cached_forward(tower, (x, mask), micro_size)
    else:
        pieces = zip(x.split(micro_size), mask.split(micro_size), strict=True)
        outputs = tuple(
            torch.cat(c) for c in zip(*(tower(*piece) for piece in pieces), strict=True)
        )
    loss = _loss(outputs)
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in tower.parameters()], tower


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("micro_size", [3, 4, 5])
def test_cache_equals_the_same_micro_batches_without_it_bit_for_bit(dropout, micro_size):
    # oracle: the same micro-batches with all their activations kept
    loss, grads, _ = _run(dropout, "kept", micro_size)
    cached_loss, cached_grads, tower = _run(dropout, "cached", micro_size)
    assert torch.equal(loss, cached_loss)
    assert all(torch.equal(a, b) for a, b in zip(grads, cached_grads, strict=True))
    assert tower.calls == 2 * num_micro_batches(12, micro_size), "the cache did not recompute"


@pytest.mark.parametrize("micro_size", [1, 3, 5, 6])
def test_cache_equals_one_pass_over_the_whole_batch(micro_size):
    # oracle: one pass; the sums of a gradient are ordered differently, hence 1e-6
    loss, grads, _ = _run(0.0, "kept", 12)
    cached_loss, cached_grads, _ = _run(0.0, "cached", micro_size)
    torch.testing.assert_close(cached_loss, loss, rtol=1e-6, atol=0.0)
    for grad, cached in zip(grads, cached_grads, strict=True):
        torch.testing.assert_close(cached, grad, rtol=1e-5, atol=1e-6)


def test_plain_accumulation_would_differ():
    # the reason for the cache: losses of micro-batches miss each other's negatives
    _, grads, _ = _run(0.0, "kept", 12)
    torch.manual_seed(0)
    tower = _Tower(0.0)
    x, mask = torch.randn(12, 6), (torch.rand(12) > 0.2).float()
    for piece in zip(x.split(3), mask.split(3), strict=True):
        (_loss(tower(*piece)) / 4).backward()
    gap = max(
        float((a - b.grad).abs().max() / a.abs().max())
        for a, b in zip(grads, tower.parameters(), strict=True)
    )
    assert gap > 0.1


@pytest.mark.parametrize("micro_size", [0, 12, 100])
def test_one_micro_batch_recomputes_nothing(micro_size):
    _, _, tower = _run(0.5, "cached", micro_size)
    assert tower.calls == 1


def test_no_gradients_no_recomputation():
    tower = _Tower(0.0)
    with torch.no_grad():
        features, _ = cached_forward(tower, (torch.randn(12, 6), torch.ones(12)), 4)
    assert tower.calls == 3 and features.shape == (12, 8)


def test_every_parameter_gradient_is_accumulated_once():
    # ZeRO's hooks hang on this: a hook that fires per micro-batch would reduce partial gradients
    torch.manual_seed(0)
    tower = _Tower(0.3)
    fired: dict[int, int] = {}
    for parameter in tower.parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda p: fired.__setitem__(id(p), fired.get(id(p), 0) + 1)
        )
    _loss(cached_forward(tower, (torch.randn(12, 6), torch.ones(12)), 3)).backward()
    assert list(fired.values()) == [1] * len(list(tower.parameters()))


def test_rows_must_agree():
    with pytest.raises(ValueError, match=r"equal numbers of rows, got \[3, 4\]"):
        cached_forward(lambda a, b: (a, b), (torch.zeros(3, 1), torch.zeros(4, 1)), 2)


@pytest.mark.parametrize("passes, sizes", [(1, [5]), (3, [2, 2, 1]), (9, [1] * 5)])
def test_a_rank_with_few_rows_makes_as_many_passes_as_the_others(passes, sizes):
    # at most one a row: what is left has nothing to compute
    tower, x, mask = _Tower(0.0), torch.randn(5, 6), torch.ones(5)
    seen: list[int] = []
    tower.register_forward_pre_hook(lambda module, given: seen.append(len(given[0])))
    outputs = cached_forward(tower, (x, mask), 8, passes)
    assert seen == sizes
    for made, wanted in zip(outputs, tower(x, mask), strict=True):
        torch.testing.assert_close(made, wanted)


def test_a_pass_that_is_computed_again_runs_to_its_end():
    """ZeRO-3 gathers a layer's parameters in one hook and releases them in another."""
    tower, x = _Tower(0.0), torch.randn(4, 6)
    entered: list[nn.Module] = []
    left: list[nn.Module] = []
    for layer in tower.net:
        layer.register_forward_pre_hook(lambda module, given: entered.append(module))
        layer.register_forward_hook(lambda module, given, made: left.append(module))
    cached_forward(lambda rows: (tower.net(rows),), (x,), 2)[0].sum().backward()
    assert len(left) == len(entered) == 4 * len(tower.net)


def test_zero_3_keeps_parameters_until_the_last_thread_has_recomputed_and_no_longer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def release(self: Any) -> None: ...

    coordinator: Any = type("Coordinator", (), {"release_sub_module": release})
    zero_3 = SimpleNamespace(PartitionedParameterCoordinator=coordinator)
    monkeypatch.setitem(sys.modules, grad_cache._ZERO_3, zero_3)
    first_is_in, both_are_in, first_is_over = (threading.Event() for _ in range(3))
    kept: list[bool] = []

    def train(is_first: bool) -> None:
        calls: list[int] = []

        def tower(x: Tensor) -> Tensor:
            calls.append(len(x))
            if len(calls) == 3:  # two micro-batches, and the first one again
                (first_is_in if is_first else both_are_in).set()
                kept.append((both_are_in if is_first else first_is_over).wait(60))
                kept.append(coordinator.release_sub_module is not release)
            return x.square()

        out = cached_forward(tower, (torch.ones(2, 3, requires_grad=True),), 1)
        kept.append(is_first or first_is_in.wait(60))
        out.sum().backward()
        if is_first:
            first_is_over.set()

    threads = [threading.Thread(target=train, args=(is_first,)) for is_first in (True, False)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert kept == [True] * 6
    assert coordinator.release_sub_module is release
