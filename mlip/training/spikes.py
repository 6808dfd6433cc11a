"""Loss spikes: flagged, and told apart by running the step again on the same batch and numbers.

Equal the second time: the batch or the weights are the cause. Different: the machine computed
wrongly once, and the second result is the one that counts. Off unless train.spike_factor is set;
where it is on, the host waits for the loss before each backward pass.
"""

from __future__ import annotations

import statistics
from collections import deque

_WINDOW, _LEAST = 50, 8
_EQUAL = 1e-3  # relative; kernels with atomics differ by less, a flipped bit by more
DATA, HARDWARE = "batch or weights", "hardware"


class SpikeWatch:
    """A loss is a spike where it is `factor` times the median of the last 50 that were none."""

    def __init__(self, factor: float) -> None:
        self.factor = factor
        self._recent: deque[float] = deque(maxlen=_WINDOW)

    def limit(self) -> float:
        """Infinite until eight losses are known."""
        if len(self._recent) < _LEAST:
            return float("inf")
        return self.factor * statistics.median(self._recent)

    def note(self, total: float) -> None:
        if total <= self.limit():
            self._recent.append(total)


def cause(first: float, second: float) -> str:
    """What a spike of `first` is, given the same step's loss computed again."""
    return DATA if abs(first - second) <= _EQUAL * abs(first) else HARDWARE
