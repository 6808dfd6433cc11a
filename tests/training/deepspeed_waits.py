"""What one rank finds of the waits in a step under DeepSpeed, whose timers start with the third.

In a process of its own, which has the process group and DeepSpeed's accelerator to itself.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.training.exact_step import PROGRESS, exact_engine, make_batch
from tests.virtual_gpu import virtual_gpu


def find_waits(stages: list[int], out: str) -> None:
    """Stage -> the waits of its third step, one that counts, and whether a bad one was skipped."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    from deepspeed.accelerator import get_accelerator

    found: dict[str, Any] = {}
    with virtual_gpu() as gpu, pytest.MonkeyPatch.context() as patch:
        for name in ("current_device_name", "device_name"):
            patch.setattr(get_accelerator(), name, lambda index=None: "cuda:0")
        # that of a CPU, which is what DeepSpeed takes this machine for, does nothing
        patch.setattr(get_accelerator(), "synchronize", lambda index=None: gpu.wait("synchronize"))
        for stage in stages:
            engine = exact_engine(8, engine="deepspeed", stage=stage)
            for number in range(3):
                batch = make_batch(number, 8).to("cuda")
                gpu.waits.clear()
                result = engine.start_step(batch, step=number, progress=PROGRESS, lr=0.01).result()
            waits = list(gpu.waits)
            bad = make_batch(3, 8).to("cuda")
            object.__setattr__(bad, "image", bad.image * torch.nan)
            skipped = engine.start_step(bad, step=3, progress=PROGRESS, lr=0.01).result().is_skipped
            found[str(stage)] = {
                "waits": waits, "is_skipped": [result.is_skipped, skipped], "engine": engine.name,
            }  # fmt: skip
    Path(out).write_text(json.dumps(found), encoding="utf-8")
