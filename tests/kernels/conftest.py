"""Shares the GPU tests out for gpu_check.py (most of their time is compilation, on the CPU), has
Triton's interpreter watch what kernels touch, and makes it round as a chip does."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from mlip.kernels.token_knowledge_patch import tiling
from tests.kernels.watching import watched

SHARE_VARIABLE = "MLIP_TEST_SHARE"  # "2/4": the third of four equal shares


@pytest.hookimpl(trylast=True)  # after -m has left its choice
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    share = os.environ.get(SHARE_VARIABLE)
    if share:
        index, count = map(int, share.split("/"))
        items[:] = items[index::count]


@pytest.fixture(autouse=True)
def _watch_memory() -> Iterator[None]:
    """No kernel leaves its tensors, and no two of its programs meet in one place of them."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    with watched():
        yield


@pytest.fixture
def round_like_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The interpreter truncates float32 to bfloat16; every chip rounds to the nearest even.

    It multiplies tiles by the BLAS at hand, some of which round a row by where in its tile the row
    stands, as no tensor core does: products are rounded from float64. And float32 tiles of 16 x 16,
    made for registers, would cost it minutes: 32 x 32.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        wide = tiling.Choice([(32, (32, 0, 0), 4)], [])
        monkeypatch.setattr(tiling, "FLOAT32_OTHERS", {128: wide, 256: wide})
        tiling.choose_tiling.cache_clear()
        import numpy as np
        import triton.language as tl
        import triton.runtime.interpreter as interpreter

        plain = interpreter.InterpreterBuilder.cast_impl

        def cast(self: Any, source: Any, target: Any) -> Any:
            if source.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16:
                value = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16()
                bits = value.view(torch.int16).numpy().view(np.uint16)
                return interpreter.TensorHandle(bits, target.scalar)
            return plain(self, source, target)

        def dot(self: Any, a: Any, b: Any, d: Any, *_: Any) -> Any:
            product = np.matmul(a.data, b.data, dtype=np.float64).astype(d.data.dtype)
            return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)
        for name in ("cast_impl", "create_fp_trunc"):
            monkeypatch.setattr(interpreter.InterpreterBuilder, name, cast)
    yield
