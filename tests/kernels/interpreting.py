"""What the tests of Triton's interpreter share: when they run, and how results are compared.

TRITON_INTERPRET must be set before the kernels are imported, and would break GPU tests in the same
process: test_interpreter.py runs these tests in a process that has it. Sizes are small: the
interpreter takes about 2 ms for every tile of every program.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from mlip.kernels.token_knowledge_patch import token_knowledge_patch_scores
from tests.kernels.oracle import gradients, leaves, leaves_as_they_are, relative_error

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETING, reason="test_interpreter.py runs these")


def compare(
    inputs: dict[str, Any],
    tolerance: float,
    dtype: torch.dtype = torch.float32,
    features: torch.dtype | None = None,
    **options: Any,
) -> None:
    """Scores and gradients by Triton against torch in float64 on the same (rounded) numbers.

    A gradient may also be twice as wrong as torch in the same dtype: that of a weight is a
    difference of nearly equal numbers, which no float32 arithmetic resolves better.
    """
    names = ("patches", "tokens", "knowledge")
    rounded = {
        k: v.to(features) if features is not None and k in names else v for k, v in inputs.items()
    }
    results = []
    for impl, wide in (("triton", False), ("torch", True), ("torch", False)):
        if wide:
            made = leaves(rounded)
        else:
            made = leaves(rounded, dtype) if features is None else leaves_as_they_are(rounded)
        value = token_knowledge_patch_scores(**made, impl=impl, **options)
        results.append((value, gradients(value, made)))
    (value, got), (truth, want), (_, same) = results
    assert relative_error(value, truth) <= tolerance
    # the gates of half precision are for features
    for name in want if features is None else names:
        error = relative_error(got[name], want[name])
        assert error <= max(tolerance, 2 * relative_error(same[name], want[name]) + 1e-6), name
