"""The benchmark's rows say what happened, whatever happened; its providers compute one loss."""

from __future__ import annotations

import time
from typing import Any

import pytest

from benchmarks import bench_kernels, harness

SMALL = bench_kernels.similarity(4, 6, 5, 8, device="cpu")


@pytest.mark.parametrize("pooling", ["attention", "context", "max"])
@pytest.mark.parametrize("provider", ["torch", "eager_fp32", "chunked"])
def test_every_provider_computes_the_same_loss(pooling: str, provider: str) -> None:
    case = SMALL | {"provider": provider, "pooling": pooling, "fill": 0.5}
    loss = bench_kernels._provider(case)
    errors = bench_kernels._parity(case, loss)
    assert all(error is not None and error < 1e-5 for error in errors.values())


@pytest.mark.parametrize("provider", ["torch", "eager_fp32"])
def test_every_info_nce_provider_computes_the_same_loss(provider: str) -> None:
    case = {"op": "info_nce", "batch": 40, "dim": 8, "provider": provider, "device": "cpu"}
    errors = bench_kernels._parity(case, bench_kernels._provider(case))
    assert all(error is not None and error < 1e-4 for error in errors.values())


def test_a_row_without_a_number_says_why() -> None:
    absent = SMALL | {"provider": "late_interaction_kernels", "pooling": "max"}
    assert bench_kernels.safely(absent, None)["status"].startswith("not installed")
    wrong = SMALL | {"provider": "nothing"}
    assert bench_kernels.safely(wrong, None)["status"].startswith("failed: ValueError")
    late = bench_kernels.run_grid([SMALL | {"provider": "torch"}], time.monotonic() - 1, False)
    assert late[0]["status"] == "not run: out of time"
    assert late[0]["environment"]["torch"]


def test_spread_and_table_are_plain() -> None:
    made: dict[str, Any] = harness._spread([5.0, 1.0, 3.0, 2.0, 4.0, 100.0])
    assert made == {"median_ms": 3.5, "p20_ms": 2.0, "p80_ms": 5.0, "repeats": 6}
    text = harness.table([{"a": 1.23456, "b": None}], ["a", "b"])
    assert text.splitlines() == ["a      b", "1.235  -"]
