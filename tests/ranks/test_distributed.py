"""Collectives of mlip/ranks/distributed.py as autograd sees them and over three ranks;
several ranks of losses and of a step are in tests/losses/test_ranks.py and
tests/training/test_exact.py.

Oracle: a reduction that doubles in place, as the sum over two ranks of equal gradients would.
"""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from mlip.ranks import distributed, process_group
from mlip.training.grad_cache import equal_passes
from tests import rank_farm
from tests.virtual_gpu import virtual_gpu


@pytest.fixture
def as_if_two_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "is_distributed", lambda: True)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(dist, "get_backend_config", lambda group=None: "cpu:gloo,cuda:nccl")
    monkeypatch.setattr(dist, "all_reduce", lambda x, **_: x.mul_(2))

    def all_gather(parts: list[torch.Tensor], x: torch.Tensor) -> None:
        for part in parts:
            part.copy_(x)

    monkeypatch.setattr(dist, "all_gather", all_gather)


@pytest.mark.parametrize("gathers", [True, False])
def test_the_gradient_of_a_neighbouring_branch_is_not_summed_over_ranks(
    as_if_two_ranks: None, gathers: bool
) -> None:
    """Autograd hands one tensor to both sides of a sum; a reduction in place would change both."""
    x = torch.ones(3, 2, requires_grad=True)
    beside = torch.ones(6 if gathers else 3, 2, requires_grad=True)
    other = beside * 1.0  # made first, so differentiated last
    made = distributed.gather_rows(x, [3, 3]) if gathers else distributed.sum_over_ranks(x)
    (made + other).backward(torch.full(made.shape, 5.0))
    assert torch.equal(x.grad, torch.full((3, 2), 10.0))
    assert torch.equal(beside.grad, torch.full(beside.shape, 5.0))


def test_each_of_three_uneven_ranks_gets_the_gradient_of_its_own_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dist, "all_reduce", lambda x, **_: None)
    rows = torch.arange(6.0)[:, None]
    for rank, expected in enumerate(([0.0, 1.0, 2.0], [3.0], [4.0, 5.0])):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        grad, _ = distributed._GatherRows.backward(SimpleNamespace(counts=[3, 1, 2]), rows)
        assert grad[:, 0].tolist() == expected


def test_ranks_of_this_host_are_counted_by_each_launcher_s_name_and_a_line_is_logged_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    for name, ranks in (("LOCAL_SIZE", 4), ("LOCAL_WORLD_SIZE", 2)):
        monkeypatch.setenv(name, str(ranks))
        assert distributed.local_ranks() == ranks
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "")  # as a job script exports what it lacks
    assert distributed.local_ranks() == 4
    monkeypatch.setattr(distributed, "_said", set())
    with caplog.at_level("INFO", "mlip"):
        for _ in range(3):
            distributed.log_once("a line")
        distributed.log_once("a warning", logging.WARNING)
    lines = [(record.message, record.levelname) for record in caplog.records]
    assert lines == [("a line", "INFO"), ("a warning", "WARNING")]


def test_on_gpus_rows_and_passes_of_other_ranks_are_known_without_an_exchange(
    as_if_two_ranks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All ranks hold equally many there: engine.py refuses a batch that cannot be shared so."""
    assert distributed.row_counts(3, torch.device("cpu")) == [3, 3]
    assert equal_passes(3, 2, torch.device("cpu")) == 4  # the stand-in's reduction doubles

    def refuse(*_: object) -> None:
        raise AssertionError("the host would wait for the GPU")

    for name in ("all_gather", "all_reduce"):
        monkeypatch.setattr(dist, name, refuse)
    assert distributed.row_counts(3, torch.device("cuda", 0)) == [3, 3]
    assert equal_passes(3, 2, torch.device("cuda", 0)) == 2


@pytest.mark.parametrize(
    ("backends", "place"), [("cpu:gloo,cuda:nccl", "cpu"), ("cuda:nccl", "cuda")]
)
def test_numbers_of_the_hosts_go_over_gloo_and_by_the_gpu_where_there_is_none(
    as_if_two_ranks: None, monkeypatch: pytest.MonkeyPatch, backends: str, place: str
) -> None:
    """A job of its own may have started NCCL alone, which takes no tensor of a host."""
    places = []

    def all_reduce(x: torch.Tensor, op: object) -> None:
        places.append(x.device.type)

    monkeypatch.setattr(dist, "get_backend_config", lambda group=None: backends)
    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    with virtual_gpu():
        assert distributed.max_of_numbers([3, 5]) == [3, 5]
    assert places == [place]


def _every_collective() -> None:
    """What each of three ranks does; rank r has r + 1 rows."""
    process_group.start(60.0)
    process_group.start(60.0)  # one that is there is used
    process_group.start_alone()
    rank, said = distributed.rank(), []
    assert (distributed.world_size(), distributed.is_main()) == (3, rank == 0)
    assert distributed.world_group() is dist.group.WORLD
    distributed.logger.log = lambda _, message: said.append(message)  # type: ignore
    distributed.log_once("a line")
    assert said == ["a line"][rank:]
    assert distributed.broadcast_object(f"of {rank}") == "of 0"
    assert distributed.gather_objects(rank) == [0, 1, 2]
    assert distributed.max_of_numbers([rank, 5 - rank]) == [2, 5]

    first = rank * (rank + 1) // 2
    own = torch.arange(float(first), first + rank + 1)[:, None]
    rows = own.clone().requires_grad_()
    made = distributed.gather_rows(rows)
    assert made[:, 0].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    made.square().sum().backward()
    assert torch.equal(rows.grad, 3 * 2 * own)  # the same loss on each of three ranks
    flags = distributed.gather_rows(own > 2.0)
    assert flags.dtype == torch.bool and flags[:, 0].tolist() == [False] * 3 + [True] * 3
    with torch.no_grad():
        assert not distributed.gather_rows(rows).requires_grad

    for learned in (True, False):
        x = torch.tensor([rank + 1.0], requires_grad=learned)
        total = distributed.sum_over_ranks(x)
        assert (float(total), total.requires_grad, float(x)) == (6.0, learned, rank + 1.0)
        if learned:
            total.backward()
            assert float(x.grad) == 3.0
        most = distributed.max_over_ranks(x)
        assert (float(most), most.requires_grad, float(x)) == (3.0, False, rank + 1.0)

    kinds = ((2, torch.float32), (3, torch.float32), (1, torch.float64), (4, torch.float32))
    tensors = [torch.full((n, 2), float(n * rank), dtype=kind) for n, kind in kinds]
    distributed.average_(tensors, bucket_bytes=32)
    assert [t.unique().tolist() for t in tensors] == [[2.0], [3.0], [1.0], [4.0]]
    tensors = [torch.full((n,), float(n + rank)) for n in (1, 2)]
    distributed.broadcast_(tensors)
    assert [t.unique().tolist() for t in tensors] == [[1.0], [2.0]]
    process_group.stop()
    assert not dist.is_initialized()


def test_every_collective_of_three_uneven_ranks() -> None:
    rank_farm.run(_every_collective, 3)


def test_a_maximum_has_no_gradient_in_one_process_either() -> None:
    assert not distributed.max_over_ranks(torch.ones(1, requires_grad=True)).requires_grad
