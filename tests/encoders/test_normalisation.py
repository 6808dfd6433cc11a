"""Batch statistics over ranks: two ranks give what one process gives on the whole batch."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from mlip.encoders.heads import ProjectionHead
from mlip.encoders.normalisation import SynchronisedBatchNorm, set_normalisation
from mlip.encoders.vision import VisionEncoder
from mlip.settings.config import Heads, load
from tests.spawned_ranks import start_ranks


def _make() -> tuple[SynchronisedBatchNorm, torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    norm = SynchronisedBatchNorm(3, eps=0.2, momentum=0.3)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([0.5, 1.5, -1.0]))
        norm.bias.copy_(torch.tensor([0.1, 0.2, 0.3]))
    images = torch.randn(5, 3, 4, 4) * 2 + 1
    return norm, images, torch.randn(5, 3, 4, 4)


def _work(rank: int, folder: Path) -> None:
    norm, images, weights = _make()
    mine = slice(0, 2) if rank == 0 else slice(2, 5)  # uneven on purpose
    x = images[mine].clone().requires_grad_()
    out = norm(x)
    # every rank's loss is the global sum, so its gradient arrives once per rank
    (out * weights[mine]).sum().backward()
    result = {"out": out, "grad": x.grad, "weight": norm.weight.grad, "mean": norm.running_mean,
              "var": norm.running_var, "batches": norm.num_batches_tracked}  # fmt: skip
    torch.save({k: v.detach() for k, v in result.items() if v is not None}, folder / f"{rank}.pt")


def test_two_ranks_equal_one_process_for_output_gradient_and_statistics(tmp_path: Path) -> None:
    start_ranks(_work, tmp_path)()
    parts = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    norm, images, weights = _make()
    x = images.clone().requires_grad_()
    out = norm(x)
    (out * weights).sum().backward()
    assert x.grad is not None and norm.weight.grad is not None

    def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
        torch.testing.assert_close(actual, expected.detach(), rtol=1e-5, atol=1e-6)

    close(torch.cat([p["out"] for p in parts]), out)
    close(torch.cat([p["grad"] for p in parts]), x.grad)
    close(parts[0]["weight"] + parts[1]["weight"], norm.weight.grad)
    for part in parts:
        close(part["mean"], norm.running_mean)
        close(part["var"], norm.running_var)
        assert int(part["batches"]) == 1


@pytest.mark.parametrize("kind", ["batch", "frozen", "group"])
def test_a_norm_in_the_place_of_another_keeps_its_weights_and_statistics(kind: str) -> None:
    # oracle: the layer that was there, which a pretrained tower was trained with
    torch.manual_seed(3)
    old = nn.BatchNorm2d(24, eps=0.2, momentum=0.3)
    with torch.no_grad():
        for held in (old.weight, old.bias, old.running_mean, old.running_var):
            assert held is not None
            held.uniform_(0.5, 2.0)
    module = nn.Sequential(nn.Sequential(copy.deepcopy(old)))
    set_normalisation(module, kind)
    images = torch.randn(5, 24, 3, 3)
    if kind == "group":  # of four channels each
        expected = F.group_norm(images, 6, old.weight, old.bias)
        torch.testing.assert_close(module(images), expected)
        return
    # frozen: what the other does in evaluation, in training as well
    torch.testing.assert_close(module(images), old.train(kind == "batch")(images))
    torch.testing.assert_close(module.eval()(images), old.eval()(images))


def test_groups_are_as_many_as_fit_with_four_channels_or_more_in_each() -> None:
    # oracle: by hand; 32 are the most
    for channels, groups in ((3, 1), (10, 2), (22, 2), (64, 16), (96, 24), (2048, 32)):
        module = nn.Sequential(nn.BatchNorm2d(channels))
        set_normalisation(module, "group")
        assert module[0].num_groups == groups


def test_a_head_with_batch_norm_counts_real_rows_alone_and_makes_the_others_zero() -> None:
    # oracle: torch's BatchNorm1d over the list of real rows
    torch.manual_seed(2)
    head, norm = ProjectionHead(6, 4, Heads(hidden=8, norm="batch")), nn.BatchNorm1d(8)
    mask = torch.arange(5) < torch.tensor([5, 2, 0])[:, None]
    rows = torch.where(mask[..., None], torch.randn(3, 5, 6), torch.nan)
    vectors = torch.randn(4, 6)
    for _ in range(2):  # with the batch's statistics, then with those that the first round left
        made = head(rows, mask)
        for out, real in ((made[mask], rows[mask]), (head(vectors), vectors)):
            torch.testing.assert_close(out, head.second(F.gelu(norm(head.first(real)))))
        torch.testing.assert_close(made[~mask], head.second.bias.expand(8, 4))
        head.eval()
        norm.eval()


SETTINGS = (
    "model.vision.kind=resnet",
    "model.vision.norm=batch",
    "model.vision.options={embedding_size: 8, hidden_sizes: [8, 16], depths: [1, 1], "
    "layer_type: basic}",
    "model.vision.patch_stage=1",
)


def _trained(folder: Path, rank: int, images: torch.Tensor, checkpointing: bool) -> None:
    """Gradients and buffers after two passes of a ResNet with batch statistics."""
    config = load([], [*SETTINGS, f"model.vision.checkpointing={checkpointing}"])
    torch.manual_seed(3)
    tower = VisionEncoder(config.model.vision, channels=1, image_px=32).train()
    for _ in range(2):
        pooled, patches, _ = tower(images)
        (pooled.square().sum() + patches.sin().sum()).backward()
    held = {n: p.grad for n, p in tower.named_parameters()} | dict(tower.named_buffers())
    torch.save(held, folder / f"{rank}-{checkpointing}.pt")


def _both(rank: int, folder: Path) -> None:
    images = torch.randn(5, 1, 32, 32, generator=torch.Generator().manual_seed(4))
    mine = images if rank < 0 else images[:2] if rank == 0 else images[2:]
    for checkpointing in (False, True):
        _trained(folder, rank, mine, checkpointing)


def _require_same(folder: Path, rank: int) -> None:
    kept, again = (
        torch.load(folder / f"{rank}-{on}.pt", weights_only=True) for on in (False, True)
    )
    assert kept.keys() == again.keys() and any("running_var" in name for name in kept)
    for name, tensor in kept.items():
        assert torch.equal(tensor, again[name]), (rank, name)


def test_activation_checkpointing_counts_a_batch_once_in_running_statistics(tmp_path):
    # oracle: the same tower without; the second forward pass must move no statistic
    _both(-1, tmp_path)
    _require_same(tmp_path, -1)
    start_ranks(_both, tmp_path)()
    for rank in range(2):
        _require_same(tmp_path, rank)
