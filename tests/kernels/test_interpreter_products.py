"""The backward pass of attention pooling by products, cut into blocks of rows of any size."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mlip.kernels.token_knowledge_patch import tiling, token_knowledge_patch_loss
from tests.kernels.interpreting import interpreted, leaves_of
from tests.kernels.oracle import gradients, leaves, make_inputs, poisoned, relative_error

pytest.importorskip("triton", reason="triton is not installed")

pytestmark = pytest.mark.usefixtures("round_like_a_gpu")


def _blocks_of(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GRADIENT_UNIT", "GRADIENT_ROWS"):
        monkeypatch.setattr(tiling, name, rows)
    monkeypatch.setattr(tiling, "GRADIENT_BYTES", 1)


@interpreted
@pytest.mark.parametrize("block", [16, 48, 1024])
@pytest.mark.parametrize("aggregation", ["mean", "lse"])
def test_every_gradient_is_that_of_float64(
    block: int, aggregation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: torch in float64. Masked rows and patches hold NaN, and whole blocks are empty."""
    _blocks_of(block, monkeypatch)
    inputs = make_inputs(4, 5, 19, 21, 3, 24, seed=3)
    inputs["token_weights"][1:, 4:] = 0.0
    extra = {"attention_scale": torch.tensor(7.0, dtype=torch.float64)}
    options: dict[str, Any] = {"aggregation": aggregation, "logit_scale": 9.0}
    inputs = {name: x[:4] for name, x in inputs.items()}
    made, truth = leaves(poisoned(inputs) | extra, torch.float32), leaves(inputs | extra)
    want = gradients(token_knowledge_patch_loss(**truth, impl="torch", **options), truth)
    value = token_knowledge_patch_loss(**made, impl="triton", **options)
    got = gradients(value, made)
    plain = leaves(inputs | extra, torch.float32)
    same = gradients(token_knowledge_patch_loss(**plain, impl="torch", **options), plain)
    for name in want:
        allowed = max(1e-5, 2 * relative_error(same[name], want[name]))
        assert relative_error(got[name], want[name]) <= allowed, name


@interpreted
def test_blocks_change_no_bfloat16_gradient_by_more_than_the_order_of_a_sum(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inputs = make_inputs(3, 3, 20, 9, 3, 24, seed=2)
    names = ("patches", "tokens", "knowledge")
    rounded = {k: x.bfloat16() if k in names else x for k, x in inputs.items()}

    def made() -> dict[str, torch.Tensor]:
        leaf = leaves_of(rounded)
        value = token_knowledge_patch_loss(**leaf, logit_scale=9.0, impl="triton")
        return gradients(value, leaf)

    whole = made()
    _blocks_of(16, monkeypatch)
    for name, cut in made().items():
        # handed out in bfloat16: a sum that ends near a middle may round to the other side
        assert relative_error(cut, whole[name]) <= 1e-3, name


def test_a_block_keeps_its_bounds() -> None:
    for batch, rows in ((2, 17), (64, 112), (256, 112), (1024, 112), (8192, 128)):
        for dim, size in ((128, 2), (256, 4)):
            p = tiling.Problem(batch, batch, rows, 196, dim, size, "attention", "mean")
            block = tiling.gradient_rows(p, batch)
            assert block % tiling.GRADIENT_UNIT == 0 and block >= tiling.GRADIENT_UNIT
            assert block <= batch * rows + tiling.GRADIENT_UNIT
            row_bytes = size * batch * p.padded
            assert block == tiling.GRADIENT_UNIT or block * row_bytes <= tiling.GRADIENT_CAP_BYTES
