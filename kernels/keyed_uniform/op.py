"""The operator: splitmix64's uniform numbers, by torch anywhere and by one kernel on a GPU."""

from __future__ import annotations

from numbers import Integral

import torch
from torch import Tensor

from mlip.kernels._dispatch import resolve
from mlip.kernels.keyed_uniform import reference


def splitmix_uniform(word: int, index: Tensor, width: int = 1, *, impl: str = "auto") -> Tensor:
    """Uniform numbers in (0, 1), row n a pure function of `word` and index[n].

    Shapes:  index [B] int64 -> [B, width] float64 on index.device
    Units:   word 0 .. 2^64 - 1, what rows of one call share (a seed, a step)
    Errors:  none: the bits are the same on every device and by either implementation
    Raises:  ValueError for a word or an index of another kind, or where `impl` cannot run
    Source:  splitmix64 (Steele, Lea and Flood 2014) over index, then position; ours.
    """
    if not isinstance(word, Integral) or not 0 <= word < 1 << 64:
        raise ValueError(f"word: expected an integer 0 .. 2^64 - 1, got {word!r}")
    is_width = isinstance(width, Integral) and width >= 1
    if index.ndim != 1 or index.dtype != torch.int64 or not is_width:
        raise ValueError(
            f"expected index [B] int64 and width of 1 or more, got index {list(index.shape)} "
            f"{index.dtype} and width {width}"
        )
    if resolve(impl, index.device) == "torch":
        return reference.uniform(word, index, width)
    from mlip.kernels.keyed_uniform import triton_kernels

    with torch.cuda.device_of(index):  # Triton launches on the current device
        return triton_kernels.uniform(word, index, width)
