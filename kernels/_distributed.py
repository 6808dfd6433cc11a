"""Gather and reduce over an op's process group, with exact gradients.

Convention: every rank computes the same global loss and calls backward on it, so the objective that
autograd sees is W times the loss. Gradients of gathered rows are summed over ranks; every input's
gradient is then W times the true one, and averaging parameter gradients over ranks gives the
gradient of the whole batch. `group=None` means this process alone.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mlip.kernels._autograd import no_second_derivative

Group = Any  # torch.distributed.ProcessGroup | None


def group_size(group: Group) -> int:
    if group is None:
        return 1
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError(
            "a process group was passed but torch.distributed is not initialised; call "
            "init_process_group first, or pass group=None"
        )
    size = dist.get_world_size(group)
    if size < 1:
        raise ValueError("this process is not a member of the group that was passed")
    return size


def default_group(world_size: int) -> Group:
    """The default process group, checked against the size that the caller was told."""
    ready = dist.is_available() and dist.is_initialized()
    if not ready or dist.get_world_size() != world_size:
        raise ValueError(
            f"expected an initialised process group of {world_size} ranks, as world_size says; "
            "call init_process_group first"
        )
    return dist.group.WORLD


def group_rank(group: Group) -> int:
    return 0 if group_size(group) == 1 else dist.get_rank(group)


def row_counts(x: Tensor, group: Group, given: dict[str, bool] | None = None) -> list[int]:
    """Rows of every rank, in rank order.

    given:   which optional arguments came: they must come on every rank or on none
    Raises:  ValueError if the other dimensions or `given` differ over ranks (CPU tensors)
    On a GPU every rank must pass equal shapes: exchanging sizes there would synchronise.
    """
    size = group_size(group)
    if size == 1 or x.device.type != "cpu":
        return [x.shape[0]] * size
    given = given or {}
    mine = torch.tensor([*x.shape, *given.values()], dtype=torch.int64, device="cpu")
    shapes = [torch.zeros_like(mine) for _ in range(size)]
    dist.all_gather(shapes, mine, group=group)
    came = torch.stack(shapes)[:, x.ndim :].bool()
    on_some = came.any(0) & ~came.all(0)
    if bool(on_some.any()):
        names = [name for name, is_so in zip(given, on_some.tolist(), strict=True) if is_so]
        raise ValueError(
            f"expected {' and '.join(names)} on every rank or on none, got them on some; pass a "
            "mask of True, or ids that are all different, where nothing is left out"
        )
    if any(not torch.equal(shape[1:], mine[1:]) for shape in shapes):
        raise ValueError(
            f"every rank must pass the same dimensions after the first, got "
            f"{[shape.tolist() for shape in shapes]}; pad tokens and entities to a fixed length"
        )
    return [int(shape[0]) for shape in shapes]


def gather(x: Tensor, group: Group, counts: list[int]) -> Tensor:
    """Every rank's rows in rank order, without gradient; x itself for one process."""
    return x if len(counts) == 1 else gather_over_ranks(x, group, counts)


def gather_over_ranks(x: Tensor, group: Group, counts: list[int]) -> Tensor:
    """gather through the group's collective, of however many ranks."""
    x = x.contiguous()
    if x.device.type != "cpu":
        out = x.new_empty((sum(counts), *x.shape[1:]))
        dist.all_gather_into_tensor(out, x, group=group)
        return out
    # gloo wants equal shapes: pad to the longest rank, cut after
    if x.shape[0] < max(counts):
        x = torch.cat([x, x.new_zeros((max(counts) - x.shape[0], *x.shape[1:]))])
    parts = [torch.empty_like(x) for _ in counts]
    dist.all_gather(parts, x, group=group)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def reduce_rows(grad: Tensor, group: Group, counts: list[int]) -> Tensor:
    """This rank's rows of the sum over ranks of `grad` [N, ...]; grad itself for one process."""
    return grad if len(counts) == 1 else reduce_over_ranks(grad, group, counts)


def reduce_over_ranks(grad: Tensor, group: Group, counts: list[int]) -> Tensor:
    """reduce_rows through the group's collective, of however many ranks."""
    rank = group_rank(group)
    if grad.device.type != "cpu":
        out = grad.new_empty((counts[rank], *grad.shape[1:]))
        dist.reduce_scatter_tensor(out, grad.contiguous(), group=group)
        return out
    total = grad.contiguous().clone()
    dist.all_reduce(total, group=group)
    start = sum(counts[:rank])
    return total[start : start + counts[rank]]


def sum_over_group(x: Tensor, group: Group) -> Tensor:
    """The sum over ranks, without gradient; x itself for one process."""
    if group_size(group) == 1:
        return x
    total = x.detach().clone()
    dist.all_reduce(total, group=group)
    return total


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, counts: list[int]) -> Tensor:
        ctx.group, ctx.counts, ctx.dtype = group, counts, x.dtype
        return gather(x, group, counts)

    @staticmethod
    @no_second_derivative  # which would know nothing of the sum over ranks
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        # summed in float32 or better: W terms in bfloat16 would lose what the kernel kept
        grad = grads[0] if grads[0].dtype == torch.float64 else grads[0].float()
        return reduce_rows(grad, ctx.group, ctx.counts).to(ctx.dtype), None, None


def gather_rows(x: Tensor, group: Group, counts: list[int] | None = None) -> Tensor:
    """Every rank's rows in rank order; differentiable, the backward pass sums over ranks.

    Shapes:  [B, ...] -> [N, ...]; on CPU B may differ by rank
    """
    if group_size(group) == 1:
        return x
    counts = counts if counts is not None else row_counts(x, group)
    if x.requires_grad and torch.is_grad_enabled():
        return _GatherRows.apply(x, group, counts)
    return gather(x, group, counts)
