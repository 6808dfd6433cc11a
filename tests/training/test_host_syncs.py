"""A training step is handed over without reading anything; what waits is known by name.

Oracles: on a CPU every operation that would make the host wait for a GPU, counted as it is
dispatched, with the place in our code that asked for it; on a GPU torch's own sync debug mode.
"""

from __future__ import annotations

import traceback
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from mlip.batch import Batch
from mlip.encoders import normalisation
from mlip.host_read import HostRead
from mlip.training.step import Engine
from tests.training.exact_step import PIXELS, exact_engine, make_batch
from tests.virtual_gpu import virtual_gpu

ROOT = Path(__file__).resolve().parents[2]
PROGRESS = 1.5  # the prototypes learn

# a value that is read, or a result whose size depends on values
READS = {"_local_scalar_dense", "equal", "is_nonzero", "allclose"}
SIZED_BY_VALUES = {"nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
# a number that is copied to the device from ordinary memory waits for what is queued before it
PYTHON_CALLS = {"tolist", "numpy", "cpu", "new_tensor", "tensor", "as_tensor"}

# Whether a step counts is decided on the device. What it tells (losses, norm, scales, the wish to
# stop) is read from a copy that waits for nothing behind it, by the loop once the next is queued.
OF_THE_HOST = {"mlip/host_read.py:numbers": "the numbers of a step, when they are wanted"}
# checks that read a tensor where that costs nothing; each asks for the tensor's device first
ON_A_CPU_ONLY = {
    "kernels/token_knowledge_patch/checks.py:check_inputs",
    "kernels/token_knowledge_patch/checks.py:check_scale",
    "kernels/token_knowledge_patch/reference.py:pair_scores",
    "mlip/model.py:encode_text",  # how many tokens are real: counts that stay on the host
}


def _place() -> str:
    """File and function of ours that asked, the innermost; a library's alone where it is none."""
    for frame in reversed(traceback.extract_stack()):
        try:
            path = Path(frame.filename).resolve().relative_to(ROOT)
        except ValueError:
            continue
        if path.parts[0] in ("mlip", "kernels", "dataloading"):
            return f"{path}:{frame.name}"
    return "outside"


class _Dispatched(TorchDispatchMode):
    def __init__(self, seen: list[tuple[str, str]]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        by_values = name in INDEXING and any(
            isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)
            for index in args[1]
        )
        if name in READS or name in SIZED_BY_VALUES or by_values:
            self.seen.append((name, _place()))
        return func(*args, **(kwargs or {}))


class _Called(TorchFunctionMode):
    """tolist and the like of a CPU tensor reach no operator."""

    def __init__(self, seen: list[tuple[str, str]]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in PYTHON_CALLS:
            self.seen.append((name, _place()))
        return func(*args, **(kwargs or {}))


def _step(engine: Engine, number: int) -> Any:
    batch = make_batch(number, 8)
    return engine.start_step(batch, step=number, progress=PROGRESS, lr=0.01).result()


def _waits(engine: Engine) -> list[str]:
    """Places of everything in the second step that would wait on a GPU, but for its numbers."""
    _step(engine, 0)
    seen: list[tuple[str, str]] = []
    with _Called(seen), _Dispatched(seen):
        result = _step(engine, 1)
    assert not result.is_skipped
    read = [place for _, place in seen if place in OF_THE_HOST]
    assert read and len(set(read)) == 1
    return [p for _, p in seen if p not in ON_A_CPU_ONLY and p not in OF_THE_HOST]


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_waits_for_nothing_until_its_numbers_are_wanted(passes: int, optimizer: str) -> None:
    assert _waits(exact_engine(8, passes=passes, more=(f"train.optimizer={optimizer}",))) == []


def test_spikes_add_two_reads_and_an_average_of_weights_none() -> None:
    assert _waits(exact_engine(8, more=("train.ema_decay=0.9",))) == []
    # whether a loss is far above the recent ones decides what is run next
    watched = _waits(exact_engine(8, more=("train.spike_factor=3",)))
    assert watched == ["mlip/training/step.py:start_step"]


def test_packed_reports_wait_only_where_nobody_counted_their_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert _waits(exact_engine(8, more=("model.text.packed=true",))) == []
    plain_to = Batch.to
    monkeypatch.setattr(Batch, "to", lambda *a: replace(plain_to(*a), token_counts=None))
    packed = _waits(exact_engine(8, more=("model.text.packed=true",)))
    assert packed == ["mlip/encoders/packing.py:of"]


def test_batch_statistics_over_ranks_are_exchanged_without_a_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A ResNet-50 has 53 such layers: a number copied from the host in each would be 53 waits."""
    monkeypatch.setattr(normalisation, "is_distributed", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda x: x.mul_(2.0))
    norm = normalisation.SynchronisedBatchNorm(3)
    x = torch.randn(4, 3, 5, 5, requires_grad=True)
    seen: list[tuple[str, str]] = []
    with _Called(seen), _Dispatched(seen):
        norm(x).sum().backward()
    assert seen == [] and x.grad is not None


def test_the_counter_sees_what_it_must() -> None:
    seen: list[tuple[str, str]] = []
    x = torch.arange(4.0)
    with _Called(seen), _Dispatched(seen):
        float(x[0]), bool(x[1] > 0), x.nonzero(), x[x > 1], x.tolist(), x.new_tensor(1.0)
        torch.equal(x, x), x.sum(), x[torch.tensor([1, 2])]
    names = [name for name, _ in seen]
    reads = ["_local_scalar_dense", "_local_scalar_dense", "nonzero", "index", "tolist"]
    assert names == [*reads, "new_tensor", "equal", "tensor"]


def test_what_a_step_tells_is_of_the_moment_before_its_update() -> None:
    engine = exact_engine(8)
    before = engine.scales()
    result = _step(engine, 0)
    assert result.scales == pytest.approx(before, rel=1e-6)
    assert engine.scales()["logit"] != before["logit"]


def test_a_host_read_holds_the_values_of_its_moment() -> None:
    read = HostRead(torch.tensor([1.0, 2.5]))
    assert read.is_there and read.numbers() == [1.0, 2.5]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real one")
def test_a_host_read_waits_on_the_gpu_of_its_values() -> None:
    """The thread's current GPU may be another: its stream would say nothing of the copy."""
    with virtual_gpu():
        values = torch.tensor([1.0, 2.5]).to("cuda")
        read = HostRead(values)
        copied: Any = read._copied
        stream: Any = torch.cuda.current_stream
        stream.assert_called_once_with(values.device)
        copied.record.assert_called_once_with(stream.return_value)
        for is_made in (False, True):
            copied.query.return_value = is_made
            assert read.is_there is is_made
        copied.synchronize.assert_not_called()
        assert read.numbers() == [1.0, 2.5]
        copied.synchronize.assert_called_once_with()


@pytest.mark.gpu
def test_on_a_gpu_torch_sees_no_wait_in_a_step() -> None:
    engine = exact_engine(8)
    batches = [make_batch(number, 8).to("cuda") for number in range(4)]
    for number in range(3):
        engine.start_step(batches[number], step=number, progress=PROGRESS, lr=0.01).result()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            started = engine.start_step(batches[3], step=3, progress=PROGRESS, lr=0.01)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [str(w.filename) for w in caught if "synchroniz" in str(w.message)] == []
    assert not started.result().is_skipped


@pytest.mark.gpu
def test_on_a_gpu_a_host_read_is_asked_for_at_once_and_waits_when_it_is_read() -> None:
    values = torch.zeros(2, device="cuda")

    def ask() -> HostRead:
        return HostRead(values.add_(1.0).clone())

    assert ask().numbers() == [1.0, 1.0]  # kernels and page-locked memory are there from now on
    torch.cuda.synchronize()
    torch.cuda._sleep(400_000_000)  # clock ticks: about 0.2 s
    read = ask()
    assert not torch.cuda.current_stream().query()  # the GPU is still asleep
    assert read.numbers() == [2.0, 2.0]


@pytest.mark.gpu
def test_on_a_gpu_a_batch_is_copied_before_its_memory_serves_the_next_one() -> None:
    """The loader's memory and the page-locked copies of it are used again and again, by a host that
    is far ahead of the GPU. Oracle: every batch holds its own number."""
    from mlip.dataloading.loader import pinned
    from mlip.dataloading.pipelines.buffers import Buffers

    buffers, late = Buffers(), []
    for number in range(24):
        image = buffers.take(8, 1, PIXELS, PIXELS).fill_(float(number))
        rest = make_batch(number, 8)
        host = pinned(replace(rest, image=image.expand(-1, 3, -1, -1)))
        del image
        torch.cuda._sleep(20_000_000)  # clock ticks: about 10 ms
        moved = host.to("cuda")
        assert host.image.is_pinned() and moved.image.stride(1) == 0
        late.append((moved.image.clone(), moved.token_ids.clone(), rest.token_ids))
        del host, moved
    torch.cuda.synchronize()
    for number, (image, ids, expected) in enumerate(late):
        assert bool((image == number).all()), number
        assert torch.equal(ids.cpu(), expected), number
