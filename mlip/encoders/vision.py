"""Image towers: a radiograph -> one global vector and a grid of patch vectors."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from transformers import ResNetConfig, ResNetModel, ViTConfig, ViTModel

from mlip.encoders.attention import require_usable, round_once
from mlip.encoders.checkpointing import checkpoint_layers
from mlip.encoders.normalisation import recomputing, set_normalisation
from mlip.encoders.options import build_tower, tower_config
from mlip.encoders.pool import AttentionPool
from mlip.encoders.pretrained_tower import load_tower
from mlip.encoders.residual import round_residual
from mlip.encoders.stem import DeepStem
from mlip.settings.config import Vision


class PointwiseBlock(nn.Module):
    """A residual two-layer perceptron on each patch alone: adds depth, no receptive field."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.expand = nn.Linear(channels, 2 * channels)
        self.contract = nn.Linear(2 * channels, channels)

    def forward(self, patches: Tensor) -> Tensor:
        return patches + self.contract(F.gelu(self.expand(self.norm(patches))))


class Neck(nn.Module):
    """Position grid and pointwise blocks between a tower's patches and the heads.

    Knowing where a patch lies lets a small receptive field still tell left from right.
    Source:  ours.
    """

    def __init__(self, channels: int, grid: tuple[int, int], settings: Vision) -> None:
        super().__init__()
        self.grid = grid
        self.position = (
            nn.Parameter(torch.randn(1, channels, *grid) * 0.02) if settings.position_grid else None
        )
        self.blocks = nn.Sequential(
            *[PointwiseBlock(channels) for _ in range(settings.neck_blocks)]
        )

    def forward(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        if self.position is not None:
            position: Tensor = self.position
            if grid != self.grid:
                position = F.interpolate(position, size=grid, mode="bicubic", align_corners=False)
            patches = patches + position.flatten(2).transpose(1, 2)
        return self.blocks(patches)


class ResNetTower(nn.Module):
    """transformers' ResNet; patches from one stage, global vector from the last or the patches."""

    def __init__(self, settings: Vision, channels: int, *, offline: bool) -> None:
        super().__init__()
        if settings.source is None:
            config: Any = tower_config(
                ResNetConfig, "model.vision.options", settings.options, num_channels=channels
            )
            self.backbone = build_tower(lambda: ResNetModel(config), "model.vision.options")
            if settings.stem == "deep":
                tower: Any = self.backbone
                tower.embedder = DeepStem(channels, config.embedding_size)
        else:
            self.backbone = load_tower(
                ResNetModel, "model.vision.source", settings.source, offline=offline
            )
            config = self.backbone.config
        _check_channels(config.num_channels, channels, settings.source)
        stages = len(config.hidden_sizes)
        if stages != len(config.depths):  # transformers builds as many stages as the shorter has
            raise ValueError(
                f"model.vision.options: hidden_sizes={config.hidden_sizes} and depths="
                f"{config.depths}: expected a number of each for every stage"
            )
        if not 0 <= settings.patch_stage < stages:
            raise ValueError(
                f"model.vision.patch_stage: expected 0 to {stages - 1} for a ResNet of {stages} "
                f"stages, got {settings.patch_stage}"
            )
        set_normalisation(self.backbone, settings.norm)
        if settings.pool == "attention":
            # later stages would be computed for nothing
            del self.backbone.encoder.stages[settings.patch_stage + 1 :]
        # convolutions of small tensors run up to twice as fast this way, most so in bfloat16
        for weight in self.backbone.parameters():
            if weight.ndim == 4:
                weight.data = weight.data.contiguous(memory_format=torch.channels_last)
        for part in self.backbone.modules():
            if isinstance(part, nn.Conv2d) and part.in_channels < 16 and part.kernel_size == (1, 1):
                part.register_forward_pre_hook(_channels_first)
        self.settings = settings
        self.patch_dim = config.hidden_sizes[settings.patch_stage]
        self.pools_patches = settings.pool == "attention"
        self.global_dim = self.patch_dim if self.pools_patches else config.hidden_sizes[-1]

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, tuple[int, int]]:
        x = image.contiguous(memory_format=torch.channels_last)
        x = self.backbone.embedder(x)
        grid_BCHW = x
        for index, stage in enumerate(self.backbone.encoder.stages):
            x = _maybe_checkpoint(stage, x, self.settings.checkpointing and self.training)
            if index == self.settings.patch_stage:
                grid_BCHW = x
        pool = self.settings.patch_pool
        if pool > 1:
            height, width = grid_BCHW.shape[2:]
            if height % pool or width % pool:
                raise ValueError(
                    f"model.vision.patch_pool={pool}: expected a divisor of the grid of patches, "
                    f"which is {height} x {width} at stage {self.settings.patch_stage} of an image "
                    f"of {image.shape[2]} x {image.shape[3]} px; the rest would not be seen"
                )
            grid_BCHW = F.avg_pool2d(grid_BCHW, pool)
        grid = (grid_BCHW.shape[2], grid_BCHW.shape[3])
        return x.mean(dim=(2, 3)), grid_BCHW.flatten(2).transpose(1, 2), grid

    @torch.no_grad()
    def grid(self, channels: int, image_px: int) -> tuple[int, int]:
        """Rows and columns of the patches of an image that is `image_px` wide and high."""
        was_training = self.training
        self.eval()
        _, _, grid = self(torch.zeros(1, channels, image_px, image_px))
        self.train(was_training)
        return grid


def _channels_first(part: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    """torch 2.13 on a CPU writes behind the gradient of a 1 x 1 shortcut of 8 channels, stride 2,
    where images are channels-last, odd in number and several threads share them: a crash without a
    word, if one is lucky."""
    return (args[0].contiguous(),)


class ViTTower(nn.Module):
    """transformers' ViT; patches from the last layer, global vector from [CLS]."""

    def __init__(
        self,
        settings: Vision,
        channels: int,
        image_px: int,
        attention: str,
        *,
        residual: str,
        offline: bool,
    ) -> None:
        super().__init__()
        name = f"mlip_{attention}"
        if settings.source is None:
            options: dict[str, Any] = {"image_size": image_px, **settings.options}
            config: Any = tower_config(
                ViTConfig, "model.vision.options", options, num_channels=channels
            )
            config._attn_implementation = name
            self.backbone = build_tower(
                lambda: ViTModel(config, add_pooling_layer=False), "model.vision.options"
            )
        else:
            self.backbone = load_tower(
                ViTModel,
                "model.vision.source",
                settings.source,
                offline=offline,
                add_pooling_layer=False,
                attn_implementation=name,
            )
            config = self.backbone.config
        if not isinstance(config.patch_size, int):
            raise ValueError(
                f"model.vision: patch_size={config.patch_size}: expected one number, the side of a "
                "square patch"
            )
        if settings.source is not None:
            _resample_positions(self.backbone, image_px)
        _check_channels(config.num_channels, channels, settings.source)
        if settings.checkpointing:
            checkpoint_layers(self.backbone)
        layers: Any = self.backbone.layers
        for layer in layers:
            round_once(layer.attention)
        if residual == "bf16":
            round_residual(self.backbone)
        self.patch_px = config.patch_size
        if image_px % self.patch_px:
            raise ValueError(
                f"data.crop_px={image_px}: expected a multiple of the ViT's patch_size, "
                f"{self.patch_px}; the rest would not be seen"
            )
        self.patch_dim = self.global_dim = int(config.hidden_size)
        self.pools_patches = settings.pool == "attention"

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, tuple[int, int]]:
        states = self.backbone(image, interpolate_pos_encoding=True).last_hidden_state
        grid = (image.shape[2] // self.patch_px, image.shape[3] // self.patch_px)
        # one split: two slices would each fill a gradient of all states, to be added
        first, patches = states.split([1, states.shape[1] - 1], dim=1)
        return first.squeeze(1), patches, grid

    def grid(self, channels: int, image_px: int) -> tuple[int, int]:
        """Rows and columns of the patches of an image that is `image_px` wide and high."""
        return (image_px // self.patch_px, image_px // self.patch_px)


@torch.no_grad()
def _resample_positions(backbone: Any, image_px: int) -> None:
    """Give a pretrained ViT one position a patch of the images that it will see.

    The model would resample them in every step, and on a GPU the gradient of that is a sum in any
    order, which torch refuses under run.deterministic.
    """
    if backbone.config.image_size == image_px:
        return
    embeddings = backbone.embeddings
    count = (image_px // backbone.config.patch_size) ** 2 + 1  # with [CLS]
    patches = torch.empty(1, count, backbone.config.hidden_size)  # only its shape is read
    positions = embeddings.interpolate_pos_encoding(patches, image_px, image_px)
    embeddings.position_embeddings = nn.Parameter(positions.clone())
    embeddings.patch_embeddings.image_size = (image_px, image_px)
    backbone.config.image_size = image_px


class VisionEncoder(nn.Module):
    """Tower and neck: image [B, C, H, W] -> (global [B, d_g], patches [B, P, d_p], grid).

    Raises:  ValueError for a source that is not there, wrong channels, an unusable attention.
    Source:  MLIP section 3 (ResNet-50 or ViT-B/16); position grid and neck are ours.
    """

    def __init__(
        self,
        settings: Vision,
        *,
        channels: int,
        image_px: int,
        attention: str = "sdpa",
        residual: str = "fp32",
        offline: bool = True,
    ) -> None:
        super().__init__()
        require_usable(attention)
        if settings.stem == "deep" and (settings.kind != "resnet" or settings.source is not None):
            raise ValueError(
                "model.vision.stem=deep: expected a ResNet from random weights, got "
                f"model.vision.kind={settings.kind}, source={settings.source}; set stem=tower"
            )
        self.tower: ResNetTower | ViTTower
        if settings.kind == "resnet":
            self.tower = ResNetTower(settings, channels, offline=offline)
        else:
            self.tower = ViTTower(
                settings, channels, image_px, attention, residual=residual, offline=offline
            )
        self.patch_dim, self.global_dim = self.tower.patch_dim, self.tower.global_dim
        grid = self.tower.grid(channels, image_px)
        self.neck = Neck(self.patch_dim, grid, settings)
        heads = settings.pool_heads
        self.pool = AttentionPool(self.patch_dim, heads) if self.tower.pools_patches else None

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, tuple[int, int]]:
        pooled, patches, grid = self.tower(image)
        patches = self.neck(patches, grid)
        if self.pool is not None:
            pooled = self.pool(patches)
        return pooled, patches, grid


def _check_channels(tower: int, data: int, source: str | None) -> None:
    if tower != data:
        raise ValueError(
            f"model.vision.source={source} takes {tower} channels, data.channels is {data}; "
            f"set data.channels={tower}"
        )


def _maybe_checkpoint(function: nn.Module, x: Tensor, is_on: bool) -> Tensor:
    if not is_on:
        return function(x)
    from torch.utils.checkpoint import checkpoint

    return checkpoint(
        function,
        x,
        use_reentrant=False,
        context_fn=lambda: (contextlib.nullcontext(), recomputing()),
    )
