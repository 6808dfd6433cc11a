"""train.residual=bf16: what flows between a transformer's layers, and how wrong gradients get.

Oracle: the same tower in float64; parameters and their names are those of the float32 stream.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn as nn
from torch import Tensor

from mlip.encoders.residual import RoundedLayerNorm
from mlip.encoders.text import TextEncoder
from mlip.encoders.vision import VisionEncoder
from mlip.memory_plan import measure
from mlip.model import MLIPModel
from mlip.settings.config import ConfigError, Text, Vision, load

LAYERS = 6
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.1,
}
ROWS, TOKENS, WORDS = 6, 12, 50


def _tower(kind: str, residual: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "vit":
        settings = Vision(kind="vit", options=SIZES | {"patch_size": 8})
        return VisionEncoder(settings, channels=1, image_px=32, residual=residual)
    text = Text(options=SIZES)
    return TextEncoder(text, vocab_size=WORDS, max_tokens=TOKENS, residual=residual)


def _inputs(kind: str) -> tuple[Tensor, ...]:
    torch.manual_seed(1)
    if kind == "vit":
        return (torch.randn(ROWS, 1, 32, 32),)
    length = torch.arange(ROWS)[:, None] + 4
    return torch.randint(0, WORDS, (ROWS, TOKENS)), torch.arange(TOKENS) < length


def _layers(tower: Any) -> list[nn.Module]:
    backbone = tower.tower.backbone if hasattr(tower, "tower") else tower.backbone
    return list(backbone.layers if hasattr(backbone, "layers") else backbone.encoder.layer)


def _gradients(tower: nn.Module, kind: str, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Of a sum with fixed random weights; in autocast's type, or in the tower's own."""
    place = next(tower.parameters()).device
    inputs = tuple(x.to(place) for x in _inputs(kind))
    if dtype is None and next(tower.parameters()).dtype == torch.float64:
        inputs = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    with torch.autocast(place.type, dtype or torch.bfloat16, enabled=dtype is not None):
        pooled, states = tower(*inputs)[:2]
    torch.manual_seed(2)
    states = states.to(torch.promote_types(states.dtype, torch.float32))
    loss = (torch.randn(states.shape).to(place) * states).sum() + pooled.to(
        states.dtype
    ).square().sum()
    loss.backward()
    return {n: p.grad.double() for n, p in tower.named_parameters() if p.grad is not None}


def _error(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    wrong = sum(float((found[n] - exact[n]).square().sum()) for n in exact)
    return (wrong / sum(float(g.square().sum()) for g in exact.values())) ** 0.5


@pytest.mark.parametrize("kind", ["vit", "bert"])
@pytest.mark.parametrize("residual", ["fp32", "bf16"])
def test_what_layers_hand_on_is_of_the_type_that_was_asked_for(kind: str, residual: str) -> None:
    tower, seen = _tower(kind, residual), []
    for layer in _layers(tower):
        layer.register_forward_hook(
            lambda _, given, made: seen.extend(
                x.dtype for x in (given[0], made[0] if isinstance(made, tuple) else made)
            )
        )
    with torch.autocast("cpu", torch.bfloat16):
        tower(*_inputs(kind))
    expected = torch.bfloat16 if residual == "bf16" else torch.float32
    assert seen == [expected] * 2 * LAYERS
    seen.clear()
    tower(*_inputs(kind))  # without autocast nothing is rounded
    assert seen == [torch.float32] * 2 * LAYERS


@pytest.mark.parametrize("kind", ["vit", "bert"])
def test_gradients_are_those_of_float64_to_what_bf16_states_cost(kind: str) -> None:
    exact = _gradients(_tower(kind, "fp32").double(), kind, None)
    wide = _error(_gradients(_tower(kind, "fp32"), kind, torch.bfloat16), exact)
    narrow = _error(_gradients(_tower(kind, "bf16"), kind, torch.bfloat16), exact)
    print(f"{kind}: float32 stream {wide:.4f}, bf16 stream {narrow:.4f}")
    assert wide < 0.02 and narrow < 0.04
    assert narrow < 3.0 * wide


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["vit", "bert"])
def test_on_a_gpu_layers_hand_on_bf16_with_the_gradients_of_a_cpu(kind: str) -> None:
    exact = _gradients(_tower(kind, "fp32").double(), kind, None)
    tower = _tower(kind, "bf16").cuda()
    seen = []
    for layer in _layers(tower):
        layer.register_forward_hook(lambda _, given, made: seen.append(given[0].dtype))
    found = _gradients(tower, kind, torch.bfloat16)
    assert set(seen) == {torch.bfloat16}
    assert _error({name: grad.cpu() for name, grad in found.items()}, exact) < 0.04


@pytest.mark.parametrize("kind", ["vit", "bert"])
def test_without_autocast_and_in_what_is_saved_nothing_changes(kind: str) -> None:
    plain, rounded = _tower(kind, "fp32"), _tower(kind, "bf16")
    assert list(plain.state_dict()) == list(rounded.state_dict())
    assert {n for n, _ in plain.named_parameters()} == {n for n, _ in rounded.named_parameters()}
    expected, found = (_gradients(tower, kind, None) for tower in (plain, rounded))
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    norms = [m for m in rounded.modules() if isinstance(m, nn.LayerNorm)]
    backbone_norms = [m for m in norms if isinstance(m, RoundedLayerNorm)]
    assert len(backbone_norms) == 2 * LAYERS + 1  # and the ViT's last, or BERT's embeddings'


def _model(residual: str) -> MLIPModel:
    config = load([], ["train.precision=bf16", f"train.residual={residual}", "model.embed_dim=16"])
    return MLIPModel(config, vocab_size=30, concept_vectors=torch.zeros(3, config.knowledge.dim))


def test_norms_of_heads_are_rounded_ones_where_asked_for() -> None:
    for residual, kind in (("fp32", nn.LayerNorm), ("bf16", RoundedLayerNorm)):
        assert [type(head.get_submodule("norm")) for head in _model(residual).heads()] == [kind] * 4


@pytest.mark.gpu
@pytest.mark.parametrize("residual", ["fp32", "bf16"])
def test_on_a_gpu_heads_keep_to_the_type_too(residual: str) -> None:
    """2,048 numbers a patch and a token, which autocast widens on a GPU (a CPU's leaves them)."""
    expected = torch.bfloat16 if residual == "bf16" else torch.float32
    for head in _model(residual).cuda().heads():
        seen: list[torch.dtype] = []
        head.get_submodule("activation").register_forward_hook(
            lambda _, given, made, seen=seen: seen.extend((given[0].dtype, made.dtype))
        )
        first: Any = head.get_submodule("first")
        with torch.autocast("cuda", torch.bfloat16):
            head(torch.randn(4, first.in_features, device="cuda"))
        assert seen == [expected] * 2


def test_a_rounded_norm_is_torch_s_to_one_rounding() -> None:
    """A mean far from zero: summed in bfloat16 it would be off by a hundredth of it."""
    torch.manual_seed(3)
    x = (30.0 + torch.randn(16, 768)).bfloat16()
    norm = RoundedLayerNorm(768)
    nn.init.normal_(norm.weight, 1.0, 0.2)
    nn.init.normal_(norm.bias)
    weight, bias = (p.detach().bfloat16().double() for p in (norm.weight, norm.bias))
    exact = nn.functional.layer_norm(x.double(), (768,), weight, bias, norm.eps)
    with torch.autocast("cpu", torch.bfloat16):
        found = norm(x)
    assert found.dtype == torch.bfloat16
    assert ((found.double() - exact).abs() <= 2.0**-8 * exact.abs() + 1e-5).all()
    assert torch.equal(norm(x.float()), nn.LayerNorm.forward(norm, x.float()))


def test_a_stream_of_two_bytes_keeps_less_for_the_backward_pass() -> None:
    """Counted from what autograd keeps, as `mlip doctor --plan` does."""
    sizes = "hidden_size: 64, num_hidden_layers: 4, num_attention_heads: 4, intermediate_size: 128"
    settings = [
        *("train.precision=bf16", "model.vision.kind=vit", "data.crop_px=32", "data.max_tokens=12"),
        *("model.embed_dim=16", "model.heads.hidden=16"),
        f"model.vision.options={{{sizes}, patch_size: 8}}",
        f"model.text.options={{{sizes}}}",
    ]
    wide, narrow = (measure(load([], [*settings, f"train.residual={r}"])) for r in ("fp32", "bf16"))
    assert narrow.image_row < 0.9 * wide.image_row
    assert narrow.text_row < 0.9 * wide.text_row


def test_a_rounded_stream_without_bf16_is_refused() -> None:
    with pytest.raises(ConfigError, match="train.residual=bf16 with train.precision=fp32"):
        load([], ["train.residual=bf16"])
