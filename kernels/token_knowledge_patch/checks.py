"""What the public functions refuse, and in which words."""

from __future__ import annotations

import math
import numbers

import torch
from torch import Tensor

from mlip.kernels._scalars import has_values, require_number, require_tensor

POOLINGS = ("attention", "context", "max")
AGGREGATIONS = ("mean", "lse")
# below it the logarithm of a sum of nearly equal powers leaves float32 fewer than five digits
MIN_AGGREGATION_SCALE = 0.02


def _expect_shape(name: str, value: Tensor | None, shape: tuple[int, ...], meaning: str) -> None:
    if value is not None and tuple(value.shape) != shape:
        raise ValueError(
            f"expected {name} {meaning} of shape {list(shape)}, got {list(value.shape)}"
        )


def check_scale(name: str, value: float | Tensor, minimum: float, open_end: bool = False) -> None:
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(
                f"expected {name} to be a number or a 0-dim tensor, got shape {list(value.shape)}"
            )
        if not has_values(value):
            return
        value = float(value.detach())
    elif not torch.compiler.is_compiling():  # which has numbers of any value, of a type of its own
        require_number(name, value)
    low_enough = value > minimum if open_end else value >= minimum
    # comparisons, which torch.compile traces for a number of any value, as it does not isfinite
    if not low_enough or not -math.inf < value < math.inf:
        bound = "greater than" if open_end else "at least"
        raise ValueError(f"expected {name} finite and {bound} {minimum:g}, got {value}")


def check_inputs(
    patches: Tensor,
    tokens: Tensor,
    knowledge: Tensor | None,
    token_weights: Tensor | None,
    knowledge_weights: Tensor | None,
    knowledge_mask: Tensor | None,
    patch_mask: Tensor | None,
) -> None:
    weights = {"token_weights": token_weights, "knowledge_weights": knowledge_weights}
    masks = {"knowledge_mask": knowledge_mask, "patch_mask": patch_mask}
    needed = {"patches": patches, "tokens": tokens}
    for name, one in {**needed, "knowledge": knowledge, **weights, **masks}.items():
        if one is not None or name in needed:
            require_tensor(name, one)
    features = dict(needed)
    if knowledge is not None:
        features["knowledge"] = knowledge
    for name, value in features.items():
        if value.ndim != 3:
            raise ValueError(
                f"expected {name} of 3 dimensions [batch, rows, D], got {list(value.shape)}"
            )
        if not value.is_floating_point():
            raise ValueError(f"expected {name} in floating point, got {value.dtype}")
        if value.shape[2] != patches.shape[2]:
            raise ValueError(
                f"expected {name} with D={patches.shape[2]} as patches have, got "
                f"D={value.shape[2]}; project both sides to one size"
            )
        if 0 in value.shape and not (name == "knowledge" and value.shape[1] == 0):
            raise ValueError(
                f"expected {name} without an empty dimension, got {list(value.shape)}; skip the "
                "loss of an empty batch, on all ranks alike: no rank of a group may be without"
            )
    texts, length = tokens.shape[:2]
    if knowledge is None:
        if knowledge_weights is not None or knowledge_mask is not None:
            raise ValueError("expected knowledge beside knowledge_weights and knowledge_mask")
    else:
        entities = knowledge.shape[1]
        _expect_shape("knowledge", knowledge, (texts, entities, patches.shape[2]), "[N, K, D]")
        _expect_shape("knowledge_weights", knowledge_weights, (texts, entities), "[N, K]")
        _expect_shape("knowledge_mask", knowledge_mask, (texts, entities), "[N, K]")
    _expect_shape("token_weights", token_weights, (texts, length), "[N, T]")
    _expect_shape("patch_mask", patch_mask, tuple(patches.shape[:2]), "[M, P]")
    for name, mask in masks.items():
        if mask is not None and mask.dtype != torch.bool:
            raise ValueError(f"expected {name} of dtype bool, True = real, got {mask.dtype}")
    others = dict(features)
    for name, weight in weights.items():
        if weight is None:
            continue
        if not weight.is_floating_point():
            raise ValueError(
                f"expected {name} bool or in floating point, got {weight.dtype}; for a mask of 0 "
                "and 1 pass mask.bool()"
            )
        if has_values(weight) and not bool(((weight >= 0) & weight.isfinite()).all()):
            raise ValueError(
                f"expected {name} >= 0 and finite, got numbers from {float(weight.min())} to "
                f"{float(weight.max())}; 0 masks"
            )
        others[name] = weight
    others.update({name: mask for name, mask in masks.items() if mask is not None})
    for name, value in others.items():
        if value.device != patches.device:
            raise ValueError(
                f"expected {name} on {patches.device}, where patches are, got {value.device}"
            )


def check_options(
    pooling: str,
    aggregation: str,
    scales: dict[str, float | Tensor],
    knowledge_share: float,
) -> None:
    if pooling not in POOLINGS:
        raise ValueError(f"expected pooling one of {POOLINGS}, got {pooling!r}")
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"expected aggregation one of {AGGREGATIONS}, got {aggregation!r}")
    for name, value in scales.items():
        minimum = -math.inf if name == "knowledge_gain" else 0.0
        check_scale(name, value, minimum, open_end=name == "aggregation_scale")
    gamma = scales.get("aggregation_scale", math.inf)
    if aggregation == "lse" and not isinstance(gamma, Tensor) and gamma < MIN_AGGREGATION_SCALE:
        raise ValueError(
            f'expected aggregation_scale of "lse" at least {MIN_AGGREGATION_SCALE:g}, got {gamma}: '
            'as it falls the scores go to those of "mean" and lose their digits; pass "mean"'
        )
    is_number = isinstance(knowledge_share, numbers.Real) or torch.compiler.is_compiling()
    if isinstance(knowledge_share, Tensor) or not is_number or not 0.0 <= knowledge_share <= 1.0:
        raise ValueError(f"expected knowledge_share a number in [0, 1], got {knowledge_share!r}")
