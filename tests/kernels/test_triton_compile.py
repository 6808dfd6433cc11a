"""Every kernel compiles for sm_80 and sm_90 without a GPU, fits the chip and uses its tensor cores.

Oracle: what ptxas and the disassembler of Triton's own wheel report about the machine code.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed")

ROOT = Path(__file__).resolve().parents[2]
SHARED_LIMIT = {80: 166912, 90: 232448}  # CUDA programming guide, bytes a block
KINDS = ("forward", "backward_rows", "backward_patches")


def compile_all(cases: list[dict[str, Any]], cache: Path) -> list[dict[str, Any]]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)}
    script = Path(__file__).with_name("compile_offline.py")
    command = [sys.executable, "-P", str(script), json.dumps(cases)]
    run = subprocess.run(command, env=environment, cwd=cache, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    made = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(made) == len(cases)
    return made


def check(used: dict[str, Any]) -> None:
    assert used["shared"] <= SHARED_LIMIT[used["capability"]], used
    if used["op"] in ("rows", "patches"):
        # passes over the inputs alone, a hundredth of the work: a few spilled words at D = 256
        assert used["STACK"] <= 128, used
        return
    if used["element"] == "bf16":
        assert used["STACK"] == 0 and used["STL"] == 0 and used["LDL"] == 0, used
        word = "HGMMA" if used["capability"] == 90 else "HMMA"
        assert used[word] > 0, used
    else:
        assert used["HGMMA"] + used["HMMA"] > 0, used


def pair(kind: str, pooling: str, dim: int, patches: int, capability: int, **more: Any):
    return {
        "op": "pair",
        "kind": kind,
        "pooling": pooling,
        "dim": dim,
        "patches": patches,
        "capability": capability,
        "element": "bf16",
    } | more


def test_representative_kernels_compile_within_the_chip(tmp_path: Path) -> None:
    cases = [pair(kind, "attention", 128, 196, 90, extra=True) for kind in KINDS]
    cases.append(pair("forward", "attention", 256, 196, 90, shift=True))
    cases.append(pair("backward_patches", "attention", 256, 196, 80))
    cases.append(pair("turn", "context", 128, 49, 90))
    cases.append({"op": "info_nce", "kind": "forward", "dim": 512, "capability": 90})
    cases.append({"op": "info_nce", "kind": "backward", "dim": 512, "capability": 90})
    cases.append({"op": "rows", "kind": "backward", "dim": 128, "capability": 90})
    for used in compile_all(cases, tmp_path):
        check(used)


@pytest.mark.long
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dim", [128, 256])
@pytest.mark.parametrize("patches", [49, 196, 576])
def test_all_pair_kernels_compile_within_the_chip(
    capability: int, dim: int, patches: int, tmp_path: Path
) -> None:
    cases = []
    for pooling in ("attention", "context", "max"):
        kinds = (*KINDS, "turn") if pooling == "context" else KINDS
        for kind in kinds:
            cases.append(pair(kind, pooling, dim, patches, capability, extra=True, shift=True))
            cases.append(pair(kind, pooling, dim, patches, capability))
    for used in compile_all(cases, tmp_path):
        check(used)


@pytest.mark.long
@pytest.mark.parametrize("capability", [80, 90])
def test_all_other_kernels_compile_within_the_chip(capability: int, tmp_path: Path) -> None:
    cases: list[dict[str, Any]] = []
    for kind in ("forward", "backward"):
        for dim, element in ((128, "bf16"), (256, "bf16"), (512, "bf16"), (128, "fp32")):
            cases.append({"op": "info_nce", "kind": kind, "dim": dim, "element": element})
    for dim in (128, 256):
        for op in ("rows", "patches"):
            for kind in ("forward", "backward"):
                cases.append({"op": op, "kind": kind, "dim": dim})
    cases = [case | {"capability": capability} for case in cases]
    for kind in KINDS:
        cases.append(pair(kind, "attention", 128, 196, capability, element="fp32"))
    for used in compile_all(cases, tmp_path):
        check(used)
