"""How ranks join, what stops them, and how they wait for rank 0."""

from __future__ import annotations

import socket
import threading
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from mlip.ranks import distributed, process_group
from mlip.training.lifecycle import guarded
from tests.virtual_gpu import virtual_gpu


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
        process_group.start(1.0)
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
        process_group.start(1.0)

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
        process_group.start(1.0)


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
        process_group.start(1.0)


def test_one_task_and_the_batch_script_of_a_job_with_several_are_a_process_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("SLURM_NTASKS", "8")  # of the job
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert process_group.start(1.0) == distributed.device()
    assert not dist.is_initialized()


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
def test_who_waits_for_rank_0_ends_when_the_link_or_rank_0_is_gone(error, says, monkeypatch):
    """Over a link that was down a rank waited on for rank 0, which had ended long ago."""
    store = _Store(error)
    monkeypatch.setattr(process_group, "_store", lambda: store)
    monkeypatch.setattr(process_group, "_POLL_S", 0.01)
    monkeypatch.setattr(distributed, "is_distributed", lambda: True)
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    monkeypatch.setattr(distributed, "broadcast_object", lambda value: value)
    ended: list[str] = []

    def wait() -> None:
        try:
            process_group.main_first(lambda: None)
        except dist.DistError as told:
            ended.append(str(told))

    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    waiting.join(20.0)
    store.end.set()
    assert store.asked == 3 and len(ended) == 1 and says in ended[0]


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
        process_group.start(1.0)
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
        assert process_group.start(30.0) == torch.device("cuda", 3)
        assert told == [torch.device("cuda", 3), ("cpu:gloo,cuda:nccl", 30.0)]
        monkeypatch.delenv("LOCAL_RANK")  # of a launcher that names no such thing
        with pytest.raises(ValueError, match=r"sees 4 GPUs: .*LOCAL_RANK=\$SLURM_LOCALID"):
            process_group.start(30.0)  # each of sixteen ranks took the first
        seen = 1  # one GPU a task
        with pytest.raises(dist.DistNetworkError, match="no route"):
            process_group.start(30.0)
    assert told[2] == torch.device("cuda", 0)
