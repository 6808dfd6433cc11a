"""Batch statistics over ranks: two ranks give what one process gives on the whole batch."""

from __future__ import annotations

from pathlib import Path

import torch

from mlip.config import load
from mlip.encoders.normalisation import SynchronisedBatchNorm
from mlip.encoders.vision import VisionEncoder
from tests.spawned_ranks import start_ranks


def _make() -> tuple[SynchronisedBatchNorm, torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    norm = SynchronisedBatchNorm(3)
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
              "var": norm.running_var}  # fmt: skip
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
        close(part["mean"], norm.running_mean)  # type: ignore[arg-type]
        close(part["var"], norm.running_var)  # type: ignore[arg-type]


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
