"""Muon for the weight matrices of a model, AdamW for all its other parameters."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

# of a quintic that takes singular values in (0, 1] to about 1 in five rounds (Jordan et al. 2024)
_QUINTIC = (3.4445, -4.7750, 2.0315)
_ROUNDS = 5
_LEAST_SIDE = 16  # fewer rows or columns: few directions to make alike
# the root mean square of an update over that of AdamW's (Liu et al. 2025, section 2.2)
_RMS = 0.2


def matrix_names(module: nn.Module) -> set[str]:
    """Names of the trainable weights that Muon takes: of linear and convolution layers.

    A convolution's weight counts as the matrix [out, in * height * width]. Matrices with a side
    below 16 are left to AdamW, as are embeddings, position grids, prototypes and all vectors.
    """
    names = set()
    for prefix, child in module.named_modules():
        if not isinstance(child, nn.Linear | nn.Conv2d) or not child.weight.requires_grad:
            continue
        rows = child.weight.shape[0]
        if min(rows, child.weight.numel() // max(rows, 1)) >= _LEAST_SIDE:
            names.add(f"{prefix}.weight" if prefix else "weight")
    return names


def orthogonalised(matrices: Tensor) -> Tensor:
    """The nearest matrices with orthonormal rows or columns, about: singular values 0.7 to 1.2.

    Shapes:  [N, R, C] -> [N, R, C], in the dtype given; a zero matrix stays zero
    Errors:  what is below 0.0015 of a matrix's Frobenius norm comes to less
    Source:  five rounds of a quintic Newton-Schulz iteration (Jordan et al. 2024, Muon).
    """
    a, b, c = _QUINTIC
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if is_tall else matrices
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp_min(1e-7)
    for _ in range(_ROUNDS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if is_tall else x


class Muon(torch.optim.AdamW):
    """AdamW whose groups with ``is_matrix`` are moved by Muon, at AdamW's learning rate.

    A matrix moves by -lr * 0.2 * sqrt(longer side) * orthogonalised(m), m being the gradient's
    running mean looked one step ahead (Nesterov): every direction of the matrix learns at the same
    speed, also those that few samples of a batch ask for. Its only state is exp_avg, half of
    AdamW's. Needs whole matrices on every rank, so no ZeRO stage above 0.

    Errors:  the direction is computed in float32 on a CPU and in bfloat16 on a GPU
    Source:  Jordan et al. 2024 (Muon); scale: Liu et al. 2025 (arXiv 2502.16982, equation 4)
    """

    def __init__(self, groups: list[dict[str, Any]], *, momentum: float, **adamw: Any) -> None:
        super().__init__([{"is_matrix": False, **group} for group in groups], **adamw)
        self.momentum = momentum

    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        if closure is not None:
            raise ValueError("Muon: a closure is not supported; call step() after backward()")
        every = self.param_groups
        self.param_groups = [group for group in every if not group["is_matrix"]]
        try:
            super().step()
        finally:
            self.param_groups = every
        for group in every:
            if group["is_matrix"]:
                self._move(group)

    @torch.no_grad()
    def _move(self, group: dict[str, Any]) -> None:
        # as torch's fused AdamW: where the device finds found_inf at 1 nothing changes
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        is_skipped = None if found_inf is None else found_inf > 0

        def put(target: Tensor, moved: Tensor) -> None:
            target.copy_(moved if is_skipped is None else torch.where(is_skipped, target, moved))

        by_shape: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros((), device=parameter.device)
                state["exp_avg"] = torch.zeros_like(parameter)
            mean = state["exp_avg"].lerp(parameter.grad, 1.0 - self.momentum)
            ahead = parameter.grad.lerp(mean, self.momentum).flatten(1)
            by_shape[ahead.shape[0], ahead.shape[1]].append((parameter, ahead))
            state["step"] += 1.0 if found_inf is None else 1.0 - found_inf
            put(state["exp_avg"], mean)
        # one batched product for all matrices of a shape: a tower has dozens alike
        for (rows, columns), moves in by_shape.items():
            stacked = torch.stack([ahead for _, ahead in moves])
            if stacked.is_cuda:
                stacked = stacked.bfloat16()
            step = -group["lr"] * _RMS * max(rows, columns) ** 0.5
            for (parameter, _), direction in zip(moves, orthogonalised(stacked), strict=True):
                kept = parameter * (1.0 - group["lr"] * group["weight_decay"])
                put(parameter, kept.add_(direction.view(parameter.shape), alpha=step))
