"""Rank, world size, collectives with exact gradients, and log-once.

With process_group.py, kernels/_distributed.py and encoders/normalisation.py all that calls
torch.distributed. Every rank computes the same global loss and calls backward, so a gathered
tensor's gradient is the sum over ranks; averaging parameter gradients over ranks then gives the
gradient of the whole batch.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

logger = logging.getLogger("mlip")

_said: set[str] = set()


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def world_group() -> Any:
    """The group of all ranks for ops that take one; None where there is one process."""
    return dist.group.WORLD if is_distributed() else None


def log_once(message: str, level: int = logging.INFO) -> None:
    """Log a line the first time it comes up, on rank 0 only."""
    if is_main() and message not in _said:
        _said.add(message)
        logger.log(level, message)


def barrier() -> None:
    if is_distributed():
        dist.barrier()


def broadcast_object(value: Any) -> Any:
    """Rank 0's value on every rank."""
    if not is_distributed():
        return value
    holder = [value]
    dist.broadcast_object_list(holder, src=0)
    return holder[0]


def gather_objects(value: Any) -> list[Any]:
    """Every rank's value, in rank order, on every rank."""
    if not is_distributed():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def row_counts(rows: int, device: torch.device) -> list[int]:
    """How many rows each rank holds, in rank order.

    On a GPU every rank must hold equally many, as kernels/_distributed.py says: exchanging the
    counts there would synchronise.
    """
    if not is_distributed():
        return [rows]
    if device.type != "cpu":
        return [rows] * world_size()
    counts = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(world_size())]
    dist.all_gather(counts, torch.tensor([rows], dtype=torch.int64, device=device))
    return [int(count) for count in counts]


def _gather(x: Tensor, counts: list[int]) -> Tensor:
    if len(set(counts)) == 1:
        parts = [torch.empty_like(x) for _ in counts]
        dist.all_gather(parts, x)
        return torch.cat(parts)
    # gloo and NCCL want equal shapes: pad to the longest rank, cut after
    padded = x.new_zeros((max(counts), *x.shape[1:]))
    padded[: x.shape[0]] = x
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, counts: list[int]) -> Tensor:
        ctx.counts = counts
        return _gather(x.contiguous(), counts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        # a copy: autograd may hand the same tensor to another branch, which would get the sum
        grad = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        start = sum(ctx.counts[: rank()])
        return grad[start : start + ctx.counts[rank()]], None


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].clone()
        dist.all_reduce(total)
        return total


def gather_rows(x: Tensor, counts: list[int] | None = None) -> Tensor:
    """All ranks' rows in rank order; differentiable (backward sums over ranks).

    Shapes:  [B, ...] -> [N, ...]; on a CPU B may differ by rank
    """
    if not is_distributed():
        return x
    counts = counts if counts is not None else row_counts(x.shape[0], x.device)
    if x.requires_grad and torch.is_grad_enabled():
        return _GatherRows.apply(x, counts)
    if x.dtype == torch.bool:
        return _gather(x.to(torch.uint8).contiguous(), counts).bool()
    return _gather(x.contiguous(), counts)


def sum_over_ranks(x: Tensor) -> Tensor:
    """The sum over ranks; differentiable (backward sums over ranks too)."""
    if not is_distributed():
        return x
    if x.requires_grad and torch.is_grad_enabled():
        return _SumOverRanks.apply(x)
    total = x.clone()
    dist.all_reduce(total)
    return total


def max_of_numbers(numbers: Sequence[int]) -> list[int]:
    """The maximum over ranks of each number that the hosts know.

    Over gloo, which process_group.start has beside NCCL, no GPU is asked or waited for; a group of
    NCCL alone exchanges them by the GPU.
    """
    if not is_distributed():
        return list(numbers)
    place = "cpu" if "cpu:" in dist.get_backend_config() else device()
    most = torch.tensor(numbers, dtype=torch.int64, device=place)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return [int(number) for number in most.tolist()]


def max_over_ranks(x: Tensor) -> Tensor:
    """The elementwise maximum over ranks, without gradient."""
    if not is_distributed():
        return x.detach()
    total = x.detach().clone()
    dist.all_reduce(total, op=dist.ReduceOp.MAX)
    return total


def device() -> torch.device:
    """This rank's GPU where there are GPUs, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def synchronise() -> None:
    """Wait for this rank's GPU; nothing on a CPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def local_ranks() -> int:
    """How many ranks share this host; torchrun and DeepSpeed name it differently."""
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "WORLD_SIZE"):
        given = os.environ.get(name, "")  # of a job script, or of another program, it may be a word
        if given.isdecimal():
            return max(1, int(given))
    return 1


def average_(tensors: Sequence[Tensor], bucket_bytes: int = 1 << 26) -> None:
    """Replace every tensor by its mean over ranks, in flat buckets of one dtype.

    Every rank must pass tensors of the same shapes in the same order, on one device. 64 MiB
    buckets: large enough to use the bandwidth, small enough beside the activations.
    """
    if not is_distributed():
        return
    bucket: list[Tensor] = []
    size = 0
    for i, tensor in enumerate(tensors):
        bucket.append(tensor)
        size += tensor.numel() * tensor.element_size()
        is_last = i + 1 == len(tensors)
        if is_last or size >= bucket_bytes or tensors[i + 1].dtype != tensor.dtype:
            flat = torch.cat([t.reshape(-1) for t in bucket])
            dist.all_reduce(flat)
            flat /= world_size()
            start = 0
            for t in bucket:
                t.copy_(flat[start : start + t.numel()].view_as(t))
                start += t.numel()
            bucket, size = [], 0


def broadcast_(tensors: Iterable[Tensor]) -> None:
    """Overwrite every tensor with rank 0's."""
    if is_distributed():
        for tensor in tensors:
            dist.broadcast(tensor, src=0)
