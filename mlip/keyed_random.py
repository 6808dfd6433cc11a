"""Random numbers as a pure function of (seed, stream, step, global index, position).

Nothing here has state, so a draw does not depend on the world size, on the order of calls, on the
device, or on how often a run was interrupted. Not for cryptography.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

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


def _signed(value: int) -> int:
    """The two's-complement int64 of an unsigned 64-bit constant."""
    return value - (1 << 64) if value >= 1 << 63 else value


# Constants of splitmix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number
# generators", OOPSLA): the golden-ratio increment and the two mixing multipliers.
_GAMMA = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)
_ALL = (1 << 64) - 1


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64 (torch's >> copies the sign)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def _mix_word(x: int) -> int:
    """_mix on one Python integer in [0, 2^64)."""
    x = ((x ^ (x >> 30)) * (_MIX_1 & _ALL)) & _ALL
    x = ((x ^ (x >> 27)) * (_MIX_2 & _ALL)) & _ALL
    return x ^ (x >> 31)


def keyed_uniform(seed: int, stream: str, step: int, index: Tensor, width: int = 1) -> Tensor:
    """Uniform numbers in (0, 1), keyed by sample.

    Shapes:  index [B] int64 -> [B, width] float64 on index.device
    Source:  splitmix64 over the key's words; ours.
    """
    word = seed & _ALL
    for part in (STREAMS[stream], step):
        word = _mix_word((word + (part + 1) * _GAMMA) & _ALL)
    key = _mix((index + 1) * _GAMMA + _signed(word))
    lane = torch.arange(1, width + 1, dtype=torch.int64, device=index.device)
    bits = _mix(key[:, None] + lane[None, :] * _GAMMA)
    # 53 bits plus one half: never 0 and never 1, so logarithms and quantiles stay finite
    return (_shift_right(bits, 11).double() + 0.5) * 2.0**-53


def keyed_normal(seed: int, stream: str, step: int, index: Tensor, width: int) -> Tensor:
    """Standard normal numbers [B, width] float32, keyed by sample (Box-Muller)."""
    pairs = (width + 1) // 2
    u = keyed_uniform(seed, stream, step, index, 2 * pairs)
    radius = torch.sqrt(-2.0 * torch.log(u[:, :pairs]))
    angle = 2.0 * math.pi * u[:, pairs:]
    normal = torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)], dim=1)
    return normal[:, :width].float()
