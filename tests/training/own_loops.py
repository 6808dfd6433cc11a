"""What each of two ranks does with the loops that docs/losses.md prints, and what they are held to.

A loop runs two steps of plain gradient descent on tiny towers, so that parameters afterwards are
gradients: a factor, or a micro-batch that was left out, shows in every one of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mlip.training import grad_cache

PAGE = Path(__file__).resolve().parents[2] / "docs" / "losses.md"
ROWS, WORLD, MICRO = 16, 2, "micro_size=4"  # 8 pairs a rank: two micro-batches
ADAM = re.compile(r"torch\.optim\.AdamW\(model\.parameters\(\), lr=1e-4\)")
LOOPS = {
    "plain": "model = Contrast(image_tower",
    "ddp": "model = DistributedDataParallel(",
    "fsdp": "import fully_shard",
    "deepspeed": "import deepspeed",
    "trainer": "import Trainer",
}


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)


def block_of(loop: str) -> str:
    found = [block for block in blocks() if block.startswith(LOOPS[loop]) or LOOPS[loop] in block]
    return found[0]


class Tower(nn.Sequential):
    """Dropout at two depths, and layers inside of layers."""

    def __init__(self, width: int, dropout: float) -> None:
        inner = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16), nn.Dropout(dropout), nn.GELU())
        super().__init__(nn.Linear(width, 16), nn.Dropout(dropout), inner, nn.Linear(16, 8))


def towers(dropout: float) -> dict[str, Any]:
    torch.manual_seed(0)
    return {"image_tower": Tower(6, dropout), "text_tower": Tower(5, dropout)}


def batches(rank: int | None = None) -> list[tuple[Tensor, Tensor]]:
    """Two steps' pairs: a rank's share, or with None those of all."""
    generator = torch.Generator().manual_seed(1)
    rows = slice(None) if rank is None else slice(rank * ROWS // WORLD, (rank + 1) * ROWS // WORLD)
    made = []
    for _ in range(2):
        pair = [torch.randn(ROWS, width, generator=generator)[rows] for width in (6, 5)]
        made.append((pair[0], pair[1]))
    return made


def run(
    loop: str, dropout: float, *changes: tuple[str, str], keep: bool = False, **names: Any
) -> dict[str, Any]:
    """The names that the page's module and loop leave behind, by plain gradient descent.

    changes  texts of the loop and what stands there instead
    keep     every micro-batch keeps its activations: no recomputation at all
    """
    loop_code, count = ADAM.subn("torch.optim.SGD(model.parameters(), lr=0.5)", block_of(loop))
    assert count == (loop != "trainer")
    code = f"{blocks()[0]}\n{loop_code}"
    for old, new in changes:
        assert old in code, old
        code = code.replace(old, new)
    rank = dist.get_rank() if dist.is_initialized() else None
    scope: dict[str, Any] = {**towers(dropout), "batches": batches(rank), **names}
    torch.manual_seed(2 + (rank or 0))
    kept: Callable[..., Any] = lambda function, *piece, **_: function(*piece)  # noqa: E731
    with mock.patch.object(grad_cache, "checkpoint", kept if keep else grad_cache.checkpoint):
        exec(code, scope)
    return scope


def parameters(model: nn.Module) -> dict[str, Tensor]:
    """By the names that Contrast gives them, whole."""
    found = {}
    for name, parameter in model.named_parameters():
        value = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
        found[name.replace("module.", "")] = value.detach().clone()
    return found


ZERO = ('"stage": 3}', '"stage": {}, "stage3_param_persistence_threshold": 0}}')
# plain descent, and no clipping, which DeepSpeed does by default
DESCENT = '"zero_allow_untested_optimizer": True, "gradient_clipping": 0.0, "train'
UNTESTED = ('config={"train', f"config={{{DESCENT}")
PARTS = "(model.image_tower, model.text_tower, model)"
NESTED = "(model.image_tower[2], model.image_tower, model.text_tower[2], model.text_tower, model)"
DEEPER = (
    "cached_forward(self.image_tower, (images,)",
    "cached_forward(lambda x: F.normalize(self.image_tower(x), dim=-1), (images,)",
)
FIXED = ("nn.Parameter(torch.full((1,), 2.66))", "torch.full((1,), 2.66)")
APART = (
    "DistributedDataParallel(Contrast(image_tower, text_tower, micro_size=4))",
    "Contrast(*map(DistributedDataParallel, (image_tower, text_tower)), micro_size=4)",
)
HALF = "part, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16)"
CASES: dict[str, tuple[Any, ...]] = {
    "ddp": ("ddp",),
    "ddp static": ("ddp", (f"{MICRO}))", f"{MICRO}), static_graph=True)")),
    "ddp unused": ("ddp", (f"{MICRO}))", f"{MICRO}), find_unused_parameters=True)")),
    "ddp towers": ("ddp", APART, FIXED),
    "fsdp": ("fsdp",),
    "fsdp bf16": (
        "fsdp",
        (PARTS, NESTED),
        DEEPER,
        ("import fully_shard", "import MixedPrecisionPolicy, fully_shard"),
        ("fully_shard(part)", f"fully_shard({HALF})"),
    ),
    "fsdp nested": ("fsdp", (PARTS, NESTED)),
    "fsdp nested, deeper": ("fsdp", (PARTS, NESTED), DEEPER),
    **{
        f"zero {stage}": ("deepspeed", (ZERO[0], ZERO[1].format(stage)), UNTESTED)
        for stage in range(4)
    },
    "zero 3, deeper": ("deepspeed", (ZERO[0], ZERO[1].format(3)), UNTESTED, DEEPER),
}
AROUND = ("ddp", ("model(images, texts)", "model.module(images, texts)"))  # what must not be done
RUNS = {"exact": (0.0, False), "cached": (0.3, False), "kept": (0.3, True)}


def by_trainer(folder: Path, dropout: float, keep: bool = False) -> dict[str, Tensor]:
    """Two epochs of one batch: in whatever order the Trainer reads, it holds every pair."""
    import transformers

    images, texts = batches()[0]
    share = ROWS // (dist.get_world_size() if dist.is_initialized() else 1)
    plain = transformers.TrainingArguments

    def descent(_: str, **given: Any) -> Any:
        ours = {"optim": "sgd", "learning_rate": 0.5, "lr_scheduler_type": "constant"}
        quiet = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
        whole = {"max_grad_norm": 0.0, "num_train_epochs": 2, "per_device_train_batch_size": share}
        return plain(str(folder / "out"), **{**given, **ours, **quiet, **whole})

    rows = [{"images": i, "texts": t} for i, t in zip(images, texts, strict=True)]
    with mock.patch.object(transformers, "TrainingArguments", descent):
        scope = run("trainer", dropout, keep=keep, dataset=rows)
    assert scope["trainer"].state.global_step == 2
    return parameters(scope["trainer"].model)


def found_by(case: str, dropout: float, keep: bool) -> dict[str, Tensor]:
    scope = run(CASES[case][0], dropout, *CASES[case][1:], keep=keep)
    if "engine" not in scope:
        return parameters(scope["model"])
    import deepspeed

    model = scope["engine"].module
    is_cut = "zero 3" in case
    with deepspeed.zero.GatheredParameters(list(model.parameters()) if is_cut else []):
        return parameters(model)


def run_cases(folder: str) -> None:
    """Every case in every way of RUNS; rank 0 writes the parameters that each ends with."""
    import deepspeed.ops

    # an extension for inference that would be compiled for half a minute
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    dist.init_process_group("gloo")
    found = {case: {way: found_by(case, *given) for way, given in RUNS.items()} for case in CASES}
    found["around"] = {"exact": parameters(run(AROUND[0], 0.0, AROUND[1])["model"])}
    # last: it may change what the process is
    found["trainer"] = {way: by_trainer(Path(folder), *given) for way, given in RUNS.items()}
    if dist.get_rank() == 0:
        torch.save(found, Path(folder) / "found.pt")
    dist.barrier()
