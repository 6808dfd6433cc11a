"""A run on the virtual GPU: nothing is left on the host, and the numbers are the CPU's.

Both compute on the CPU, in one order. To the last bits: vectorised sums begin where memory lies.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

import train
from mlip.dataloading.manifest import load_manifest
from mlip.dataloading.pipelines.torch_pipeline import TorchPipeline
from mlip.losses import context
from mlip.settings.config import load
from mlip.transfer.fits.protocol import transfer_run
from tests import rank_farm
from tests.own_process import leave_the_process_as_it_was  # noqa: F401
from tests.small_run import small_run, with_val
from tests.test_train import TINY
from tests.training.deepspeed_waits import find_waits
from tests.training.exact_step import PROGRESS, exact_engine, make_batch
from tests.transfer.fits import test_learning
from tests.virtual_gpu import GPU, ROOT, virtual_gpu

EVERYTHING = (
    "train.precision=bf16",
    "train.optimizer=muon",
    "train.zero_stage=0",
    "train.ema_decay=0.9",
    "train.spike_factor=3.0",
    "run.deterministic=true",
    "batch.micro_images=3",
    "batch.micro_texts=3",
    "model.text.packed=true",
    "loss.local_alignment.token_weights=attention",
)


@pytest.fixture(autouse=True)
def _restore_determinism() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)


def _overrides(folder: Path, *more: str) -> list[str]:
    settings = [s for s in (*small_run().settings, *TINY) if not s.startswith("run.dir")]
    if "model.vision.kind=vit" in more:  # options of one kind of tower are none of the other's
        settings = [s for s in settings if not s.startswith("model.vision")]
    return [*settings, "train.max_steps=2", "train.checkpoint_steps=1",
            f"run.dir={folder}", *more]  # fmt: skip


def _losses(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: e[k] for k in ("step", "total", "grad_norm")} | e["terms"] for e in lines]


Plant = Callable[[torch.Tensor, nn.Module], Any]
NOTHING = contextlib.nullcontext()
PLANTS: dict[str, tuple[type[Exception], Plant]] = {
    "a sum with a host tensor": (RuntimeError, lambda x, layer: x + torch.ones(3, 4)),
    "a layer on a host tensor": (RuntimeError, lambda x, layer: layer(torch.ones(3, 4))),
    "joined with a host tensor": (RuntimeError, lambda x, layer: torch.cat([x, torch.ones(1, 4)])),
    "looked up with host indices": (
        RuntimeError,
        lambda x, layer: nn.functional.embedding(torch.tensor([1]), x),
    ),
    "gathered with host indices": (
        RuntimeError,
        lambda x, layer: x.gather(1, torch.zeros(3, 1, dtype=torch.int64)),
    ),
    "read by NumPy": (TypeError, lambda x, layer: x.numpy()),
    "pinned": (RuntimeError, lambda x, layer: x.pin_memory()),
    "a host generator": (
        RuntimeError,
        lambda x, layer: torch.randn(2, device="cuda", generator=torch.Generator()),
    ),
}


@pytest.mark.parametrize("mistake", PLANTS)
def test_the_virtual_gpu_refuses_what_a_gpu_refuses(mistake: str) -> None:
    error, plant = PLANTS[mistake]
    with virtual_gpu():
        x, layer = torch.randn(3, 4, device="cuda"), nn.Linear(4, 5).to("cuda")
        with pytest.raises(error, match="same device|numpy|pin|generator"):
            plant(x, layer)
    assert torch.ones(1).device.type == "cpu" and not torch.cuda.is_available()


def _resized(mode: str) -> Plant:
    return lambda x, layer: F.interpolate(x[None, None], scale_factor=2, mode=mode).sum().backward()


@pytest.mark.parametrize(
    ("sum_of", "is_refused"),
    [
        (_resized("bicubic"), True),
        (_resized("nearest"), False),
        (lambda x, layer: x.cumsum(dim=1), True),
        (lambda x, layer: x.long().cumsum(dim=1), False),
        (lambda x, layer: x.median(dim=1), True),
        (lambda x, layer: F.adaptive_avg_pool2d(x[None], 2).sum().backward(), True),
    ],
    ids=["bicubic", "nearest", "running sum", "of integers", "median", "pooling"],
)
def test_a_sum_in_any_order_is_refused_where_determinism_is_asked_for(
    sum_of: Plant, is_refused: bool
) -> None:
    with virtual_gpu():
        x, layer = torch.randn(3, 4, device="cuda", requires_grad=True), nn.Linear(4, 5)
        sum_of(x, layer)  # nobody asked
        torch.use_deterministic_algorithms(True)
        expected = pytest.raises(RuntimeError, match="deterministic") if is_refused else NOTHING
        with expected:
            sum_of(x, layer)


def test_the_virtual_gpu_allows_what_a_gpu_allows_and_notes_what_makes_the_host_wait() -> None:
    with virtual_gpu() as gpu:
        layer = nn.Linear(4, 5).to("cuda")
        x = torch.ones(3, 4).pin_memory().to("cuda", non_blocking=True)
        gpu.waits.clear()
        out = (layer(x)[torch.tensor([0, 2])] * torch.tensor(2.0)).sum()
        out.backward()
        optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
        optimizer.step()
        assert layer.weight.is_cuda and layer.weight.grad is not None and layer.weight.grad.is_cuda
        assert {v.device.type for v in optimizer.state[layer.weight].values()} == {"cuda"}
        assert gpu.waits == []
        assert out.item() == out.detach().cpu().numpy()
        assert len(gpu.waits) == 2


def test_a_run_and_its_evaluation_are_the_cpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images come as DALI leaves them, on the GPU."""
    fewer = ("evaluate.bootstrap=10", "run.deterministic=true")
    with monkeypatch.context() as only_training:
        only_training.setattr(train, "evaluate", lambda config, corpus: None)
        assert train.main(_overrides(tmp_path / "cpu", *fewer)) == 0
    with virtual_gpu() as gpu:
        load = TorchPipeline.load

        def load_to_gpu(self: TorchPipeline, plan: Any) -> Any:
            images = load(self, plan)
            images.image = gpu.put(images.image.clone(), GPU)
            return images

        monkeypatch.setattr(TorchPipeline, "load", load_to_gpu)
        assert train.main(_overrides(tmp_path / "gpu", *fewer)) == 0
    for a, b in zip(_losses(tmp_path / "gpu"), _losses(tmp_path / "cpu"), strict=True):
        assert a == pytest.approx(b, rel=1e-5)
    assert json.loads((tmp_path / "gpu" / "results.json").read_text())["run"]["step"] == 2
    assert (tmp_path / "gpu" / "report.html").is_file()
    # whether a step counts is known on the GPU alone; its numbers travel while the next one runs
    lines = [wait for wait in gpu.waits if wait.startswith(("mlip/training/step", "mlip/l",
                    "mlip/enc", "mlip/obj", "mlip/model", "mlip/div", "mlip/training/engine",
                    "mlip/training/plain", "mlip/training/deepspeed", "mlip/training/ema",
                    "mlip/host", "mlip/batch", "kernels")) and ":state" not in wait]  # fmt: skip
    assert lines == []


def test_val_is_watched_on_it_as_on_a_cpu(tmp_path: Path) -> None:
    """Packed reports, the gradient cache and all; oracle: the scores that a CPU finds."""
    watched = [*with_val(tmp_path, 12), "train.monitor=loss", *EVERYTHING]
    watched += ["model.vision.norm=group", "train.precision=fp32", "evaluate.after_training=false"]
    assert train.main(_overrides(tmp_path / "cpu", *watched)) == 0
    with virtual_gpu():
        assert train.main(_overrides(tmp_path / "gpu", *watched)) == 0
    on_gpu, on_cpu = (
        [json.loads(line) for line in (tmp_path / place / "validation.jsonl").open()]
        for place in ("gpu", "cpu")
    )
    assert [look["step"] for look in on_cpu] == [1, 2]
    for found, wanted in zip(on_gpu, on_cpu, strict=True):
        scores = {k: v for k, v in wanted.items() if isinstance(v, float) and k != "time"}
        assert len(scores) == 5  # total, two losses, two recalls
        assert {k: found[k] for k in scores} == pytest.approx(scores, rel=1e-5)
        assert all(found[k] == wanted[k] for k in ("step", "pairs", "best_step"))


def _two_equal_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Collectives as if another rank held the same."""

    def all_gather(parts: list[torch.Tensor], x: torch.Tensor, group: Any = None) -> None:
        for part in parts:
            part.copy_(x)

    def all_reduce(x: torch.Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None) -> None:
        x.mul_(2 if op == dist.ReduceOp.SUM else 1)

    replaced: dict[str, Any] = {
        "is_initialized": lambda: True,
        "get_world_size": lambda group=None: 2,
        "get_rank": lambda group=None: 0,
        "get_backend_config": lambda group=None: "cpu:gloo,cuda:nccl",
        "all_gather": all_gather,
        "all_gather_into_tensor": lambda out, x, group=None: out.copy_(torch.cat([x, x])),
        "all_reduce": all_reduce,
        "reduce_scatter_tensor": lambda out, x, group=None: out.copy_(2 * x[: len(out)]),
        "broadcast": lambda x, src: None,
    }
    for name, value in replaced.items():
        monkeypatch.setattr(dist, name, value)
    monkeypatch.setattr(context, "world_group", object)


@pytest.mark.parametrize("packed", ["false", "true"])
def test_each_of_two_gpus_waits_where_the_page_says_and_nowhere_else(
    packed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the table of docs/performance.md; all losses, the gradient cache and a full queue."""
    _two_equal_ranks(monkeypatch)
    with virtual_gpu() as gpu:
        engine = exact_engine(8, passes=2, more=(f"model.text.packed={packed}",))
        for number in range(2):
            batch = make_batch(number, 8).to("cuda")
            gpu.waits.clear()
            result = engine.start_step(batch, step=number, progress=PROGRESS, lr=0.01).result()
    assert not result.is_skipped
    page = (ROOT / "docs/performance.md").read_text(encoding="utf-8")
    told = re.findall(r"^\| `(\w+\.py)`.* \| (?:every step|several ranks) \|", page, re.MULTILINE)
    assert gpu.waits == told == []


def test_under_deepspeed_stages_1_and_2_wait_for_nothing_and_skip_on_the_gpu(
    tmp_path: Path,
) -> None:
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    if torch.version.cuda is not None:
        pytest.skip("the virtual GPU needs a CPU build of torch")
    out = tmp_path / "found.json"
    rank_farm.run(find_waits, 1, [1, 2], str(out))
    found = json.loads(out.read_text(encoding="utf-8"))
    for stage in ("1", "2"):
        assert found[stage] == {"waits": [], "is_skipped": [False, True], "engine": "deepspeed"}


TASKS = {
    "segmentation": ("transfer.task=segmentation", "transfer.columns.mask=mask"),
    "boxes": ("transfer.task=detection", "transfer.columns.boxes=boxes"),
    "objects": (
        *("transfer.task=detection", "transfer.columns.boxes=boxes"),
        *("transfer.box_loss=objects", "transfer.augment=false"),
    ),
    "labels": ("transfer.task=classification", "transfer.classes={thing: zero}"),
    "probe": (
        *("transfer.task=classification", "transfer.classes={thing: zero}"),
        "transfer.encoder=frozen",
    ),
}


@pytest.mark.parametrize("task", TASKS)
def test_every_trained_task_of_the_transfer_runs_on_it(task: str) -> None:
    settings = [*test_learning.SETTINGS, f"data.manifest={test_learning._manifest()}"]
    config = load([], [*settings, *TASKS[task], "transfer.epochs=1", "evaluate.bootstrap=2"])
    with virtual_gpu():
        results = transfer_run(config, load_manifest(config.data), None, device="cuda")
    assert results["fractions"][0]["scores"] and results["run"]["device"] == "cuda"


VIT = (
    "model.vision.kind=vit",
    "model.vision.options={hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, "
    "intermediate_size: 32}",
)


@pytest.mark.parametrize("tower", [("model.vision.norm=group",), VIT], ids=["resnet", "vit"])
def test_a_gpu_goes_on_from_the_checkpoint_of_a_cpu_with_every_setting_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tower: tuple[str, ...]
) -> None:
    monkeypatch.setattr(train, "evaluate", lambda config, corpus: None)
    whole, parts = tmp_path / "cpu", tmp_path / "gpu"
    assert train.main(_overrides(whole, *EVERYTHING, *tower)) == 0
    shutil.copytree(whole, parts)
    shutil.rmtree(parts / "checkpoints" / "step_00000002")
    (parts / "log.jsonl").unlink()
    with virtual_gpu():
        assert train.main(_overrides(parts, *EVERYTHING, *tower)) == 0
    (made,), (_, expected) = _losses(parts), _losses(whole)
    # the loss of the CPU's weights, in bfloat16; Muon's direction comes after it
    assert made == pytest.approx(expected, rel=1e-2)
