"""Collectives of mlip/distributed.py as autograd sees them and over three ranks; several ranks of
losses and of a step are in tests/losses/test_ranks.py and tests/training/test_exact.py.

Oracle: a reduction that doubles in place, as the sum over two ranks of equal gradients would.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist

from mlip import distributed, launcher
from mlip.training.grad_cache import equal_passes
from mlip.training.lifecycle import guarded
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


@pytest.mark.parametrize(
    "told",
    [
        {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"},
        {"OMPI_COMM_WORLD_SIZE": "2"},
        {"PMI_SIZE": "2"},
        {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"},  # of Kubernetes, without its RANK
    ],
)
def test_processes_that_know_nothing_of_each_other_are_refused(
    told: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of two tasks of `srun python train.py` trained alone, the other was told of a lock."""
    monkeypatch.delenv("RANK", raising=False)
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="has started 2 processes .* and none has a RANK"):
        distributed.start(1.0)
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("told", "named"),
    [
        ({"RANK": ""}, "RANK is ''"),  # `export RANK=` of a job script: it was a traceback
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK is 'x'"),
        ({"RANK": "\u00b2"}, "RANK is '\u00b2'"),
        ({"RANK": "0"}, "WORLD_SIZE is ''"),
        ({"RANK": "0", "WORLD_SIZE": "1"}, "MASTER_PORT is ''"),
        # of Kubernetes, for a service that is called master
        ({"RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": "tcp://10.0.0.1:29500"}, "MASTER_PORT is"),
        ({"RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": "29500"}, "MASTER_ADDR is ''"),
    ],
)
def test_a_launchers_variables_in_part_are_refused(
    told: dict[str, str], named: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT", "MASTER_ADDR", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in told.items():
        monkeypatch.setenv(name, value)

    def start() -> None:
        distributed.start(1.0)

    assert guarded(start, lambda: None) == 2
    said = capsys.readouterr().err
    assert f"RANK is set, as a launcher does, but {named}" in said and "`unset RANK`" in said
    assert not dist.is_initialized()


def test_a_rank_beyond_the_last_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """It waited for run.timeout_s and was told of a peer."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in {**place, "RANK": "2", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="RANK=2 with WORLD_SIZE=2: expected ranks from 0"):
        distributed.start(1.0)


def test_a_task_with_one_gpu_that_counts_as_the_fourth_of_its_node_is_told_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`srun --gpus-per-task 1` with LOCAL_RANK=$SLURM_LOCALID: "invalid device ordinal"."""
    launched = {"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in {**launched, "LOCAL_RANK": "3"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match=r"LOCAL_RANK=3, and this process sees 1 GPU"):
        distributed.start(1.0)


def test_one_task_and_the_batch_script_of_a_job_with_several_are_a_process_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("SLURM_NTASKS", "8")  # of the job
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert distributed.start(1.0) == distributed.device()
    assert not dist.is_initialized()


def _every_collective() -> None:
    """What each of three ranks does; rank r has r + 1 rows."""
    distributed.start(60.0)
    distributed.start(60.0)  # one that is there is used
    distributed.start_alone()
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
    distributed.stop()
    assert not dist.is_initialized()


def test_every_collective_of_three_uneven_ranks() -> None:
    rank_farm.run(_every_collective, 3)


def test_a_maximum_has_no_gradient_in_one_process_either() -> None:
    assert not distributed.max_over_ranks(torch.ones(1, requires_grad=True)).requires_grad


class _Store:
    """Behind a link that is down, or of a rank that is gone, once it has been asked twice."""

    timeout = timedelta(seconds=0.2)

    def __init__(self, error: Exception | None) -> None:
        self.asked, self.error, self.end = 0, error, threading.Event()

    def check(self, keys: list[str]) -> bool:
        self.asked += 1
        if self.asked > 2:
            if self.error is not None:
                raise self.error
            self.end.wait(60.0)
        return False


@pytest.mark.parametrize(
    ("error", "says"),
    [(None, "has not answered for 0 s"), (dist.DistNetworkError("reset"), "reset")],
)
def test_who_waits_for_rank_0_ends_when_the_link_or_rank_0_is_gone(
    error, says, monkeypatch, as_if_two_ranks
):
    """Over a link that was down a rank waited on for rank 0, which had ended long ago."""
    store = _Store(error)
    monkeypatch.setattr(distributed, "_store", lambda: store)
    monkeypatch.setattr(distributed, "_POLL_S", 0.01)
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    monkeypatch.setattr(distributed, "broadcast_object", lambda value: value)
    ended: list[str] = []

    def wait() -> None:
        try:
            distributed.main_first(lambda: None)
        except dist.DistError as told:
            ended.append(str(told))

    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    waiting.join(20.0)
    store.end.set()
    assert store.asked == 3 and len(ended) == 1 and says in ended[0]


def _nodes(monkeypatch: pytest.MonkeyPatch, own: str | None, towards: str | None) -> None:
    """This host as one of two: what its name leads to, and its address towards rank 0's."""

    def look_up(name: str, port: Any, **_: Any) -> list[Any]:
        found = own if name == socket.gethostname() else name
        if found is None:
            raise socket.gaierror
        return [(socket.AF_INET, socket.SOCK_STREAM, 0, "", (found, port))]

    monkeypatch.setattr(launcher.socket, "getaddrinfo", look_up)
    monkeypatch.setattr(launcher, "_own_address_towards", lambda _: towards)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")  # so that what is set is undone
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    monkeypatch.setenv("MASTER_ADDR", "first")
    addresses = {"lo": "127.0.0.1", "eth0": "10.0.0.7", "ib0": "10.1.0.7"}
    entries = {n: [SimpleNamespace(family=socket.AF_INET, address=a)] for n, a in addresses.items()}
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: entries)
    states = {n: SimpleNamespace(isup=n != "ib0") for n in addresses}
    monkeypatch.setattr(psutil, "net_if_stats", lambda: states)


@pytest.mark.parametrize(
    ("own", "towards", "is_one_host", "taken"),
    [
        ("127.0.1.1", "10.1.0.7", False, "ib0"),
        ("127.0.1.1", "10.0.0.7", True, "eth0"),  # ranks set by hand, of one host as it seems
        (None, "10.1.0.7", False, "ib0"),
        ("127.0.1.1", "127.0.1.1", False, "eth0"),  # rank 0's own name is that of its loopback
        ("127.0.1.1", None, False, "eth0"),
        ("127.0.1.1", "127.0.0.1", True, None),
        ("127.0.1.1", "10.9.0.7", False, None),
        ("10.0.0.7", "10.1.0.7", False, None),  # gloo finds it
    ],
)
def test_a_host_whose_name_leads_to_its_loopback_is_reached_by_its_network(
    own, towards, is_one_host, taken, monkeypatch
):
    """As Debian and Ubuntu write /etc/hosts: ranks of two hosts never met."""
    _nodes(monkeypatch, own, towards)
    launcher.name_interface(is_one_host)
    assert os.environ.get("GLOO_SOCKET_IFNAME") == taken


def test_an_interface_that_is_named_stays_and_one_of_several_is_not_guessed(monkeypatch):
    _nodes(monkeypatch, "127.0.1.1", "127.0.1.1")
    states = {n: SimpleNamespace(isup=True) for n in ("lo", "eth0", "ib0")}
    monkeypatch.setattr(psutil, "net_if_stats", lambda: states)
    launcher.name_interface(is_one_host=False)
    assert "GLOO_SOCKET_IFNAME" not in os.environ
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "bond0")
    monkeypatch.setattr(launcher, "_own_address_towards", lambda _: "10.0.0.7")
    launcher.name_interface(is_one_host=False)
    assert os.environ["GLOO_SOCKET_IFNAME"] == "bond0"


def test_the_own_address_towards_another_is_the_systems():
    assert launcher._own_address_towards("127.0.0.1") == "127.0.0.1"
    assert launcher._own_address_towards("no.such.name.invalid") is None


@pytest.mark.parametrize(
    ("kind", "text", "named"),
    [
        (dist.DistStoreError, "Timed out after 6 seconds", "--master_addr, --master_port"),
        (dist.DistNetworkError, "failed to connect", "--master_addr, --master_port"),
        (RuntimeError, "Gloo connectFullMesh failed with x", "GLOO_SOCKET_IFNAME"),
    ],
)
def test_a_rank_that_cannot_join_names_itself_the_place_and_what_to_do(
    kind, text, named, monkeypatch
):
    def join(*_: Any, **__: Any) -> None:
        raise kind(text)

    place = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(dist, "init_process_group", join)
    with pytest.raises(dist.DistError) as caught:
        distributed.start(1.0)
    for part in (f"rank 1 on {socket.gethostname()}", "127.0.0.1:29500", named, text):
        assert part in str(caught.value)


def test_a_rank_takes_its_own_gpu_and_joins_with_the_runs_patience(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[Any] = []

    def join(backend: str, timeout: Any) -> None:
        told.append((backend, timeout.total_seconds()))
        if len(told) > 2:
            raise dist.DistNetworkError("no route to host")

    seen = 4
    given = {"RANK": "11", "WORLD_SIZE": "16", "MASTER_ADDR": "node", "MASTER_PORT": "29500"}
    for name, value in {**given, "LOCAL_RANK": "3"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(dist, "init_process_group", join)
    # undone before the virtual GPU puts back what it has replaced itself
    with virtual_gpu(), monkeypatch.context() as node:
        node.setattr(torch.cuda, "set_device", told.append)
        node.setattr(torch.cuda, "device_count", lambda: seen)
        assert distributed.start(30.0) == torch.device("cuda", 3)
        assert told == [torch.device("cuda", 3), ("cpu:gloo,cuda:nccl", 30.0)]
        monkeypatch.delenv("LOCAL_RANK")  # of a launcher that names no such thing
        with pytest.raises(ValueError, match=r"sees 4 GPUs: .*LOCAL_RANK=\$SLURM_LOCALID"):
            distributed.start(30.0)  # each of sixteen ranks took the first
        seen = 1  # one GPU a task
        with pytest.raises(dist.DistNetworkError, match="no route"):
            distributed.start(30.0)
    assert told[2] == torch.device("cuda", 0)
