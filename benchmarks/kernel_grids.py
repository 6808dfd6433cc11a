"""Which rows bench_kernels.py makes: the short grid of the README's table, and the whole one."""

from __future__ import annotations

from typing import Any

Case = dict[str, Any]
ATTENTION = ["fused", "compile_bf16", "compile_fp32", "eager_fp32"]
ATTENTION += ["chunked", "chunked_analytic"]


def similarity(batch: int, tokens: int, patches: int, dim: int, **more: Any) -> Case:
    return {
        "op": "token_knowledge_patch",
        "batch": batch,
        "tokens": tokens,
        "patches": patches,
        "dim": dim,
        "pooling": "attention",
        "alpha": 10.0,
        "fill": 1.0,
        "learned": False,  # whether the attention scale is on the device, with a gradient
    } | more


def flat_product(batch: int, tokens: int, patches: int, dim: int) -> Case:
    """All rows by all patches in one product: what no way of making similarities can beat."""
    sizes = {"batch": batch, "tokens": tokens, "patches": patches, "dim": dim}
    return {"op": "flat_product"} | sizes


def short_grid(device: str) -> list[Case]:
    """The rows of the README's table, most telling first."""
    cases: list[Case] = []

    def add(case: Case, names: list[str]) -> None:
        cases.extend(case | {"provider": name, "device": device} for name in names)

    if device != "cuda":
        for batch in (32, 64):
            demo = similarity(batch, 64, 64, 128)
            add(demo, ["torch", "eager_fp32"])
            add(demo | {"fill": 0.5}, ["torch"])
        add(similarity(32, 64, 64, 128, pooling="max"), ["torch", "eager_fp32"])
        add(similarity(32, 64, 64, 128, pooling="context"), ["torch", "gloria_loop"])
        for batch in (2048, 4096):
            add({"op": "info_nce", "batch": batch, "dim": 512}, ["torch", "eager_fp32"])
        return cases
    add(similarity(256, 112, 196, 128), ["fused", "compile_bf16", "compile_fp32", "eager_fp32"])
    add(similarity(256, 112, 196, 128, fill=0.5), ["fused"])
    add(similarity(256, 112, 196, 256), ["fused", "compile_bf16"])
    add(similarity(256, 64, 196, 128), ["fused"])
    add(flat_product(256, 64, 196, 128), ["bf16", "fp32"])
    add(similarity(256, 64, 196, 128, pooling="max"), ["fused", "late_interaction_kernels"])
    add({"op": "info_nce", "batch": 65536, "dim": 512}, ["fused", "inf_cl"])
    add({"op": "info_nce", "batch": 16384, "dim": 512}, ["fused", "eager_bf16"])
    add(similarity(256, 112, 196, 128), ["chunked", "chunked_analytic"])
    add(similarity(256, 112, 196, 128, learned=True), ["fused"])
    add(similarity(1024, 112, 196, 128), ["fused"])
    add(similarity(256, 64, 196, 128, pooling="context"), ["fused", "compile_bf16"])
    add(similarity(64, 64, 196, 128), ["fused", "compile_bf16", "gloria_loop"])
    add(similarity(4096, 112, 196, 128), ["fused"])
    return cases


def full_grid(device: str) -> list[Case]:
    cases: list[Case] = []
    shapes = ((32, 49, 128), (64, 196, 128), (77, 196, 256), (112, 196, 256), (128, 576, 256))
    for batch in (32, 64, 128, 256, 512, 1024, 2048, 4096):
        for tokens, patches, dim in shapes:
            for fill in (1.0, 0.5, 0.25):
                base = similarity(batch, tokens, patches, dim, fill=fill, device=device)
                cases += [base | {"provider": name} for name in ATTENTION]
            base = flat_product(batch, tokens, patches, dim) | {"device": device}
            cases += [base | {"provider": name} for name in ("bf16", "fp32")]
            base = similarity(batch, tokens, patches, dim, device=device)
            context = base | {"pooling": "context"}
            cases += [context | {"provider": n} for n in ("fused", "compile_bf16", "gloria_loop")]
            best = base | {"pooling": "max"}
            names = ("fused", "compile_bf16", "late_interaction_kernels")
            cases += [best | {"provider": n} for n in names]
    for batch in (4096, 16384, 65536, 262144):
        base = {"op": "info_nce", "batch": batch, "dim": 512, "device": device}
        cases += [base | {"provider": n} for n in ("fused", "eager_bf16", "compile_bf16", "inf_cl")]
    return cases
