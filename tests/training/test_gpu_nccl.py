"""The project's own collectives, and batch statistics over ranks, by NCCL on one GPU.

Needs torch alone: a machine without DeepSpeed, or without what reads images, runs them too.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from mlip.encoders.normalisation import SynchronisedBatchNorm
from mlip.ranks import distributed, process_group
from tests.rank_farm import free_port

pytestmark = pytest.mark.gpu


@pytest.fixture
def one_rank(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The project's own process group, of one rank that counts as several."""
    place = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    for name, value in place.items():
        monkeypatch.setenv(name, str(value))
    device = process_group.start(60.0)
    monkeypatch.setattr(distributed, "is_distributed", lambda: True)
    try:
        yield device
    finally:
        process_group.stop()


def test_every_collective_of_the_project_runs_over_nccl(one_rank: torch.device) -> None:
    """On one rank each must give back what it got, whatever the dtype."""
    assert one_rank.type == "cuda"
    assert type(dist.group.WORLD._get_backend(one_rank)).__name__ == "ProcessGroupNCCL"
    g = torch.Generator(device="cuda").manual_seed(0)
    rows = torch.randn(6, 5, generator=g, device="cuda")
    assert distributed.row_counts(6, one_rank) == [6]
    for x in (rows, rows.bfloat16(), rows.double(), (rows * 99).long(), rows > 0):
        assert torch.equal(distributed.gather_rows(x), x), x.dtype
    leaf = rows.clone().requires_grad_()
    distributed.gather_rows(leaf).square().sum().backward()
    assert torch.equal(leaf.grad, 2 * rows)
    leaf = rows.clone().requires_grad_()
    distributed.sum_over_ranks(leaf).square().sum().backward()
    assert torch.equal(leaf.grad, 2 * rows)
    assert torch.equal(distributed.max_over_ranks(rows), rows)
    tensors = [rows.clone(), rows.bfloat16(), rows[0].clone()]
    distributed.average_(tensors, bucket_bytes=64)
    distributed.broadcast_(tensors)
    assert torch.equal(tensors[0], rows) and torch.equal(tensors[1], rows.bfloat16())
    # objects travel over gloo
    assert distributed.gather_objects({"a": 1}) == [{"a": 1}]
    assert distributed.broadcast_object("x") == "x"
    distributed.barrier()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_synchronised_batch_norm_over_nccl_is_torchs(
    one_rank: torch.device, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    from mlip.encoders import normalisation

    monkeypatch.setattr(normalisation, "is_distributed", lambda: True)
    torch.manual_seed(0)
    ours, torchs = SynchronisedBatchNorm(16).cuda(), torch.nn.BatchNorm2d(16).cuda()
    x = torch.randn(8, 16, 12, 12, device="cuda").to(memory_format=torch.channels_last)
    grad = torch.randn_like(x)
    outputs = []
    for norm in (ours, torchs):
        leaf = x.to(dtype).requires_grad_()
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            out = norm(leaf)
        out.backward(grad.to(out.dtype))
        outputs.append((out, leaf.grad, norm.weight.grad, norm.bias.grad, norm.running_var))
    # bf16: half a unit of 2^-8 in values up to 4; float32: sums over 1,152 pixels in two orders
    bound = 4 * 2**-8 if dtype == torch.bfloat16 else 1e-4
    for ours_, torchs_ in zip(*outputs, strict=True):
        scale = torchs_.float().abs().max().clamp_min(1.0)
        assert (ours_.float() - torchs_.float()).abs().max() <= bound * scale
