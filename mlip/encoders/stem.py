"""A deep stem in the place of a ResNet's 7 x 7 convolution and pooling."""

from __future__ import annotations

import torch.nn as nn

_LAYERS = ((3, 2), (3, 1), (3, 2))  # kernel, stride


class DeepStem(nn.Sequential):
    """Three 3 x 3 convolutions instead of one of 7 x 7 and a maximum: [B, C, H, W] -> H/4, W/4.

    Lines of one pixel pass through two layers at half resolution before anything is dropped, and
    half the channels there cost half of what normalising and pooling the wide first layer cost.

    Source:  ResNet-C's stem (He et al. 2019, arXiv 1812.01187, section 4.1), with a strided last
             convolution in the place of its pooling.
    """

    def __init__(self, channels: int, embedding_size: int) -> None:
        half = max(1, embedding_size // 2)
        widths = (channels, half, half, embedding_size)
        layers: list[nn.Module] = []
        for (kernel, stride), inputs, outputs in zip(_LAYERS, widths[:-1], widths[1:], strict=True):
            layers += [
                nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False),
                nn.BatchNorm2d(outputs),
                nn.ReLU(inplace=True),
            ]
        super().__init__(*layers)
        for layer in layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
