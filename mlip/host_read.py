"""Numbers of a step on their way to the host, so that reading them waits for nothing behind them.

`tensor.tolist()` after the optimiser was started waits for the optimiser, and the GPU then idles
until the next step's first kernel arrives.
"""

from __future__ import annotations

import torch
from torch import Tensor


class HostRead:
    """A copy of `values` that is asked for now and read later.

    Shapes:  values [n], of a tensor that nobody overwrites
    """

    def __init__(self, values: Tensor) -> None:
        self._host = values
        self._copied: torch.cuda.Event | None = None
        if values.device.type == "cuda":
            # page-locked: a copy to ordinary memory would wait for the device here
            self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._host.copy_(values, non_blocking=True)
            self._copied = torch.cuda.Event()
            # of the values' GPU, which need not be this thread's current one
            self._copied.record(torch.cuda.current_stream(values.device))

    @property
    def is_there(self) -> bool:
        """Whether the copy is made; asks, and waits for nothing."""
        return self._copied is None or self._copied.query()

    def numbers(self) -> list[float]:
        """The values; waits for the copy alone."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._host.tolist()
