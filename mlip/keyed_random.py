"""Random numbers as a pure function of (seed, stream, step, global index, position).

Nothing here has state, so a draw does not depend on the world size, on the order of calls, on the
device, or on how often a run was interrupted. Not for cryptography.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mlip.kernels.keyed_uniform import splitmix_uniform
from mlip.kernels.keyed_uniform.reference import GAMMA, MIX_1, MIX_2

# Streams keep draws of different purpose apart under one seed.
STREAMS = {
    "divergence_image": 1,
    "divergence_text": 2,
    "match_image": 3,
    "match_text": 4,
    "swap_choice": 5,
    "swap_partner": 6,
    "augment": 7,
    "sentences": 8,
    "replacement": 9,
    "order": 10,
    "divergence_image_dropout": 11,
    "divergence_text_dropout": 12,
}


_ALL = (1 << 64) - 1


def _mix_word(x: int) -> int:
    """splitmix64's mixing of one Python integer in [0, 2^64)."""
    x = ((x ^ (x >> 30)) * MIX_1) & _ALL
    x = ((x ^ (x >> 27)) * MIX_2) & _ALL
    return x ^ (x >> 31)


def keyed_uniform(seed: int, stream: str, step: int, index: Tensor, width: int = 1) -> Tensor:
    """Uniform numbers in (0, 1), keyed by sample.

    Shapes:  index [B] int64 -> [B, width] float64 on index.device
    Source:  splitmix64 over the key's words; ours.
    """
    word = seed & _ALL
    for part in (STREAMS[stream], step):
        word = _mix_word((word + (part + 1) * GAMMA) & _ALL)
    return splitmix_uniform(word, index, width)


def keyed_normal(seed: int, stream: str, step: int, index: Tensor, width: int) -> Tensor:
    """Standard normal numbers [B, width] float32, keyed by sample (Box-Muller in float64, of which
    devices may round the last bit another way)."""
    pairs = (width + 1) // 2
    u = keyed_uniform(seed, stream, step, index, 2 * pairs)
    radius = torch.sqrt(-2.0 * torch.log(u[:, :pairs]))
    angle = 2.0 * math.pi * u[:, pairs:]
    normal = torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)], dim=1)
    return normal[:, :width].float()
