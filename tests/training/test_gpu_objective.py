"""The whole objective in float32 where it will be trained against itself in float64 on a CPU.

Oracle: float64 through the reference operators, which tests/losses/test_numpy_oracle.py holds to
the formulas. On a GPU the operators are the Triton kernels and everything between them is torch's
for CUDA; on a CPU this is the same comparison without either.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from mlip.batch import Batch
from tests.benchmarks.step_bench import objective_of

STEP, PROGRESS = 3, 1.5  # the prototypes learn


def outcome(objective: Any, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Every term and the total, and every gradient, in float64 on the CPU."""
    total, terms = objective(batch, step=STEP, progress=PROGRESS)
    total.backward()
    gradients = {n: p.grad for n, p in objective.named_parameters() if p.grad is not None}
    moved = [
        {name: value.detach().double().cpu() for name, value in values.items()}
        for values in ({**terms, "total": total}, gradients)
    ]
    return moved[0], moved[1]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_every_term_and_gradient_is_that_of_float64(device: str) -> None:
    objective, batch = objective_of()
    objective.zero_grad(set_to_none=True)
    objective.eval()  # the towers' dropout draws from the device's own generator
    exact = copy.deepcopy(objective).double()
    wide = dataclasses.replace(batch, image=batch.image.double())
    terms, gradients = outcome(exact, wide)
    with torch.backends.cudnn.flags(allow_tf32=False):  # of the patches' convolution
        own_terms, own_gradients = outcome(objective.to(device), batch.to(device))
    assert own_terms.keys() == terms.keys() and min(terms.values()) > 0
    for name, value in terms.items():
        torch.testing.assert_close(own_terms[name], value, rtol=2e-5, atol=1e-6, msg=name)
    assert own_gradients.keys() == gradients.keys()
    whole = max(float(gradient.abs().max()) for gradient in gradients.values())
    for name, gradient in gradients.items():
        largest = float(gradient.abs().max())
        worst = float((own_gradients[name] - gradient).abs().max())
        # a gradient that is zero but for rounding is held to the model's largest
        assert worst <= 2e-4 * largest + 1e-6 * whole, (name, worst, largest)
