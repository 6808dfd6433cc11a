"""torch's own data-parallel wrappers over the losses: the gradient is that of the whole batch.

Oracle: one process on all pairs, float64. Three uneven gloo ranks are spawned once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from mlip.kernels.info_nce import info_nce_loss
from mlip.kernels.token_knowledge_patch import TokenKnowledgePatchLoss
from tests.kernels.oracle import make_inputs, relative_error
from tests.spawned_ranks import results_of_ranks, save_result

WORLD, SHARES = 3, (3, 1, 2)
FEATURES = ("patches", "tokens", "knowledge")


class _Towers(nn.Module):
    """A projection of each input and both losses, with learned scales."""

    def __init__(self, group: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.group = group
        self.towers = nn.ModuleDict({name: nn.Linear(8, 6) for name in FEATURES})
        self.loss = TokenKnowledgePatchLoss(aggregation="lse", group=group)
        self.double()

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        made = inputs | {name: self.towers[name](inputs[name]) for name in FEATURES}
        image, text = (F.normalize(made[name].mean(1), dim=-1) for name in ("patches", "tokens"))
        scale = self.loss.log_logit_scale.exp()
        return self.loss(**made) + info_nce_loss(image, text, scale, group=self.group)


def _share(rank: int) -> dict[str, Tensor]:
    start = sum(SHARES[:rank])
    return {k: v[start : start + SHARES[rank]] for k, v in _all().items()}


def _all() -> dict[str, Tensor]:
    inputs = make_inputs(6, 6, 7, 5, 3, 8, seed=51)
    inputs["pair_ids"] = torch.tensor([3, 8, 1, 5, 3, 8])
    return inputs


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    return {
        name.removeprefix("module."): p.grad.clone()
        for name, p in model.named_parameters()
        if p.grad is not None
    }


def _by_shards(rank: int) -> dict[str, Any]:
    """FSDP2 shards by the first dimension and refuses 0-dim parameters: the scales stay whole."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = _Towers(dist.group.WORLD)
    mesh = init_device_mesh("cpu", (WORLD,))
    for tower in model.towers.values():
        fully_shard(tower, mesh=mesh)
    value = model(_share(rank))
    value.backward()
    grads = {}
    for name, p in model.named_parameters():
        if hasattr(p.grad, "full_tensor"):
            grads[name] = p.grad.full_tensor()
        else:
            dist.all_reduce(p.grad)
            grads[name] = p.grad / WORLD
    return {"value": value.detach(), "grads": grads}


def _of_some_ranks(rank: int) -> dict[str, Any]:
    """The losses over a group of the last two ranks."""
    group = dist.new_group([1, 2])
    model = _Towers(group)
    if rank == 0:
        with pytest.raises(ValueError, match="not a member of the group"):
            model(_share(rank))
        return {}
    value = model(_share(rank))
    value.backward()
    return {"value": value.detach(), "grads": _gradients(model)}


def _work(rank: int, folder: Path) -> None:
    model = DistributedDataParallel(_Towers(dist.group.WORLD))
    value = model(_share(rank))
    value.backward()
    results = {"ddp": {"value": value.detach(), "grads": _gradients(model)}}
    results["fsdp"] = _by_shards(rank)
    results["some"] = _of_some_ranks(rank)
    save_result(results, rank, folder)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return results_of_ranks(_work, tmp_path_factory.mktemp("ranks"), WORLD)


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_averaged_gradients_are_those_of_the_whole_batch(
    wrapper: str, ranks: list[dict[str, Any]]
) -> None:
    model = _Towers(None)
    value = model(_all())
    value.backward()
    want = _gradients(model)
    assert want.keys() == dict(model.named_parameters()).keys()
    for part in ranks:
        got = part[wrapper]
        assert got["value"].item() == pytest.approx(value.item(), rel=1e-12)
        assert got["grads"].keys() == want.keys()
        for name in want:
            assert relative_error(got["grads"][name], want[name]) <= 1e-11, name


def test_a_group_may_be_some_of_the_ranks(ranks: list[dict[str, Any]]) -> None:
    model = _Towers(None)
    value = model({name: x[SHARES[0] :] for name, x in _all().items()})
    value.backward()
    parts = [part["some"] for part in ranks[1:]]
    assert [part["value"].item() for part in parts] == pytest.approx([value.item()] * 2, rel=1e-12)
    for name, want in _gradients(model).items():
        got = torch.stack([part["grads"][name] for part in parts]).mean(0)
        assert relative_error(got, want) <= 1e-11, name
