"""What the Triton path allocates, counted without a GPU: its launchers run, its kernels do not.

Oracle: the law that the README states. On a GPU test_gpu_runtime.py measures the same with real
kernels.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.harness import peak_bytes
from mlip.kernels import _chip
from mlip.kernels.token_knowledge_patch import op, tiling, token_knowledge_patch_loss

pytest.importorskip("triton", reason="triton is not installed")

MIB = 2**20


class _NoKernel:
    """Takes a grid and arguments as a Triton kernel does, and leaves its outputs as they are."""

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args, **keywords: None


def _no_product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    return a.new_empty((a.shape[0], b.shape[1]), dtype=torch.float32) if out is None else out


@pytest.fixture(autouse=True)
def _kernels_that_do_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlip.kernels.token_knowledge_patch import (
        pack_triton_kernels,
        products_triton_kernels,
        rows_triton_kernels,
        triton_kernels,
    )

    # no poisoned torch.empty: nothing is computed, and memory that nobody writes costs no page
    monkeypatch.undo()
    modules = (pack_triton_kernels, products_triton_kernels, rows_triton_kernels, triton_kernels)
    for module in modules:
        for name in vars(module):
            if name.endswith("_kernel"):
                monkeypatch.setattr(module, name, _NoKernel())
    monkeypatch.setattr(products_triton_kernels, "wide_product", _no_product)
    monkeypatch.setattr(op, "resolve", lambda *_: "triton")
    # an H100: with 132 multiprocessors passes are cut into partial sums, which cost memory
    monkeypatch.setattr(triton_kernels, "chip_facts", lambda _: _chip.chip_of((9, 0), 132))


def law(batch: int, rows: int, patches: int, dim: int, pooling: str) -> int:
    """Beside inputs and gradients: one unit copy, 8 N^2, min(20 N^2 J, 1 GiB) and 64 MiB.

    Attention pooling at D above 128: also a block of similarity gradients (1,024 rows by all
    patches, at least 512 MiB or all rows, at most 1 GiB), a number a pair of its rows, the rows.
    """
    copies = 2 * dim * batch * (rows + tiling.padded_patches(patches))
    whole = copies + 8 * batch**2 + min(20 * batch**2 * rows, 2**30) + 64 * MIB
    if pooling != "attention" or dim <= 128:
        return whole
    row = 2 * batch * tiling.padded_patches(patches)
    block = min(max(512 * MIB, 1024 * row), 1024 * MIB, (batch * rows + 127) * row)
    return whole + block + block // row * (4 * batch + 6 * dim)


def extra_bytes(batch: int, dim: int, pooling: str, entities: int = 8) -> int:
    """What a step on bf16 inputs takes beside inputs and gradients, T = 112, P = 196."""
    made = [
        torch.empty(batch, count, dim, dtype=torch.bfloat16, requires_grad=True)
        for count in (196, 112, entities)
    ]

    def step() -> tuple[torch.Tensor, ...]:
        value = token_knowledge_patch_loss(*made, logit_scale=10.0, pooling=pooling)
        return torch.autograd.grad(value, made)

    return peak_bytes(step, "cpu") - sum(x.nbytes for x in made)


@pytest.mark.parametrize("pooling", ["attention", "context", "max"])
@pytest.mark.parametrize("batch", [64, 128, 256])
@pytest.mark.parametrize("dim", [128, 256])
def test_launchers_allocate_what_the_law_allows(batch: int, dim: int, pooling: str) -> None:
    assert extra_bytes(batch, dim, pooling) <= law(batch, 120, 196, dim, pooling)


def test_the_gradient_of_rows_is_gone_before_that_of_patches_is_made() -> None:
    """Of two passes the second needs the statistics, both unit copies and its own output; gradients
    that are handed out are no extra, and that of patches does not exist yet."""
    batch, rows, patches, dim = 256, 120, 196, 128
    statistics = 12 * batch**2 * rows
    copies = 2 * dim * batch * (rows + tiling.padded_patches(patches))
    made = 4 * dim * batch * tiling.padded_patches(patches) - 2 * dim * batch * patches
    # numbers a row, and a pair of a text and an image
    small = 2 * MIB
    assert extra_bytes(batch, dim, "attention") <= statistics + copies + made + small


# the other pooling, and the batch that the README's table aims at
OTHER_LARGE = [(4096, 256, "context"), (4096, 256, "max"), (8192, 128, "attention")]


@pytest.mark.parametrize(
    ("batch", "dim", "pooling"),
    [
        (4096, 256, "attention"),
        *(pytest.param(*case, marks=pytest.mark.long) for case in OTHER_LARGE),
    ],
)
def test_the_law_holds_where_float32_gradients_alone_would_break_it(
    batch: int, dim: int, pooling: str
) -> None:
    """At N = 4096, D = 256 those of rows and patches together are 1.3 GiB of the 1 GiB."""
    assert extra_bytes(batch, dim, pooling) <= law(batch, 120, 196, dim, pooling)
