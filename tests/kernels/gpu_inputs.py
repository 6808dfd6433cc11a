"""Inputs on the GPU, and the comparison with float64 that the GPU tests share."""

from __future__ import annotations

from typing import Any

import torch

from mlip.kernels.token_knowledge_patch import token_knowledge_patch_scores
from tests.kernels.oracle import gradients, leaves, leaves_as_they_are, relative_error

FEATURES = ("patches", "tokens", "knowledge")


def on_gpu(inputs: dict[str, Any], features: torch.dtype = torch.float32) -> dict[str, Any]:
    """Inputs on the GPU: features in one dtype, weights in float32, masks as they are."""
    out = {}
    for name, value in inputs.items():
        if not value.is_floating_point():
            out[name] = value.cuda()
        else:
            out[name] = value.to("cuda", features if name in FEATURES else torch.float32)
    return out


def compare(
    inputs: dict[str, Any], tolerance: float, features: torch.dtype = torch.float32, **options: Any
) -> None:
    """Scores and gradients by Triton and by torch in the same dtype, both against float64."""
    narrow = on_gpu(inputs, features)
    results = []
    for impl, made in (
        ("triton", leaves_as_they_are(narrow)),
        ("torch", leaves(narrow)),
        ("torch", leaves_as_they_are(narrow)),
    ):
        value = token_knowledge_patch_scores(**made, impl=impl, **options)
        results.append((value, gradients(value, made)))
    (value, got), (truth, want), (same_value, same) = results
    assert relative_error(value, truth) <= max(
        tolerance, 2 * relative_error(same_value, truth) + 1e-6
    )
    for name in want if features == torch.float32 else FEATURES:
        if name in want:
            allowed = max(tolerance, 2 * relative_error(same[name], want[name]) + 1e-6)
            assert relative_error(got[name], want[name]) <= allowed, name


def training_inputs(batch: int, tokens: int, patches: int, dim: int, fill: float = 0.6):
    g = torch.Generator(device="cuda").manual_seed(6)
    half = torch.bfloat16
    made = {
        "patches": torch.randn(batch, patches, dim, generator=g, device="cuda", dtype=half),
        "tokens": torch.randn(batch, tokens, dim, generator=g, device="cuda", dtype=half),
        "knowledge": torch.randn(batch, 8, dim, generator=g, device="cuda", dtype=half),
        "token_weights": (torch.rand(batch, tokens, generator=g, device="cuda") < fill).float(),
    }
    for name in FEATURES:
        made[name].requires_grad_()
    return made
