"""Image towers: grids, receptive field, normalisation kinds and offline loading."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import ResNetConfig, ResNetModel, ViTConfig, ViTModel

from mlip.encoders.normalisation import FrozenBatchNorm, SynchronisedBatchNorm
from mlip.encoders.vision import VisionEncoder
from mlip.settings.config import Vision

TINY: dict[str, Any] = {
    "embedding_size": 8,
    "hidden_sizes": [8, 16],
    "depths": [1, 1],
    "layer_type": "basic",
}
RESNET = Vision(kind="resnet", options=TINY, patch_stage=1, patch_pool=2, pool="attention")
VIT = Vision(
    kind="vit",
    options={
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    },
)


def test_resnet_gives_a_pooled_patch_grid() -> None:
    encoder = VisionEncoder(RESNET, channels=1, image_px=64)
    pooled, patches, grid = encoder(torch.randn(2, 1, 64, 64))
    assert grid == (4, 4) and patches.shape == (2, 16, 16) and pooled.shape == (2, 16)


def test_a_shortcut_of_few_channels_survives_several_threads() -> None:
    """torch 2.13: `double free or corruption` or SIGSEGV within the first passes."""
    passes = """
import torch
from mlip.settings.config import Vision
from mlip.encoders.vision import ResNetTower
torch.set_num_threads(2)
settings = Vision(kind="resnet", norm="group", patch_stage=1, options=dict(
    embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"))
tower = ResNetTower(settings, 1, offline=True)
for _ in range(8):
    pooled, patches, _ = tower(torch.randn(33, 1, 64, 64))
    (pooled.sum() + patches.sum()).backward()
"""
    env = {**os.environ, "OMP_NUM_THREADS": "2"}
    assert subprocess.run([sys.executable, "-c", passes], env=env).returncode == 0


@pytest.mark.parametrize("settings", [RESNET, VIT])
def test_the_grid_is_known_before_an_image_is_seen(settings: Vision) -> None:
    encoder = VisionEncoder(settings, channels=1, image_px=64)
    assert encoder.tower.grid(1, 64) == encoder(torch.randn(1, 1, 64, 64))[2] == (4, 4)
    assert encoder.training and encoder.tower.training


def test_vit_gives_one_patch_per_16_px_square() -> None:
    encoder = VisionEncoder(VIT, channels=3, image_px=64)
    pooled, patches, grid = encoder(torch.randn(2, 3, 64, 64))
    assert grid == (4, 4) and patches.shape == (2, 16, 16) and pooled.shape == (2, 16)


# by hand, r += (kernel - 1) * jump: 11 px behind either stem, 27 and 51 behind the stages
@pytest.mark.parametrize(
    ("patch_pool", "stem", "side_px"), [(1, "tower", 51), (2, "tower", 59), (2, "deep", 59)]
)
def test_no_pixel_outside_the_receptive_field_moves_a_patch(
    patch_pool: int, stem: Literal["tower", "deep"], side_px: int
) -> None:
    settings = dataclasses.replace(RESNET, patch_pool=patch_pool, stem=stem, norm="frozen")
    encoder = VisionEncoder(settings, channels=1, image_px=128).eval()
    touched = torch.zeros(128, 128, dtype=torch.bool)
    for seed in range(4):  # rectifiers hide some paths of any one image
        torch.manual_seed(seed)
        image = torch.randn(1, 1, 128, 128, requires_grad=True)
        _, patches, grid = encoder(image)
        middle = (grid[0] // 2) * grid[1] + grid[1] // 2
        patches[0, middle].square().sum().backward()
        assert image.grad is not None
        touched |= image.grad[0, 0] != 0
    rows = touched.any(dim=1).nonzero()
    side = int(rows.max() - rows.min()) + 1
    assert side_px - 8 <= side <= side_px


def test_position_grid_tells_equal_patches_apart() -> None:
    settings = dataclasses.replace(RESNET, position_grid=True, norm="frozen")
    encoder = VisionEncoder(settings, channels=1, image_px=128).eval()
    _, patches, _ = encoder(torch.zeros(1, 1, 128, 128))
    assert (patches[0, 27] - patches[0, 36]).abs().max() > 1e-3


def test_position_grid_follows_another_image_size() -> None:
    settings = dataclasses.replace(RESNET, position_grid=True)
    encoder = VisionEncoder(settings, channels=1, image_px=64).eval()
    _, patches, grid = encoder(torch.zeros(1, 1, 96, 96))
    assert grid == (6, 6) and patches.shape[1] == 36


@pytest.mark.parametrize(
    ("norm", "cls"),
    [
        ("batch", SynchronisedBatchNorm),
        ("frozen", FrozenBatchNorm),
        ("group", torch.nn.GroupNorm),
    ],
)
def test_every_batch_norm_is_replaced(norm: Any, cls: type) -> None:
    encoder = VisionEncoder(dataclasses.replace(RESNET, norm=norm), channels=1, image_px=64)
    kinds = {type(m) for m in encoder.tower.modules() if "Norm" in type(m).__name__}
    assert kinds == {cls}


def test_frozen_norm_does_not_depend_on_the_batch() -> None:
    encoder = VisionEncoder(dataclasses.replace(RESNET, norm="frozen"), channels=1, image_px=64)
    image = torch.randn(3, 1, 64, 64)
    alone, together = encoder(image[:1])[0], encoder(image)[0][:1]
    torch.testing.assert_close(alone, together, rtol=1e-5, atol=1e-5)


def test_weights_come_from_a_local_directory(tmp_path: Path) -> None:
    torch.manual_seed(3)
    saved = ResNetModel(ResNetConfig(num_channels=1, **TINY))
    saved.save_pretrained(tmp_path)
    settings = dataclasses.replace(RESNET, source=str(tmp_path), options={})
    encoder: Any = VisionEncoder(settings, channels=1, image_px=64)
    expected = saved.embedder.embedder.convolution.weight
    assert torch.equal(encoder.tower.backbone.embedder.embedder.convolution.weight, expected)


@pytest.mark.parametrize("image_px", [32, 80, 96])
def test_positions_of_a_pretrained_vit_are_resampled_once(tmp_path: Path, image_px: int) -> None:
    torch.manual_seed(3)
    saved = ViTModel(ViTConfig(image_size=80, **VIT.options), add_pooling_layer=False).eval()
    saved.save_pretrained(tmp_path)
    settings = dataclasses.replace(VIT, source=str(tmp_path), options={})
    encoder = VisionEncoder(settings, channels=3, image_px=image_px).eval()
    image = torch.randn(2, 3, image_px, image_px)
    # oracle: transformers' own resampling at every call
    expected = saved(image, interpolate_pos_encoding=True).last_hidden_state[:, 1:]
    operations = []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            operations.append(function.name())
            return function(*args, **(kwargs or {}))

    with Seen():
        _, patches, grid = encoder(image)
    assert grid == (image_px // 16, image_px // 16)
    torch.testing.assert_close(patches, expected)
    assert "aten::convolution" in operations
    assert [name for name in operations if "upsample" in name] == []


def test_a_missing_source_is_named_and_nothing_is_downloaded() -> None:
    settings = dataclasses.replace(RESNET, source="no-such/model")
    with pytest.raises(ValueError, match="model.vision.source=no-such/model"):
        VisionEncoder(settings, channels=1, image_px=64)


def test_wrong_channels_are_refused(tmp_path: Path) -> None:
    ResNetModel(ResNetConfig(num_channels=1, **TINY)).save_pretrained(tmp_path)
    settings = dataclasses.replace(RESNET, source=str(tmp_path), options={})
    with pytest.raises(ValueError, match="data.channels"):
        VisionEncoder(settings, channels=3, image_px=64)


@pytest.mark.parametrize("settings", [VIT, dataclasses.replace(RESNET, source="folder")])
def test_a_deep_stem_that_cannot_be_is_refused(settings: Vision) -> None:
    with pytest.raises(ValueError, match="model.vision.stem=deep"):
        VisionEncoder(dataclasses.replace(settings, stem="deep"), channels=3, image_px=64)


def test_a_patch_stage_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="patch_stage"):
        VisionEncoder(dataclasses.replace(RESNET, patch_stage=2), channels=1, image_px=64)


@pytest.mark.parametrize("depths", [[1], [1, 1, 1]])
def test_a_stage_without_its_depth_or_its_width_is_refused(depths: list[int]) -> None:
    # torch said that matrices of two shapes cannot be multiplied
    settings = dataclasses.replace(RESNET, options={**RESNET.options, "depths": depths})
    with pytest.raises(ValueError, match=r"model.vision.options: hidden_sizes=.* and depths=\[1"):
        VisionEncoder(settings, channels=1, image_px=64)


def test_a_patch_of_two_sides_is_refused(tmp_path: Path) -> None:
    """transformers builds one, and its folder may say so: int() of a list was the error."""
    options = {**VIT.options, "patch_size": [16, 16]}
    refused = pytest.raises(ValueError, match=r"patch_size=\[16, 16\]: expected one number")
    with refused:
        VisionEncoder(dataclasses.replace(VIT, options=options), channels=1, image_px=64)
    ViTModel(ViTConfig(**options, image_size=32, num_channels=1)).save_pretrained(tmp_path)
    with refused:
        VisionEncoder(
            dataclasses.replace(VIT, source=str(tmp_path), options={}), channels=1, image_px=64
        )


def test_patches_that_do_not_tile_the_image_are_refused() -> None:
    # 24-px patches of 64 px saw 48 x 48 px; a grid of 8 x 8 pooled by 5 lost three rows
    vit = dataclasses.replace(VIT, options={**VIT.options, "patch_size": 24})
    with pytest.raises(ValueError, match="data.crop_px=64: expected a multiple .* 24"):
        VisionEncoder(vit, channels=1, image_px=64)
    for pool in (5, 9):
        with pytest.raises(ValueError, match=f"patch_pool={pool}: expected a divisor .* 8 x 8"):
            VisionEncoder(dataclasses.replace(RESNET, patch_pool=pool), channels=1, image_px=64)
