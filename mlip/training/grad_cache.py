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
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, overload
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from mlip.ranks import distributed

# where DeepSpeed, once something has imported it, decides when ZeRO-3 lets go of parameters; in a
# version that has it elsewhere the backward pass fails by its sizes ("size of tensor a (0)")
_ZERO_3 = "deepspeed.runtime.zero.partitioned_param_coordinator"
_lock = threading.Lock()
_recomputing = 0  # threads that are at it
_exchanged = contextlib.ExitStack()  # of DeepSpeed's, meanwhile


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
def _parameters_kept() -> Iterator[None]:
    """ZeRO-3 during a recomputation: its forward hooks must not release the parameters.

    The backward pass that asked for the recomputation has gathered its module's already and goes on
    with them right after; the module's own backward hook releases them. What releases them is
    exchanged for the whole process: by the first of several threads that recompute at once, and put
    back by the last.
    """
    global _recomputing
    with _lock:
        if _recomputing == 0 and _ZERO_3 in sys.modules:
            coordinator = sys.modules[_ZERO_3].PartitionedParameterCoordinator
            kept = mock.patch.object(coordinator, "release_sub_module", lambda *_, **__: None)
            _exchanged.enter_context(kept)
        _recomputing += 1
    try:
        yield
    finally:
        with _lock:
            _recomputing -= 1
            if _recomputing == 0:
                _exchanged.close()


class _Recomputing:
    """Around recomputations; a GPU is waited for only while the cost is being measured.

    Entered once by each backward pass over the graph, of which retain_graph allows several.
    """

    def __enter__(self) -> None:
        self.kept = _parameters_kept()
        self.kept.__enter__()
        self.is_measuring = cost.is_measuring
        if self.is_measuring:
            distributed.synchronise()
            self.begin = time.perf_counter()

    def __exit__(self, kind: type[BaseException] | None, *raised: Any) -> None:
        self.kept.__exit__(kind, *raised)
        if self.is_measuring and kind is None:
            distributed.synchronise()
            cost.seconds += time.perf_counter() - self.begin
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


def _require_rows(made: tuple[Any, ...], rows: int) -> None:
    for one in made:
        shape = list(one.shape) if isinstance(one, Tensor) else type(one).__name__
        if not isinstance(shape, list) or shape[:1] != [rows]:
            raise ValueError(
                "expected a function that returns a tensor, or a tuple of tensors, with a row for "
                f"each of the {rows} rows of a micro-batch in front, got {shape}"
            )


def _require_no_statistics(tower: nn.Module) -> None:
    for module in tower.modules():
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            raise _of_statistics(type(module).__name__)


def _require_rows_apart(made: tuple[Tensor, ...], given: Sequence[Tensor]) -> None:
    """Refuse a batch norm in training mode, by what autograd has noted between the two.

    Nothing is patched or hooked: a patch would reach into other threads, and either would compile a
    compiled tower again. A compiled batch norm leaves no such note, and none is left where no
    gradient goes: ``_require_no_statistics`` finds those of a module.
    """
    found = {tensor.grad_fn for tensor in given}
    left = [tensor.grad_fn for tensor in made]
    while left:
        node = left.pop()
        if node is None or node in found:
            continue
        found.add(node)
        if "BatchNorm" in node.name() and getattr(node, "_saved_training", True):
            # an instance norm is noted as a batch norm of one row
            if node._input_metadata[0].shape[0] != 1:  # type: ignore[attr-defined]
                raise _of_statistics("batch norm")
        left += [following for following, _ in node.next_functions]


def _of_statistics(name: str) -> ValueError:
    return ValueError(
        f"expected a function that treats rows independently, got a {name} that takes the "
        "statistics of its rows: those of a micro-batch are not those of the batch; put it in eval "
        "mode (after every model.train()), use a group or layer norm, or pass micro_size=0"
    )


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
    generator state of the CPU and of the tensors' GPU; what a forward pass changes in buffers
    (spectral norm in training mode, counters) is changed twice, so it must not decide the output.
    With micro_size 0, one micro-batch, or no gradients, nothing is recomputed.

    Shapes:  tensors [B, ...] each -> [B, ...], or a tuple of them
    Raises:  ValueError where the tensors' row counts differ, where the function returns anything
             but such tensors, or where a batch norm takes the statistics of a micro-batch: of a
             module any, of another function what is not compiled, has a gradient and gets more
             than one row
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
    pieces = list(zip(*cut, strict=True))
    outputs: list[tuple[Tensor, ...]] = []
    if torch.is_grad_enabled() and isinstance(function, nn.Module):
        _require_no_statistics(function)
    # Recomputation runs to its end, so that every forward hook finds its counterpart.
    with set_checkpoint_early_stop(False):
        for piece in pieces:
            if torch.is_grad_enabled():
                made = checkpoint(
                    function,
                    *piece,
                    use_reentrant=False,
                    preserve_rng_state=True,
                    context_fn=lambda: (contextlib.nullcontext(), _Recomputing()),
                )
            else:
                made = function(*piece)
            several = made if isinstance(made, tuple) else (made,)
            _require_rows(several, len(piece[0]))
            if not outputs:
                _require_rows_apart(several, piece)
            outputs.append(several)
    columns = tuple(torch.cat(column) for column in zip(*outputs, strict=True))
    return columns if isinstance(made, tuple) else columns[0]
