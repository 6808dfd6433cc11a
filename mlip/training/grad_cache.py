"""Micro-batches through a tower inside one autograd graph, so that every loss sees the whole batch.

Plain gradient accumulation computes a contrastive loss per micro-batch and thereby loses the
negatives of the others. Here only the towers run in micro-batches: their activations are dropped
after the forward pass and made again, with the same random numbers, when the backward pass of the
whole loss arrives. There is one backward pass, so AccumulateGrad fires once per parameter and
what DistributedDataParallel, fully_shard and DeepSpeed hang on it sees nothing unusual.

For training code of one's own (docs/losses.md), so it imports with torch alone.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, overload
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from mlip import distributed

# where DeepSpeed, once something has imported it, decides when ZeRO-3 lets go of parameters
_ZERO_3 = "deepspeed.runtime.zero.partitioned_param_coordinator"


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


def _parameters_kept() -> AbstractContextManager[Any]:
    """ZeRO-3 during a recomputation: its forward hooks must not release the parameters.

    The backward pass that asked for the recomputation has gathered its module's already and goes on
    with them right after; the module's own backward hook releases them.
    """
    if _ZERO_3 not in sys.modules:
        return contextlib.nullcontext()
    coordinator = sys.modules[_ZERO_3].PartitionedParameterCoordinator
    return mock.patch.object(coordinator, "release_sub_module")


@contextlib.contextmanager
def _recomputing() -> Iterator[None]:
    """Around one recomputation; a GPU is waited for only while the cost is being measured."""
    with _parameters_kept():
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


@contextlib.contextmanager
def _refusing() -> Iterator[None]:
    """What would be wrong without a word is an error while the cached function runs.

    The classes' own methods are exchanged: hooks of modules would compile a compiled tower again.
    """
    with contextlib.ExitStack() as stack:
        for kind in (_BatchNorm, nn.SyncBatchNorm):
            stack.enter_context(mock.patch.object(kind, "forward", _without_statistics(kind)))
        yield


def _without_statistics(kind: type[_BatchNorm]) -> Callable[[_BatchNorm, Tensor], Tensor]:
    plain = kind.forward

    def forward(self: _BatchNorm, rows: Tensor) -> Tensor:
        if self.training or self.running_mean is None:
            raise ValueError(
                f"expected a function that treats rows independently, got a {type(self).__name__} "
                "that takes the statistics of its rows: those of a micro-batch are not those of "
                "the batch; put it in eval mode (after every model.train()), use a group or layer "
                "norm, or pass micro_size=0"
            )
        return plain(self, rows)

    return forward


@overload
def cached_forward(
    function: Callable[..., Tensor],
    tensors: Sequence[Tensor],
    micro_size: int,
    passes: int | None = None,
) -> Tensor: ...


@overload
def cached_forward(
    function: Callable[..., tuple[Tensor, ...]],
    tensors: Sequence[Tensor],
    micro_size: int,
    passes: int | None = None,
) -> tuple[Tensor, ...]: ...


def cached_forward(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    tensors: Sequence[Tensor],
    micro_size: int,
    passes: int | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """``function(*tensors)``, computed ``micro_size`` rows at a time and differentiable.

    ``passes`` asks for more and therefore smaller micro-batches than ``micro_size`` needs.

    ``function`` must treat rows independently (no batch statistics) and return a tensor, or a tuple
    of tensors, whose first dimension is its rows. Activations of one micro-batch are alive at a
    time; the cost is a second forward pass. Dropout and the like are replayed from the saved
    generator state of the CPU and of the tensors' GPU.
    With micro_size 0, one micro-batch, or no gradients, nothing is recomputed.

    Shapes:  tensors [B, ...] each -> [B, ...], or a tuple of them
    Raises:  ValueError where the tensors' row counts differ, or where a batch norm takes the
             statistics of a micro-batch
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
        with set_checkpoint_early_stop(False), _refusing():
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
    rows_of = [made if isinstance(made, tuple) else (made,) for made in outputs]
    columns = tuple(torch.cat(column) for column in zip(*rows_of, strict=True))
    return columns if isinstance(outputs[0], tuple) else columns[0]
