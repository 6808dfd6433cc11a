"""Every kernel compiles for sm_80, sm_90 and sm_100 without a GPU, fits the chip and uses its
tensor cores.

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

from mlip.kernels._chip import TENSOR_MEMORY_COLUMNS
from mlip.kernels.token_knowledge_patch import tiling

pytest.importorskip("triton", reason="triton is not installed")

ROOT = Path(__file__).resolve().parents[2]
# CUDA programming guide, bytes a block; 86 and 120 stand for all that are made for graphics too
SHARED_LIMIT = {80: 166912, 86: 101376, 90: 232448, 100: 232448, 120: 101376}
PRODUCTS = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
KINDS = {
    ("attention", 128): ("forward", "backward_rows", "backward_patches"),
    ("attention", 256): ("forward", "gradient"),
    "context": ("forward", "turn", "backward_rows", "backward_patches"),
    "max": ("forward", "backward_rows", "backward_patches"),
}


def _json_lines(script: str, cases: list[dict[str, Any]], cache: Path) -> list[dict[str, Any]]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    # what the variable names already stays: a newer Triton is tried that way
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-P", str(Path(__file__).with_name(script)), json.dumps(cases)]
    run = subprocess.run(command, env=environment, cwd=cache, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


def compile_all(cases: list[dict[str, Any]], cache: Path) -> list[dict[str, Any]]:
    made = _json_lines("compile_offline.py", cases, cache)
    assert len(made) == len(cases)
    return made


def release(used: dict[str, Any]) -> tuple[int, int]:
    """Of the Triton that compiled: the one that PYTHONPATH names."""
    major, minor = used["triton"].split(".")[:2]
    return int(major), int(minor)


def check(used: dict[str, Any]) -> None:
    assert used["shared"] <= SHARED_LIMIT[used["capability"]], used
    assert used["tensor"] <= TENSOR_MEMORY_COLUMNS, used
    if used["op"] in ("rows", "patches"):
        # passes over the inputs alone, a hundredth of the work. Features with gaps between their
        # elements take 64-bit products of every column: two words on the stack at D = 256
        assert used["STACK"] <= (8 if used.get("strided") else 0), used
        return
    if used["op"] == "info_nce":
        # words around the loops, and with ids a dozen of the thousand instructions of D = 512
        assert used["STACK"] <= 64 and used["LDL"] <= 20, used
        assert used["WARPGROUP"] <= used["HGMMA"], used
        word = PRODUCTS[80 if used["element"] == "fp32" else used["capability"]]
        assert used[word] + used["HGMMA"] + used["UTCHMMA"] > 0, used
    elif used["element"] == "bf16":
        # numbers that no loop changes, read again: an instruction or two in a hundred
        stack, reloads = (128, 30) if used["capability"] == 80 else (16, 4)
        if release(used) >= (3, 9) and used["capability"] == 90:
            # outside the loops that a scale of usual size takes
            stack, reloads = 32, 16
        elif release(used) == (3, 7) and used["capability"] == 100:
            stack, reloads = 56, 14
        assert used["STACK"] <= stack and used["LDL"] <= reloads, used
        # two a product where ptxas makes every product wait for the one before
        assert used["WARPGROUP"] <= used["HGMMA"], used
        if (used["pooling"], used["kind"]) == ("max", "backward_rows"):
            return  # a gather
        assert used[PRODUCTS[used["capability"]]] > 0, used
    else:
        assert sum(used[word] for word in PRODUCTS.values()) > 0, used


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


POINTERS = {
    "*i32": ("index_ptr", "text_ptr", "bounds_ptr", "count_ptr"),
    "*i64": ("ids_a_ptr", "ids_b_ptr"),
    "*u8": ("mask_ptr",),
    "*i8": ("valid_ptr",),
    # of the inputs' own type: what is multiplied, and the gradients that are handed out
    "*bf16": (
        "a_ptr", "b_ptr", "x_ptr", "v_ptr", "rows_ptr", "token_ptr", "entity_ptr", "turned_ptr",
        "x_grad_ptr", "token_grad_ptr", "entity_grad_ptr", "packed_ptr", "ds_ptr", "block_ptr",
    ),
}  # fmt: skip
TENSOR_CORES = {
    "_pair_fwd_kernel", "_pair_bwd_rows_kernel", "_pair_bwd_patches_kernel", "_context_turn_kernel",
    "_similarity_gradient_kernel",
    "_context_bwd_rows_kernel", "_context_bwd_patches_kernel", "_max_bwd_patches_kernel",
    "_info_nce_fwd_kernel", "_info_nce_ds_kernel", "_info_nce_bwd_kernel",
}  # fmt: skip
MOST_PROGRAMS = (2**31 - 1, 65535, 65535)  # CUDA programming guide, of a grid's three sides


def call(pooling: str, capability: int, **more: Any) -> dict[str, Any]:
    """A forward and backward pass of the loss, masks and entities included."""
    return {
        "op": "pair",
        "pooling": pooling,
        "capability": capability,
        "batch": 32,
        "patches": 196,
        "tokens": 40,
        "entities": 6,
        "dim": 128,
    } | more


def check_launch(row: dict[str, Any]) -> None:
    assert row["shared"] <= SHARED_LIMIT[row["capability"]], row
    assert row["grids"], row
    for grid in row["grids"]:
        assert all(0 < n <= most for n, most in zip(grid, MOST_PROGRAMS, strict=True)), row
    wanted = {name: kind for kind, names in POINTERS.items() for name in names}
    if row["pooling"] == "max":
        wanted["stat_ptr"] = wanted["where_ptr"] = "*i32"
    if row["batch"] > 1:  # without masks spare pointers stand in for those that are never read
        for name, kind in row["types"].items():
            if name.endswith("_ptr"):
                assert kind == wanted.get(name, "*fp32"), (row["kernel"], name, kind)
    # where few lines of the table fit a small chip, speed is not promised
    if row["kernel"] in TENSOR_CORES and row["capability"] in PRODUCTS:
        # words that no loop changes: around InfoNCE's loop at D = 512, and see `check`
        most = 4 if row["capability"] == 90 and row["op"] == "pair" else 30
        most = max(most, 16) if release(row) >= (3, 9) else most
        assert row["STL"] <= most and row["LDL"] <= most, row
        assert row[PRODUCTS[row["capability"]]] > 0, row


def launch_all(calls: list[dict[str, Any]], cache: Path) -> list[dict[str, Any]]:
    rows = _json_lines("launch_offline.py", [{"pooling": ""} | c for c in calls], cache)
    for row in rows:
        check_launch(row)
    return rows


def test_a_real_call_launches_kernels_that_fit_the_chip(tmp_path: Path) -> None:
    """Oracle: Triton's own argument binder and ptxas; only the driver is not there."""
    calls = [call("attention", 90, learned=True, aggregation="lse", dim=dim) for dim in (128, 256)]
    calls.append({"op": "info_nce", "capability": 90, "batch": 300, "dim": 256})
    made = {row["kernel"] for row in launch_all(calls, tmp_path)}
    assert made == {
        "_aggregate_bwd_kernel", "_aggregate_fwd_kernel", "_block_rows_kernel",
        "_count_rows_kernel", "_info_nce_ds_kernel", "_info_nce_fwd_kernel", "_longest_kernel",
        "_pack_rows_kernel", "_pair_bwd_patches_kernel", "_pair_bwd_rows_kernel",
        "_pair_fwd_kernel", "_patches_bwd_kernel", "_patches_fwd_kernel", "_place_rows_kernel",
        "_pull_kernel", "_rows_bwd_kernel", "_rows_fwd_kernel", "_shift_kernel",
        "_similarity_gradient_kernel",
    }  # fmt: skip


@pytest.mark.parametrize("capability", [80, 90])
def test_keyed_draws_compile_once_whatever_the_key(capability: int, tmp_path: Path) -> None:
    words = [0x9E3779B97F4A7C15, 1 << 63, (1 << 62) + 7]  # by sign, and by divisors
    case = {"op": "keyed_uniform", "capability": capability, "batch": 100, "width": 48}
    (row,) = _json_lines("launch_offline.py", [case | {"words": words}], tmp_path)
    assert row["kernel"] == "_keyed_uniform_kernel" and len(row["grids"]) == len(words)
    assert row["types"]["index_ptr"] == "*i64" and row["types"]["out_ptr"] == "*fp64"
    assert row["types"]["word"] == "i64" and row["STACK"] == row["shared"] == 0


# thread instructions a pair of a row and a patch, P = 196, learned attention scale: tensor cores
# take 1/16 of a clock of a multiprocessor for such a pair (D = 128), four schedulers 128 a clock
MOST_INSTRUCTIONS = {
    ("attention", "forward"): 7.3,
    ("attention", "backward_rows"): 9.3,
    ("attention", "backward_patches"): 10.6,
    ("max", "forward"): 7.5,
    ("max", "backward_patches"): 9.6,
    ("context", "backward_rows"): 18.6,
}
# what newer releases may take more: 3.8 and newer add up in trees, whose first additions do not
# fuse with a product, and 3.9 waits for the asynchronous proxy before every product
MORE_INSTRUCTIONS = {(3, 6): 1.0, (3, 7): 1.02, (3, 8): 1.08, (3, 9): 1.14}


def test_the_loops_of_pair_kernels_stay_short(tmp_path: Path) -> None:
    cases = [
        pair(kind, pooling, 128, 196, 90, extra=kind == "backward_rows")
        for pooling, kind in MOST_INSTRUCTIONS
    ]
    for used in compile_all(cases, tmp_path):
        check(used)
        more = MORE_INSTRUCTIONS.get(release(used), max(MORE_INSTRUCTIONS.values()))
        most = more * MOST_INSTRUCTIONS[used["pooling"], used["kind"]]
        assert used["an_element"] <= most, used


def test_what_kernels_add_up_fits_tensor_memory(tmp_path: Path) -> None:
    """Of sm_100, whose driver refuses a kernel of more columns. Several segments a program took
    664, and Triton 3.6 could not compile the gradient of cosines."""
    cases: list[dict[str, Any]] = [
        pair("backward_rows", "attention", 128, 196, 100, extra=extra) for extra in (True, False)
    ]
    cases.append(pair("backward_patches", "max", 128, 196, 100))
    for kind in ("forward", "backward"):
        cases.append({"op": "info_nce", "kind": kind, "dim": 256, "element": "bf16"})
    for used in compile_all([case | {"capability": 100} for case in cases], tmp_path):
        check(used)
        assert used["tensor"] > 0, used
        # a learned scale's pass over rows with 3.7
        assert used["STL"] <= (14 if release(used) == (3, 7) else 0), used


# bf16 tokens at D = 128 and 256, then float32 tokens
MOST_ENTITIES = {80: (64, 32, 16, 16), 86: (64, 16, 16, 16), 90: (128, 64, 64, 16)}


@pytest.mark.parametrize("capability", MOST_ENTITIES)
def test_entities_are_bounded_by_shared_memory(capability: int) -> None:
    limit = SHARED_LIMIT[capability]
    most = [tiling.most_entities(dim, size, limit) for size in (2, 4) for dim in (128, 256)]
    assert tuple(most) == MOST_ENTITIES[capability]


@pytest.mark.long
@pytest.mark.parametrize("capability", list(SHARED_LIMIT))
def test_every_kind_of_call_launches_kernels_that_fit_the_chip(
    capability: int, tmp_path: Path
) -> None:
    calls = [call(pooling, capability, learned=True) for pooling in ("context", "max")]
    # sizes of 1 become constants of the kernel; as many entities as are allowed
    calls.append(call("attention", capability, batch=1, tokens=1, entities=1))
    calls.append(call("context", capability, batch=1, tokens=1, entities=1))
    limit = SHARED_LIMIT[capability]
    for dim in (128, 256):
        entities = tiling.most_entities(dim, 2, limit)
        calls.append(call("attention", capability, entities=entities, dim=dim))
    for batch, dim in ((1, 512), (300, 512)):
        calls.append({"op": "info_nce", "capability": capability, "batch": batch, "dim": dim})
    launch_all(calls, tmp_path)


@pytest.mark.long
def test_changing_lengths_compile_a_handful_of_kernels(tmp_path: Path) -> None:
    calls = [call("attention", 90, tokens=tokens) for tokens in range(16, 76, 3)]
    rows = launch_all(calls, tmp_path)
    for kernel in {row["kernel"] for row in rows}:
        # integers divisible by 16 or equal to 1 are specialised by Triton: not one a length
        made = {json.dumps(row["types"]) for row in rows if row["kernel"] == kernel}
        assert len([row for row in rows if row["kernel"] == kernel]) <= 6, (kernel, made)


@pytest.mark.long
@pytest.mark.parametrize("capability", list(PRODUCTS))
@pytest.mark.parametrize("dim", [128, 256])
@pytest.mark.parametrize("patches", [49, 196, 576])
def test_all_pair_kernels_compile_within_the_chip(
    capability: int, dim: int, patches: int, tmp_path: Path
) -> None:
    cases = []
    for pooling in ("attention", "context", "max"):
        for kind in KINDS.get((pooling, dim)) or KINDS[pooling]:
            cases.append(pair(kind, pooling, dim, patches, capability, extra=True))
            cases.append(pair(kind, pooling, dim, patches, capability))
    for used in compile_all(cases, tmp_path):
        check(used)


@pytest.mark.long
@pytest.mark.parametrize("capability", list(PRODUCTS))
def test_all_other_kernels_compile_within_the_chip(capability: int, tmp_path: Path) -> None:
    cases: list[dict[str, Any]] = []
    for kind in ("forward", "backward"):
        for dim, element in ((128, "bf16"), (256, "bf16"), (512, "bf16"), (128, "fp32")):
            cases.append({"op": "info_nce", "kind": kind, "dim": dim, "element": element})
    for dim in (128, 256):
        for op in ("rows", "patches"):
            for kind in ("forward", "backward"):
                cases.append({"op": op, "kind": kind, "dim": dim})
                cases.append({"op": op, "kind": kind, "dim": dim, "strided": True})
    cases = [case | {"capability": capability} for case in cases]
    for kind in KINDS["attention", 128]:
        cases.append(pair(kind, "attention", 128, 196, capability, element="fp32"))
    for used in compile_all(cases, tmp_path):
        check(used)
