"""Rank, world size, collectives with exact gradients, and log-once.

With kernels/_distributed.py and encoders/normalisation.py all that calls torch.distributed. Every
rank computes the same global loss and calls backward, so a gathered tensor's gradient is the sum
over ranks; averaging parameter gradients over ranks then gives the gradient of the whole batch.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mlip.launcher import name_interface, require_gpu, require_launcher, require_one_task
from mlip.machine import require_threads

logger = logging.getLogger("mlip")

_said: set[str] = set()
_POLL_S, _DONE = 0.5, "mlip/done"
# of a process group, where gloo aborts or waits for ever with fewer
_GROUP_THREADS = 8


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

    Over gloo, which `start` has beside NCCL, no GPU is asked or waited for; a group of NCCL alone
    exchanges them by the GPU.
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


def start(timeout_s: float) -> torch.device:
    """Join the launcher's process group (none without a launcher); this rank's device.

    Raises:  ValueError where another program holds the port that rank 0 was to listen on, where
             several processes were started that know nothing of each other, where a launcher's
             variables are there in part, or where LOCAL_RANK is of no GPU that is here
    """
    if not dist.is_initialized():
        require_launcher() if "RANK" in os.environ else require_one_task()
    here = device()
    if here.type == "cuda":
        require_gpu(here.index)
        torch.cuda.set_device(here)
    if "RANK" in os.environ and not dist.is_initialized():
        # objects and checkpoints travel over gloo where tensors of a GPU travel over NCCL
        backend = "cpu:gloo,cuda:nccl" if here.type == "cuda" else "gloo"
        require_threads(_GROUP_THREADS)
        name_interface(is_one_host=local_ranks() >= int(os.environ["WORLD_SIZE"]))
        try:
            dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
        except RuntimeError as error:
            if "EADDRINUSE" not in str(error):
                if isinstance(error, dist.DistError) or "Gloo" in str(error):
                    raise dist.DistNetworkError(_not_met(error)) from error
                raise
            raise ValueError(
                f"port {os.environ.get('MASTER_PORT')} of this machine is in use, most likely by "
                "another training run; give this one a port of its own: deepspeed --master_port "
                "N train.py ..., or torchrun --master_port N train.py ..."
            ) from error
    return here


def _not_met(error: Exception) -> str:
    """What a rank says that could not join the others."""
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    who = f"rank {os.environ['RANK']} on {socket.gethostname()}"
    if "connectFullMesh" in str(error):
        own = os.environ.get("GLOO_SOCKET_IFNAME", "the one of its host's name")
        text = (
            f"{who} met the others at {place}, and not each of them can reach it or be reached: "
            "let TCP pass between the nodes on all ports, and set GLOO_SOCKET_IFNAME on each to "
            f"its interface of the network that they share (here {own})"
        )
    else:
        text = (
            f"{who} did not meet all {os.environ['WORLD_SIZE']} ranks at {place}: start all nodes "
            "within run.timeout_s, each with the address of rank 0's node and one port that its "
            "firewall lets through (--master_addr, --master_port)"
        )
    return f"{text}. {error}"


def start_alone() -> None:
    """A process group of one where no launcher made one: DeepSpeed does not run without."""
    os.environ.setdefault("LOCAL_RANK", "0")
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        require_threads(_GROUP_THREADS)
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def stop() -> None:
    """Leave the process group; without this NCCL warns and may hang at exit."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def main_first(work: Callable[[], None]) -> None:
    """Rank 0 works, the others wait, for hours if need be, where a collective has its timeout.

    Raises:  what `work` raises, on rank 0; DistError on the others where rank 0 failed, is gone, or
             cannot be reached any more
    """
    if not is_distributed():
        work()
        return
    # a word of an earlier life, which torchrun has started again, must not be taken for this one's
    store, key = _store(), f"mlip/main_first/{broadcast_object(secrets.token_hex(8))}"
    if is_main():
        try:
            work()
        except BaseException:
            store.set(key, "failed")
            raise
        store.set(key, "done")
        return
    while (word := _ask(store, key)) is None:
        time.sleep(_POLL_S)
    if word != b"done":
        raise dist.DistError("rank 0 could not do what the others wait for; its line says why")


@contextlib.contextmanager
def rank_0_alone() -> Iterator[bool]:
    """Leave the process group: rank 0 goes on, and other ranks wait where that keeps it alive.

    A torchrun none of whose ranks is left ends after five minutes, and with it the meeting point
    (c10d) that it may keep for all nodes: torchrun of rank 0's node would then kill rank 0.
    Yields:  whether this is rank 0
    """
    is_first = is_main()
    waits = "TORCHELASTIC_RUN_ID" in os.environ and local_ranks() < world_size()
    store = _store() if waits else None
    barrier()
    stop()
    try:
        yield is_first
        # rank 0 may be gone: its own launcher says so
        with contextlib.suppress(RuntimeError):
            while store is not None and not is_first and _ask(store, _DONE) is None:
                time.sleep(_POLL_S)
    finally:
        if store is not None and is_first:
            with contextlib.suppress(RuntimeError):
                store.set(_DONE, "")


def _store() -> Any:
    """What the ranks met by: it has no timeout but that of a question."""
    return dist.distributed_c10d._get_default_store()


def _ask(store: Any, key: str) -> bytes | None:
    """What the store holds under the key; None where nothing.

    Raises:  DistError where it has not answered within its timeout: over a link that is down TCP
             asks again for a quarter of an hour and more, and the store waits for it
    """
    answers: queue.SimpleQueue[bytes | Exception | None] = queue.SimpleQueue()

    def ask() -> None:
        try:
            answers.put(store.get(key) if store.check([key]) else None)
        except RuntimeError as error:
            answers.put(error)

    threading.Thread(target=ask, daemon=True).start()
    wait_s = store.timeout.total_seconds()
    try:
        answer = answers.get(timeout=wait_s)
    except queue.Empty:
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise dist.DistError(
            f"the meeting point of all ranks, {place}, has not answered for {wait_s:.0f} s: its "
            "node or the network is gone"
        ) from None
    if isinstance(answer, Exception):
        raise answer
    return answer


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
