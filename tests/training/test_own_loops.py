"""The loops that docs/losses.md prints: the gradient cache in other people's training code.

Oracles: one process on all pairs without a cache; with dropout, the same loop with all activations
kept.
"""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlip.training.grad_cache import cached_forward
from tests import rank_farm
from tests.training import own_loops
from tests.training.own_loops import CASES, MICRO, parameters, run

ROOT = Path(__file__).resolve().parents[2]
Found = dict[str, dict[str, dict[str, Tensor]]]


def _require_close(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=2e-5, atol=2e-6, msg=name)


@pytest.fixture(scope="module")
def whole() -> dict[str, Tensor]:
    """One process, all pairs, no cache."""
    return parameters(run("plain", 0.0, (MICRO, "micro_size=0"))["model"])


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    folder = tmp_path_factory.mktemp("loops")
    rank_farm.run(own_loops.run_cases, own_loops.WORLD, str(folder), folder=folder)
    return torch.load(folder / "found.pt", weights_only=True)


def test_micro_batches_are_the_whole_batch(whole: dict[str, Tensor]) -> None:
    start = own_loops.towers(0.0)["image_tower"]
    assert all(
        (whole[f"image_tower.{name}"] - p).abs().max() > 1e-3
        for name, p in start.named_parameters()
    ), "the steps moved nothing that could differ"
    _require_close(parameters(run("plain", 0.0)["model"]), whole)


def test_micro_batches_with_dropout_are_those_that_are_kept() -> None:
    cached, kept = (parameters(run("plain", 0.3, keep=k)["model"]) for k in (False, True))
    assert all(torch.equal(cached[name], value) for name, value in kept.items())


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_are_one_process_on_all_pairs(
    case: str, found: Found, whole: dict[str, Tensor]
) -> None:
    if own_loops.FIXED in CASES[case]:
        changes = (MICRO, "micro_size=0"), own_loops.FIXED
        whole = parameters(run("plain", 0.0, *changes)["model"])
    if "bf16" not in case:  # of other numbers than one process's
        _require_close(found[case]["exact"], whole)


def test_around_the_wrapper_nothing_is_averaged(found: Found, whole: dict[str, Tensor]) -> None:
    """Without a word from torch: the page says so."""
    apart = (found["around"]["exact"]["log_scale"] - whole["log_scale"]).abs()
    assert float(apart) > 0.01


@pytest.mark.parametrize("case", CASES)
def test_dropout_is_replayed_under_every_wrapper(case: str, found: Found) -> None:
    name = "image_tower.0.weight"
    assert not torch.equal(found[case]["kept"][name], found[case]["exact"][name])
    _require_close(found[case]["cached"], found[case]["kept"])


# what torch imports by itself is there; nothing else is
ALONE = """
import sys
import torch, torch._dynamo, torch.distributed, torch.utils.checkpoint

class Alone:
    present = set(sys.modules) | set(sys.stdlib_module_names) | {"mlip"}
    finders = list(sys.meta_path)

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.present or name.startswith("_"):
            found = (finder.find_spec(name, path, target) for finder in self.finders)
            return next(filter(None, found), None)

assert not Alone.present & {"psutil", "transformers", "deepspeed", "yaml"}
sys.meta_path[:] = [Alone()]
import mlip.kernels.token_knowledge_patch
from mlip.kernels.info_nce import ClipLoss, patch_open_clip
image_tower, text_tower = torch.nn.Linear(6, 8), torch.nn.Linear(5, 8)
batches = [(torch.randn(8, 6), torch.randn(8, 5))]
"""


def test_every_block_of_the_page_is_run() -> None:
    run_here = {own_loops.blocks()[0], *map(own_loops.block_of, own_loops.LOOPS)}
    (other,) = set(own_loops.blocks()) - run_here
    assert "patch_open_clip()" in other  # tests/kernels/test_open_clip_patch.py


def test_losses_and_cache_need_torch_alone() -> None:
    code = ALONE + own_loops.blocks()[0] + own_loops.block_of("plain") + "print(loss.item())"
    command = [sys.executable, "-P", "-c", code]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and float(done.stdout) > 0, done.stderr[-3000:]


class _NormAndAct(nn.BatchNorm1d):
    """As timm's BatchNormAct2d: derived, with a forward pass of its own."""

    def forward(self, input: Tensor) -> Tensor:
        rows = F.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, self.training
        )
        return F.relu(rows)


@pytest.mark.parametrize(
    "norm",
    [nn.BatchNorm1d(8), nn.BatchNorm1d(8, track_running_stats=False).eval(), _NormAndAct(8)],
    ids=["plain", "without running statistics", "derived"],
)
def test_statistics_of_a_micro_batch_are_refused_however_deep_they_are(norm: nn.Module) -> None:
    net = nn.Sequential(nn.Linear(6, 8), nn.Sequential(norm))
    rows = torch.randn(8, 6)
    for function in (net, lambda x: net(x), torch.compile(net, backend="eager")):
        with pytest.raises(ValueError, match="that takes the statistics of its rows"):
            cached_forward(function, (rows,), 4)
    with pytest.raises(ValueError, match="got a batch norm that takes the statistics"):
        cached_forward(lambda x: F.batch_norm(net[0](x), None, None, training=True), (rows,), 4)
    with pytest.raises(ValueError, match="that takes the statistics of its rows"):
        cached_forward(net.requires_grad_(False), (rows,), 4)
    assert cached_forward(net, (rows,), 0).shape == (8, 8), "one pass is the whole batch"


def test_a_batch_norm_before_the_cache_and_an_instance_norm_inside_are_taken() -> None:
    before, inside = nn.BatchNorm1d(6), nn.Sequential(nn.Conv1d(2, 4, 1), nn.InstanceNorm1d(4))
    rows = before(torch.randn(8, 6)).unflatten(1, (2, 3))
    torch.testing.assert_close(cached_forward(lambda x: inside(x), (rows,), 4), inside(rows))


def test_another_thread_trains_its_batch_norm_meanwhile() -> None:
    other = nn.BatchNorm1d(6)

    def tower(x: Tensor) -> Tensor:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(other, x.detach()).result(60)
        return 2 * x

    rows = torch.randn(8, 6, requires_grad=True)
    assert torch.equal(cached_forward(tower, (rows,), 4), 2 * rows)


def test_a_compiled_tower_is_compiled_once() -> None:
    graphs = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8).eval())
    tower = torch.compile(net, backend=backend)
    for _ in range(2):
        cached_forward(tower, (torch.randn(8, 6),), 4).sum().backward()
    assert len(graphs) == 1


def test_gradients_of_gradients_and_a_second_backward_pass() -> None:
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh()).double()
    weight = next(net.parameters())
    found = []
    for micro_size in (4, 0):
        rows = torch.ones(8, 6, dtype=torch.float64).cumsum(0).div_(8).requires_grad_()
        loss = cached_forward(net, (rows,), micro_size).square().sum()
        first = torch.autograd.grad(loss, rows, retain_graph=True)[0]
        again = torch.autograd.grad(loss, rows, create_graph=True)[0]
        found.append((first, again, torch.autograd.grad(again.square().sum(), weight)[0]))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize(
    ("function", "got"),
    [
        (lambda x: {"pooled": x}, "dict"),
        (lambda x: [x], "list"),
        (lambda x: (x, None), "NoneType"),
        (lambda x: x.mean(), r"\[\]"),
        (lambda x: x.t(), r"\[6, 4\]"),
    ],
    ids=["dict", "list", "None", "no rows", "columns"],
)
def test_a_function_that_returns_no_rows_is_refused(function: Any, got: str) -> None:
    with pytest.raises(
        ValueError, match=f"each of the 4 rows of a micro-batch in front, got {got}"
    ):
        cached_forward(function, (torch.randn(8, 6),), 4)


def test_a_batch_norm_in_eval_mode_is_taken() -> None:
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8).eval())
    rows = torch.randn(8, 6)
    torch.testing.assert_close(cached_forward(net, (rows,), 4), net(rows))


def test_a_function_may_return_one_tensor_or_several() -> None:
    rows = torch.randn(8, 6, requires_grad=True)
    one = cached_forward(lambda x: 2 * x, (rows,), 4)
    first, second = cached_forward(lambda x: (2 * x, x.sum(1)), (rows,), 4)
    assert torch.equal(one, 2 * rows) and torch.equal(first, one) and second.shape == (8,)
    with torch.no_grad():
        assert torch.equal(cached_forward(lambda x: 2 * x, (rows,), 4), one)


@pytest.fixture(scope="module")
def whole_twice() -> dict[str, Tensor]:
    """What the Trainer's two epochs of one batch are held to."""
    same = [own_loops.batches()[0]] * 2
    return parameters(run("plain", 0.0, (MICRO, "micro_size=0"), batches=same)["model"])


def test_the_trainer_of_transformers_is_the_plain_loop(
    tmp_path: Path, whole_twice: dict[str, Tensor]
) -> None:
    _require_close(own_loops.by_trainer(tmp_path, 0.0), whole_twice)
    cached, kept = (own_loops.by_trainer(tmp_path, 0.3, keep=k) for k in (False, True))
    assert all(torch.equal(cached[name], value) for name, value in kept.items())


def test_the_trainer_over_two_ranks_is_one_process_on_all_pairs(
    found: Found, whole_twice: dict[str, Tensor]
) -> None:
    _require_close(found["trainer"]["exact"], whole_twice)
    _require_close(found["trainer"]["cached"], found["trainer"]["kept"])
