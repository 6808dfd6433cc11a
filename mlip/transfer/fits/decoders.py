"""From an encoder's levels to a map of logits: a U-Net decoder, and upsampling for a ViT."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from mlip.transfer.fits.encoder import Encoder

UNET_FINEST, UNET_COARSEST = 16, 256  # published decoder: 256, 128, 64, 32, 16 channels
PUP_CHANNELS = (512, 256, 128, 64)  # SETR-PUP as MGCA's ViT segmenter has it


def convolution(channels: int, out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()
    )


class UNetDecoder(nn.Module):
    """Upsample, join the encoder's level of that resolution, two convolutions; up to the input.

    Shapes:  maps [B, C_i, h_i, w_i] fine to coarse -> [B, 1, side, side] logits
    Units:   finest: channels of the last level, 0 = as published
    Source:  Ronneberger et al. 2015 with the decoder of segmentation_models_pytorch's Unet
             (256, 128, 64, 32, 16 channels), which the published protocol uses; written anew.
    """

    def __init__(self, levels: Sequence[int], side: int, finest: int = 0) -> None:
        super().__init__()
        self.side = side
        finest = finest or UNET_FINEST
        skips = list(levels[:-1])[::-1]
        most = finest * UNET_COARSEST // UNET_FINEST
        widths = [min(most, finest * 2 ** (len(skips) - i)) for i in range(len(skips) + 1)]
        channels = levels[-1]
        blocks = []
        for i, width in enumerate(widths):
            skip = skips[i] if i < len(skips) else 0
            blocks.append(
                nn.Sequential(convolution(channels + skip, width), convolution(width, width))
            )
            channels = width
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Conv2d(channels, 1, 3, padding=1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        x = maps[-1]
        skips = list(maps[:-1])[::-1]
        for i, block in enumerate(self.blocks):
            if i < len(skips):
                skip = skips[i]
                x = F.interpolate(x, size=skip.shape[2:], mode="nearest")
                x = torch.cat([x, skip], dim=1)
            else:
                x = F.interpolate(x, size=(self.side, self.side), mode="nearest")
            x = block(x)
        return self.head(x)


class UpsamplingDecoder(nn.Module):
    """Convolution and doubling, until the input's resolution is reached: for a ViT's one grid.

    Shapes:  maps [[B, C, h, w]] -> [B, 1, side, side] logits
    Source:  SETR-PUP (Zheng et al. 2021, section 3.2), channels as MGCA's ViT segmenter.
    """

    def __init__(self, levels: Sequence[int], side: int, finest: int = 0) -> None:
        super().__init__()
        self.side = side
        widths = PUP_CHANNELS if not finest else tuple(finest * 2**i for i in (3, 2, 1, 0))
        channels = levels[-1]
        self.blocks = nn.ModuleList()
        for width in widths:
            self.blocks.append(convolution(channels, width))
            channels = width
        self.head = nn.Conv2d(channels, 1, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        x = maps[-1]
        for i, block in enumerate(self.blocks):
            x = block(x)
            is_last = i + 1 == len(self.blocks)
            size = (self.side, self.side) if is_last else (2 * x.shape[2], 2 * x.shape[3])
            x = F.interpolate(x, size=size, mode="bilinear", align_corners=False)
        return self.head(x)


def make_decoder(encoder: Encoder, side: int, finest: int) -> nn.Module:
    """The U-Net decoder where there are levels to join, else the upsampling one."""
    kind = UNetDecoder if len(encoder.level_channels) > 1 else UpsamplingDecoder
    return kind(encoder.level_channels, side, finest)
