"""Micro-batches through a tower inside one autograd graph, so that every loss sees the whole batch.

Plain gradient accumulation computes a contrastive loss per micro-batch and thereby loses the
negatives of the others. Here only the towers run in micro-batches: their activations are dropped
after the forward pass and made again, with the same random numbers, when the backward pass of the
whole loss arrives. There is one backward pass, so AccumulateGrad fires once per parameter and
DeepSpeed's reduction hooks see nothing unusual at any ZeRO stage.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from mlip import distributed

_recompute_context: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext


def set_recompute_context(context: Callable[[], AbstractContextManager[Any]]) -> None:
    """What surrounds every recomputation: the engine's word on parameters it keeps in parts."""
    global _recompute_context
    _recompute_context = context


class Cost:
    """What the cache costs: seconds of recomputation, and how many passes they were."""

    def __init__(self) -> None:
        self.seconds, self.passes, self.is_measuring = 0.0, 0, False

    def start(self) -> None:
        self.seconds, self.passes, self.is_measuring = 0.0, 0, True

    def stop(self) -> tuple[float, int]:
        self.is_measuring = False
        return self.seconds, self.passes


cost = Cost()


@contextlib.contextmanager
def _recomputing() -> Iterator[None]:
    """Around one recomputation; a GPU is waited for only while the cost is being measured."""
    with _recompute_context():
        if not cost.is_measuring:
            yield
            return
        distributed.synchronise()
        begin = time.perf_counter()
        yield
        distributed.synchronise()
        cost.seconds += time.perf_counter() - begin
        cost.passes += 1


def num_micro_batches(rows: int, micro_size: int) -> int:
    """How many passes ``cached_forward`` makes over this many rows; 0 or less = one pass."""
    return max(1, -(-rows // micro_size)) if micro_size > 0 else 1


def equal_passes(rows: int, micro_size: int, device: torch.device) -> int:
    """``num_micro_batches`` of the rank with most rows; a collective call where there is a cache.

    ZeRO-3 gathers parameters in every pass: ranks that made different numbers of passes would wait
    for each other for ever. On GPUs all hold equally many rows (engine.py refuses other batches),
    and nothing is exchanged or waited for.
    """
    own = num_micro_batches(rows, micro_size)
    if micro_size <= 0 or not distributed.is_distributed() or device.type != "cpu":
        return own
    return distributed.max_of_numbers([own])[0]


def cached_forward(
    function: Callable[..., tuple[Tensor, ...]],
    tensors: Sequence[Tensor],
    micro_size: int,
    passes: int | None = None,
) -> tuple[Tensor, ...]:
    """``function(*tensors)``, computed ``micro_size`` rows at a time and differentiable.

    ``passes`` asks for more and therefore smaller micro-batches than ``micro_size`` needs.

    ``function`` must treat rows independently (no batch statistics) and return a tuple of tensors
    whose first dimension is its rows. Activations of one micro-batch are alive at a time; the cost
    is a second forward pass. Dropout and the like are replayed from the saved generator state.
    With one micro-batch, or without gradients, nothing is recomputed.

    Shapes:  tensors [B, ...] each -> tuple of [B, ...]
    Raises:  ValueError where the tensors' row counts differ
    Source:  the idea of Gao et al. 2021, "Scaling deep contrastive learning batch size under
             memory limited setup" (GradCache), done through recomputation instead of a surrogate
             loss, which keeps it exact for any loss; ours.
    """
    rows = {int(tensor.shape[0]) for tensor in tensors}
    if len(rows) != 1:
        raise ValueError(f"expected tensors with equal numbers of rows, got {sorted(rows)}")
    own = rows.pop()
    count = num_micro_batches(own, micro_size)
    wanted = min(passes or count, own)
    if max(count, wanted) == 1:
        return function(*tensors)
    cut = [t.tensor_split(wanted) if wanted > count else t.split(micro_size) for t in tensors]
    pieces = zip(*cut, strict=True)
    if not torch.is_grad_enabled():
        outputs = [function(*piece) for piece in pieces]
    else:
        # Recomputation runs to its end, so that every forward hook finds its counterpart.
        with set_checkpoint_early_stop(False):
            outputs = [
                checkpoint(
                    function,
                    *piece,
                    use_reentrant=False,
                    preserve_rng_state=True,
                    context_fn=lambda: (contextlib.nullcontext(), _recomputing()),
                )
                for piece in pieces
            ]
    return tuple(torch.cat(columns) for columns in zip(*outputs, strict=True))
