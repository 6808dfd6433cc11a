"""splitmix64 in torch's int64, whose additions and products wrap as those of an unsigned word do.

Constants: the golden-ratio increment and the two mixing multipliers of Steele, Lea and Flood 2014,
"Fast splittable pseudorandom number generators" (OOPSLA).
"""

from __future__ import annotations

import torch
from torch import Tensor

GAMMA, MIX_1, MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
BELOW_1 = 1.0 - 2.0**-53


def signed(value: int) -> int:
    """The two's-complement int64 of an unsigned 64-bit number."""
    return value - (1 << 64) if value >= 1 << 63 else value


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64 (torch's >> copies the sign)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * signed(MIX_1)
    x = (x ^ _shift_right(x, 27)) * signed(MIX_2)
    return x ^ _shift_right(x, 31)


def uniform(word: int, index: Tensor, width: int) -> Tensor:
    """What op.splitmix_uniform says, in plain torch."""
    gamma = signed(GAMMA)
    key = _mix((index + 1) * gamma + signed(word))
    lane = torch.arange(1, width + 1, dtype=torch.int64, device=index.device)
    bits = _mix(key[:, None] + lane[None, :] * gamma)
    # 53 bits plus one half: never 0, and never 1, to which the largest would be rounded: logarithms
    # and quantiles stay finite, an index of n stays below n
    return ((_shift_right(bits, 11).double() + 0.5) * 2.0**-53).clamp_(max=BELOW_1)
