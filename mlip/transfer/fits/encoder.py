"""The image encoder a task builds on: where its weights come from, frozen or tuned, its levels.

Frozen means eval mode whatever mode the head is in: dropout is off and running statistics of batch
norms stay (a frozen encoder whose batch norms go on drifting is no longer the one that was named).
"""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from mlip.encoders.options import tower_shape
from mlip.encoders.vision import VisionEncoder
from mlip.settings.config import Config
from mlip.transfer.fingerprint import hash_of_weights


class Encoder(nn.Module):
    """A vision encoder as a feature extractor: `pooled` for labels, `levels` for places.

    Levels run from fine to coarse. ResNet: stem, stages, and what the neck makes of the patches;
    ViT: the patch grid alone.
    Raises:  ValueError for a side that a ViT's patches do not tile: the rest would not be seen.
    """

    def __init__(self, vision: VisionEncoder, *, is_frozen: bool, side: int, channels: int) -> None:
        super().__init__()
        self.vision = vision
        self.is_frozen = is_frozen
        self.is_resnet = hasattr(vision.tower.backbone, "embedder")
        patch_px = getattr(vision.tower, "patch_px", 1)
        if side % patch_px:
            raise ValueError(
                f"transfer.image_px={side}: expected a multiple of the ViT's patch_size, "
                f"{patch_px}; the rest would not be seen"
            )
        if is_frozen:
            self.vision.requires_grad_(False)
        self.train(False)
        with torch.no_grad():
            maps = self.levels(torch.zeros(1, channels, side, side))
        self.level_channels = tuple(m.shape[1] for m in maps)
        self.width = vision.global_dim

    def train(self, mode: bool = True) -> Encoder:
        super().train(mode)
        if self.is_frozen:
            self.vision.train(False)
        return self

    def _grad(self) -> Any:
        return torch.set_grad_enabled(torch.is_grad_enabled() and not self.is_frozen)

    def pooled(self, image: Tensor) -> Tensor:
        """The global feature before the projection head, [B, width]."""
        with self._grad():
            return self.vision(image)[0].float()

    def levels(self, image: Tensor) -> list[Tensor]:
        """Feature maps [B, C, h, w], fine to coarse."""
        with self._grad():
            return self._resnet(image) if self.is_resnet else [self._vit(image)]

    def _vit(self, image: Tensor) -> Tensor:
        _, patches, grid = self.vision(image)
        return _as_map(patches, grid)

    def _resnet(self, image: Tensor) -> list[Tensor]:
        tower: Any = self.vision.tower
        x = image.contiguous(memory_format=torch.channels_last)
        maps, x = _stem(tower.backbone.embedder, x)
        settings = tower.settings
        neck = self.vision.neck
        has_neck = neck.position is not None or len(neck.blocks) > 0
        enriched = None
        for index, stage in enumerate(tower.backbone.encoder.stages):
            x = stage(x)
            maps.append(x)
            if index == settings.patch_stage and (has_neck or settings.patch_pool > 1):
                patches = F.avg_pool2d(x, settings.patch_pool) if settings.patch_pool > 1 else x
                grid = (patches.shape[2], patches.shape[3])
                enriched = _as_map(neck(patches.flatten(2).transpose(1, 2), grid), grid)
        if enriched is not None:
            same = next(
                (i for i in range(1, len(maps)) if maps[i].shape[2] == enriched.shape[2]), None
            )
            if same is None:
                maps.append(enriched)
                maps.sort(key=lambda m: -m.shape[2])
            else:
                maps[same] = torch.cat([maps[same], enriched], dim=1)
        return maps


def _stem(stem: Any, image: Tensor) -> tuple[list[Tensor], Tensor]:
    """([the level at half resolution], the stem's output), whichever stem the tower has."""
    layers = list(stem) if isinstance(stem, nn.Sequential) else [stem.embedder, stem.pooler]
    maps, x = [], image
    for layer in layers:
        before, x = x, layer(x)
        if x.shape[2] < before.shape[2] and before is not image:
            maps.append(before)
    return maps, x


def _as_map(patches: Tensor, grid: tuple[int, int]) -> Tensor:
    return patches.transpose(1, 2).reshape(len(patches), -1, *grid)


@dataclass(frozen=True)
class Start:
    """An encoder's weights before a task."""

    vision: VisionEncoder
    weights_hash: str

    def encoder(self, *, is_frozen: bool, side: int, channels: int) -> Encoder:
        """A fresh copy: a tuned fit must not reach the next one."""
        return Encoder(
            copy.deepcopy(self.vision), is_frozen=is_frozen, side=side, channels=channels
        )


def open_start(config: Config, vision: VisionEncoder | None, seed: int) -> Start:
    """The encoder of transfer.start.

    vision  the checkpoint's encoder, None where none was opened; random then takes its shape from
            model.vision, otherwise from the checkpoint, so that both differ in weights alone
    Raises:  ValueError for a checkpoint that was not given, an imagenet without
             model.vision.source, a random with it.
    """
    start = config.transfer.start
    if start == "checkpoint":
        if vision is None:
            raise ValueError("transfer.start=checkpoint: no checkpoint was given (checkpoint=DIR)")
        return Start(vision, hash_of_weights(vision))
    settings = config.model.vision
    if start == "imagenet" and settings.source is None:
        raise ValueError(
            "transfer.start=imagenet: set model.vision.source to a local directory of ImageNet "
            "weights in transformers' format (config.json, model.safetensors) and model.vision.kind"
        )
    if start == "random":
        if vision is not None:
            options = tower_shape(vision.tower.backbone.config)
            settings = dataclasses.replace(settings, source=None, options=options)
        elif settings.source is not None:
            raise ValueError(
                "transfer.start=random with model.vision.source set: a source holds weights; "
                "describe the tower by model.vision.options, or give checkpoint=DIR for its shape"
            )
    state = torch.random.get_rng_state()
    try:
        torch.manual_seed(seed)
        made = VisionEncoder(
            settings,
            channels=config.data.channels,
            image_px=config.data.crop_px,
            attention=config.model.attention,
            residual=config.train.residual,
            offline=config.run.offline,
        ).eval()
    finally:
        torch.random.set_rng_state(state)
    return Start(made, hash_of_weights(made))
