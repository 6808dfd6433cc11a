"""Launch the real operators on a GPU that is not there, and print what would have been launched.

Run as a script in a process without TRITON_INTERPRET: `python launch_offline.py '<json calls>'`.
Triton's driver is replaced by one that compiles for the chip that is asked for and launches
nothing: grids, argument order, pointer types, and the specialisation of every integer are those of
a real call, which a signature written by hand (compile_offline.py) only imitates. Prints one JSON
object for every kernel that a call compiled.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import torch

os.environ.pop("TRITON_INTERPRET", None)

import triton
from triton.backends.compiler import GPUTarget

from mlip.kernels._chip import chip_of
from mlip.kernels.info_nce import info_nce_loss
from mlip.kernels.info_nce import op as info_nce_op
from mlip.kernels.info_nce import triton_kernels as info_nce_kernels
from mlip.kernels.keyed_uniform import op as keyed_op
from mlip.kernels.token_knowledge_patch import (
    op,
    token_knowledge_patch_loss,
    triton_kernels,
)
from tests.kernels.compile_offline import resources
from tests.kernels.oracle import make_inputs

PROCESSORS = 132
FEATURES = ("patches", "tokens", "knowledge")


class _AbsentDriver:
    """What triton.runtime asks of a driver, for a chip of one compute capability."""

    def __init__(self, capability: int) -> None:
        self.capability = capability
        self.utils = self
        self.compiled: list[dict[str, Any]] = []

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        # a kernel keeps the target of the first call on a device: one device a chip, or a second
        # capability in one process would be compiled for the first
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        chip = chip_of(divmod(self.capability, 10), PROCESSORS)
        return {"max_shared_mem": chip.shared, "multiprocessor_count": chip.processors}

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        row = {"kernel": source.fn.__name__, "types": source.signature, "grids": []}
        self.compiled.append(row)

        def launch(x: int, y: int, z: int, *rest: Any) -> None:
            row["grids"].append([x, y, z])

        return launch

    def load_binary(self, name: str, cubin: bytes, shared: int, device: int) -> tuple[int, ...]:
        self.compiled[-1] |= resources(cubin) | {"shared": shared}
        return 0, 0, 0, 0, 1024


def install(capability: int) -> _AbsentDriver:
    driver = _AbsentDriver(capability)
    triton.runtime.driver.set_active(driver)
    op.resolve = info_nce_op.resolve = keyed_op.resolve = lambda *_: "triton"
    chip = lambda _: chip_of(divmod(capability, 10), PROCESSORS)  # noqa: E731
    op.chip_facts = triton_kernels.chip_facts = info_nce_kernels.chip_facts = chip
    return driver


def _run(call: dict[str, Any]) -> None:
    if call["op"] == "keyed_uniform":
        for word in call["words"]:
            keyed_op.splitmix_uniform(word, torch.arange(call["batch"]), call["width"])
        return
    dtype = getattr(torch, call.get("dtype", "bfloat16"))
    if call["op"] == "info_nce":
        image, text = (torch.randn(call["batch"], call["dim"], dtype=dtype) for _ in range(2))
        scale = torch.tensor(10.0, requires_grad=True)
        ids = torch.arange(call["batch"])
        image.requires_grad_()
        info_nce_loss(image, text, scale, pair_ids=ids).backward()
        return
    batch, is_masked = call["batch"], call["batch"] > 1
    inputs: dict[str, Any] = make_inputs(
        batch, batch, call["patches"], call["tokens"], call["entities"], call["dim"],
        masks=is_masked,
    )  # fmt: skip
    for name, value in inputs.items():
        if value.is_floating_point():
            wanted = dtype if name in FEATURES else torch.float32
            inputs[name] = value.to(wanted).requires_grad_()
    if call.get("learned"):
        names = ("attention_scale", "knowledge_scale", "knowledge_gain", "aggregation_scale")
        inputs |= {name: torch.tensor(5.0, requires_grad=True) for name in names}
    options = {"pooling": call["pooling"], "aggregation": call.get("aggregation", "mean")}
    token_knowledge_patch_loss(**inputs, logit_scale=10.0, **options).backward()


def main() -> None:
    torch.set_num_threads(1)
    for call in json.loads(sys.argv[1]):
        driver = install(call["capability"])
        _run(call)
        for row in driver.compiled:
            print(json.dumps(call | row), flush=True)


if __name__ == "__main__":
    main()
