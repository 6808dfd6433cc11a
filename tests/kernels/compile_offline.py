"""Compile kernels for sm_80 to sm_120 with Triton's own ptxas, no GPU, and print what they use.

Run as a script in a process without TRITON_INTERPRET: `python compile_offline.py '<json cases>'`
prints one JSON object a case. Triton compiles a tile that no chip can hold without a word, so the
test that reads this asserts shared memory, spills and tensor-core instructions itself.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

BIG_STRIDES = ("stride_rm", "stride_part", "stride_sm", "stride_ds", "stride_gm", "columns")


def _compile(kernel: Any, types: dict[str, str], constants: dict[str, Any], case: dict[str, Any]):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(inspect.signature(kernel.fn).parameters)
    signature = {n: "constexpr" if n in constants else types[n] for n in names}
    # torch allocations are 16-byte aligned and strides multiples of 16, as at a real launch
    attributes = {
        (names.index(n),): [["tt.divisibility", 16]]
        for n in names
        if n not in constants and (signature[n].startswith("*") or n in BIG_STRIDES)
    }
    return triton.compile(
        ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes),
        target=GPUTarget("cuda", case["capability"], 32),
        options={"num_warps": case["warps"], "num_stages": case["stages"]},
    )


def product_loops(assembly: str) -> list[int]:
    """Instructions of every innermost loop with a tensor-core product, in the order of the code."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    for line in assembly.splitlines():
        if label := re.match(r"\s*(\.L_\S+):", line):
            labels[label[1]] = len(instructions)
        elif found := re.match(r"\s*/\*[0-9a-f]{4,5}\*/\s+(.*?);", line):
            instructions.append(found[1])
            jump = re.search(r"\bBRA\b.*`\((\.L_\S+)\)", found[1])
            if jump and jump[1] in labels:
                loops.append((labels[jump[1]], len(instructions)))
    inner = [a for a in loops if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    return [
        last - first
        for first, last in sorted(inner)
        if any("MMA" in text for text in instructions[first:last])
    ]


def resources(cubin: bytes) -> dict[str, Any]:
    """Registers, stack, loops and instructions that tell spills and tensor cores, of a cubin."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def run(tool: str, *options: str) -> str:
            command = [str(tools / tool), *options, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage, assembly = run("cuobjdump", "--dump-resource-usage"), run("nvdisasm")
    out: dict[str, Any] = {k: int(v) for k, v in re.findall(r"\b(REG|STACK):(\d+)", usage)}
    # UTCHMMA: of sm_100, into tensor memory
    for word in ("HGMMA", "HMMA", "UTCHMMA", "LDGSTS", "STL", "LDL", "WARPGROUP"):
        out[word] = len(re.findall(rf"\b{word}\b", assembly))
    out["loops"] = product_loops(assembly)
    out["triton"] = triton.__version__  # whose counts they are: PYTHONPATH may name another
    return out


def _types(kernel: Any, element: str, pooling: str) -> dict[str, str]:
    types = {}
    for name in inspect.signature(kernel.fn).parameters:
        if name in ("rows_ptr", "v_ptr", "turned_ptr", "x_ptr", "token_ptr", "entity_ptr"):
            types[name] = f"*{element}"
        elif name in ("a_ptr", "b_ptr", "ds_ptr"):
            types[name] = f"*{element}"
        elif name in ("index_ptr", "bounds_ptr", "text_ptr", "where_ptr", "count_ptr"):
            types[name] = "*i32"
        elif name == "stat_ptr":
            types[name] = "*i32" if pooling == "max" else "*fp32"
        elif name == "ids_a_ptr" or name == "ids_b_ptr":
            types[name] = "*i64"
        elif name == "mask_ptr":
            types[name] = "*u8"
        elif name.endswith("_ptr"):
            types[name] = "*fp32"
        else:
            types[name] = "i32"
    return types


def _pair_case(case: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    from mlip.kernels._chip import chip_of
    from mlip.kernels.token_knowledge_patch import (
        backward_triton_kernels,
        context_triton_kernels,
        forward_triton_kernels,
        max_triton_kernels,
        products_triton_kernels,
    )
    from mlip.kernels.token_knowledge_patch.tiling import (
        block_dim,
        choose_tiling,
        padded_patches,
    )

    kind, pooling, dim = case["kind"], case["pooling"], case["dim"]
    size = 2 if case["element"] == "bf16" else 4
    chip = chip_of(divmod(case["capability"], 10), 132)
    shape = {
        "DIM": dim,
        "BLOCK_D": block_dim(dim),
        "PRECISION": "ieee" if size == 2 else "tf32x3",
        "UPCAST": False,
    }
    tiling = choose_tiling(kind, case["patches"], block_dim(dim), size, chip, pooling)
    constants: dict[str, Any] = (
        shape | {"P_PAD": padded_patches(case["patches"])} | tiling.keywords()
    )
    case["warps"], case["stages"] = constants.pop("num_warps"), constants.pop("num_stages")
    if kind == "forward":
        constants["POOLING"] = pooling
        return forward_triton_kernels._pair_fwd_kernel, constants
    if kind == "turn":
        return context_triton_kernels._context_turn_kernel, constants
    if kind == "gradient":
        constants["WANT_ALPHA"] = case.get("extra", False)
        del constants["SEG1"], constants["SEG2"]  # one segment
        return products_triton_kernels._similarity_gradient_kernel, constants
    flag = "WANT_ALPHA" if kind == "backward_rows" else "ACCUMULATE"
    constants[flag] = case.get("extra", False)
    module, prefix = {
        "attention": (backward_triton_kernels, "_pair_bwd"),
        "context": (context_triton_kernels, "_context_bwd"),
        "max": (max_triton_kernels, "_max_bwd"),
    }[pooling]
    side = "rows" if kind == "backward_rows" else "patches"
    kernel = getattr(module, f"{prefix}_{side}_kernel")
    names = inspect.signature(kernel.fn).parameters
    return kernel, {n: constants[n] for n in constants if n in names}


def _info_nce_case(case: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    from mlip.kernels._chip import chip_of
    from mlip.kernels.info_nce import triton_kernels

    chip = chip_of(divmod(case["capability"], 10), 132)
    dim, size = case["dim"], 2 if case["element"] == "bf16" else 4
    constants: dict[str, Any] = {
        "DIM": dim,
        "HAS_IDS": True,
        "PRECISION": "ieee" if size == 2 else "tf32x3",
        "UPCAST": False,
    }
    if case["kind"] == "forward":
        constants["SHARES"] = triton_kernels.LENGTH_SHARES
        tiling = triton_kernels.forward_tiling(dim, size, chip)
        return triton_kernels._info_nce_fwd_kernel, constants | tiling
    constants["WANT_SCALE"] = True
    if size == 2:
        del constants["PRECISION"]
        tiling = triton_kernels.ds_tiling(dim, chip)
        tiling.pop("maxnreg", None)  # an option of real launches alone: see launch_offline.py
        return triton_kernels._info_nce_ds_kernel, constants | tiling
    constants["BLOCK_D"] = max(16, dim)
    return triton_kernels._info_nce_bwd_kernel, constants | triton_kernels.backward_tiling()


def _rows_case(case: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    from mlip.kernels.token_knowledge_patch import rows_triton_kernels as module

    dim = case["dim"]
    # a real launch makes constants of strides that are 1: the usual case, features without a gap
    unit = ("stride_td", "stride_ed") if case["op"] == "rows" else ("stride_xd",)
    constants: dict[str, Any] = {} if case.get("strided") else dict.fromkeys(unit, 1)
    if case["op"] == "patches":
        constants |= {
            "P_PAD": 208,
            "DIM": dim,
            "BLOCK_D": dim,
            "BLOCK_P": 16,
            "HAS_MASK": True,
            "num_warps": 4,
        }
        side = "fwd" if case["kind"] == "forward" else "bwd"
        return getattr(module, f"_patches_{side}_kernel"), constants
    constants |= {
        "DIM": dim,
        "BLOCK_D": dim,
        "BLOCK_T": 16,
        "BLOCK_K": 16,
        "HAS_WEIGHT": True,
        "HAS_MASK": True,
        "HAS_ENTITY": True,
        "PRECISION": "tf32",
        "num_warps": 8,
        "num_stages": 1,
    }
    side = "fwd" if case["kind"] == "forward" else "bwd"
    return getattr(module, f"_rows_{side}_kernel"), constants


def main() -> None:
    os.environ.pop("TRITON_INTERPRET", None)
    makers = {
        "pair": _pair_case,
        "info_nce": _info_nce_case,
        "rows": _rows_case,
        "patches": _rows_case,
    }
    for case in json.loads(sys.argv[1]):
        case = {"op": "pair", "element": "bf16", "pooling": "attention"} | case
        kernel, constants = makers[case["op"]](case)
        case["warps"] = constants.pop("num_warps", case.get("warps"))
        case["stages"] = constants.pop("num_stages", case.get("stages", 2))
        types = _types(kernel, case["element"], case["pooling"])
        compiled = _compile(kernel, types, constants, case)
        used = resources(compiled.asm["cubin"]) | {"shared": compiled.metadata.shared}
        used["tensor"] = compiled.metadata.tmem_size
        if "BLOCK_R" in constants and used["loops"]:
            # of the shortest loop, which an attention scale of usual size takes (Triton 3.8 and
            # newer put it last): thread instructions for every pair of a row and a real patch
            pairs = constants["BLOCK_R"] * case["patches"] / constants["TILES"]
            used["an_element"] = round(min(used["loops"]) * 32 * case["warps"] / pairs, 2)
        print(json.dumps(case | used), flush=True)


if __name__ == "__main__":
    main()
