"""The backward pass by library products, cut into blocks of rows and chunks of texts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mlip.kernels.token_knowledge_patch import (
    tiling,
    token_knowledge_patch_loss,
    token_knowledge_patch_scores,
)
from tests.kernels.interpreting import interpreted
from tests.kernels.oracle import (
    gradients,
    leaves,
    leaves_as_they_are,
    make_inputs,
    poisoned,
    relative_error,
)

pytest.importorskip("triton", reason="triton is not installed")

FEATURES = ("patches", "tokens", "knowledge")
pytestmark = pytest.mark.usefixtures("round_like_a_gpu")


def _blocks_of(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GRADIENT_UNIT", "GRADIENT_ROWS"):
        monkeypatch.setattr(tiling, name, rows)
    monkeypatch.setattr(tiling, "GRADIENT_BYTES", 1)


@interpreted
@pytest.mark.parametrize("block", [16, 48, 1024])
@pytest.mark.parametrize("aggregation", ["mean", "lse"])
@pytest.mark.parametrize("alpha", [0.5, 7.0, 60.0])
def test_every_gradient_is_that_of_float64(
    block: int, aggregation: str, alpha: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: torch in float64. Masked rows and patches hold NaN, and whole blocks are empty."""
    _blocks_of(block, monkeypatch)
    inputs = make_inputs(4, 5, 19, 21, 3, 144, seed=3)
    inputs["token_weights"][1:, 4:] = 0.0
    inputs = {name: x[:4] for name, x in inputs.items()}

    def narrow(given: dict[str, Any]) -> dict[str, Any]:
        return {k: x.bfloat16() if k in FEATURES else x for k, x in given.items()}

    options: dict[str, Any] = {"aggregation": aggregation, "logit_scale": 9.0}
    scale = {"attention_scale": torch.tensor(alpha, dtype=torch.float64)}
    truth, plain = leaves(narrow(inputs) | scale), leaves_as_they_are(narrow(inputs) | scale)
    made = leaves_as_they_are(narrow(poisoned(inputs)) | scale)
    want = gradients(token_knowledge_patch_loss(**truth, impl="torch", **options), truth)
    same = gradients(token_knowledge_patch_loss(**plain, impl="torch", **options), plain)
    got = gradients(token_knowledge_patch_loss(**made, impl="triton", **options), made)
    for name in want:
        # unit rows rounded to 8 bits, of which weights' gradients are a difference
        allowed = max(1e-2 if alpha < 10 else 2.5e-2, 2 * relative_error(same[name], want[name]))
        assert relative_error(got[name], want[name]) <= allowed, name


@interpreted
@pytest.mark.parametrize("count", [1, 2])
def test_chunks_of_texts_add_up(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: one chunk whose statistics the forward pass keeps."""
    inputs = make_inputs(3, 5, 20, 9, 3, 144, seed=2)
    rounded = {k: x.bfloat16() if k in FEATURES else x for k, x in inputs.items()}

    def made() -> dict[str, torch.Tensor]:
        leaf = leaves_as_they_are(rounded)
        return gradients(token_knowledge_patch_scores(**leaf, impl="triton"), leaf)

    whole = made()
    from mlip.kernels.token_knowledge_patch import triton_kernels

    problem = tiling.Problem(3, 5, 12, 20, 144, 2, "attention", "mean")
    assert tiling.takes_products(problem)
    room = (count + 1) * tiling.chunk_bytes(problem, 1) - 1
    for module in (tiling, triton_kernels):
        monkeypatch.setattr(module, "workspace_bytes", lambda *_: room)
    assert tiling.text_chunks(problem)[0] == (0, count)
    _blocks_of(16, monkeypatch)
    for name, cut in made().items():
        # handed out in bfloat16: a sum that ends near a middle may round to the other side
        assert relative_error(cut, whole[name]) <= 1e-3, name


def test_a_block_keeps_its_bounds() -> None:
    for batch, rows in ((2, 17), (64, 112), (256, 112), (1024, 112), (8192, 128)):
        for dim in (144, 256):
            p = tiling.Problem(batch, batch, rows, 196, dim, 2, "attention", "mean")
            assert tiling.takes_products(p)
            block = tiling.gradient_rows(p, batch)
            blocks = -(-batch * rows // block)
            assert blocks * (block - tiling.GRADIENT_UNIT) < batch * rows <= blocks * block
            assert block % tiling.GRADIENT_UNIT == 0 and block >= tiling.GRADIENT_UNIT
            assert block <= batch * rows + tiling.GRADIENT_UNIT
            row_bytes = 2 * batch * p.padded
            assert block == tiling.GRADIENT_UNIT or block * row_bytes <= tiling.GRADIENT_CAP_BYTES
