"""The one attention function: every implementation agrees with float64 softmax attention."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch

from mlip.encoders.attention import attention, require_usable
from mlip.encoders.text import TextEncoder
from mlip.encoders.vision import VisionEncoder
from mlip.settings.config import Text, Vision
from tests.virtual_gpu import virtual_gpu


def _inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 3, 5, 4, dtype=torch.float64) for _ in range(3))
    mask = torch.rand(2, 1, 1, 5) > 0.3
    mask[..., 0] = True
    return query, key, value, mask.expand(2, 1, 5, 5).clone()


@pytest.mark.parametrize("impl", ["sdpa", "eager"])
def test_attention_equals_the_written_out_formula(impl: str) -> None:
    query, key, value, mask = _inputs()
    scores = torch.einsum("bhsd,bhtd->bhst", query, key) * 0.7
    weights = torch.softmax(scores.masked_fill(~mask, -torch.inf), dim=-1)
    truth = torch.einsum("bhst,bhtd->bhsd", weights, value)
    out = attention(query, key, value, mask, impl=impl, scale=0.7)
    # eager takes its softmax in float32
    torch.testing.assert_close(out, truth, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("impl", ["sdpa", "eager"])
def test_a_row_that_may_attend_to_nothing_gives_zeros(impl: str) -> None:
    query, key, value, mask = _inputs()
    mask[0, :, 2] = False
    out = attention(query, key, value, mask, impl=impl, scale=0.7)
    assert torch.equal(out[0, :, 2], torch.zeros_like(out[0, :, 2]))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_xformers_without_a_gpu_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="model.attention=xformers"):
        require_usable("xformers")


def test_xformers_without_a_kernel_that_runs_is_refused_before_the_first_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # what a build for another CUDA says, on a machine that has a GPU
    def memory_efficient_attention(*args: object, **kwargs: object) -> torch.Tensor:
        raise NotImplementedError("No operator found for `memory_efficient_attention_forward`\n...")

    ops = ModuleType("xformers.ops")
    ops.memory_efficient_attention = memory_efficient_attention  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "xformers", found := ModuleType("xformers"))
    found.__spec__ = ModuleSpec("xformers", None)
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    module = sys.modules["mlip.encoders.attention"]
    monkeypatch.setattr(module, "_xformers_obstacle", module._xformers_obstacle.__wrapped__)
    with virtual_gpu(), pytest.raises(ValueError, match="no kernel.*No operator found.*sdpa"):
        require_usable("xformers")


def test_xformers_is_called_in_its_own_layout_and_agrees_with_the_formula(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # a stand-in with xformers' contract: [B, S, heads, d], an additive bias whose rows start at
    # multiples of 8 elements (its CUDA kernels refuse others); the real one needs a GPU
    def memory_efficient_attention(query, key, value, attn_bias, p, scale):
        assert p == 0.0 and attn_bias.shape == (2, 3, 5, 5)
        assert all(stride % 8 == 0 for stride in attn_bias.stride()[:-1])
        scores = torch.einsum("bshd,bthd->bhst", query, key) * scale + attn_bias
        return torch.einsum("bhst,bthd->bshd", torch.softmax(scores, dim=-1), value)

    ops = ModuleType("xformers.ops")
    ops.memory_efficient_attention = memory_efficient_attention  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "xformers", ModuleType("xformers"))
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    query, key, value, mask = _inputs()
    mask[0, :, 2] = False
    out = attention(query, key, value, mask, impl="xformers", scale=0.7)
    expected = attention(query, key, value, mask, impl="sdpa", scale=0.7)
    torch.testing.assert_close(out, expected)
    narrow = attention(query, key, value, mask[:, :, :1], impl="xformers", scale=0.7)
    torch.testing.assert_close(
        narrow, attention(query, key, value, mask[:, :, :1], impl="sdpa", scale=0.7)
    )


TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}


def _tower(kind: str) -> tuple[torch.nn.Module, list[torch.nn.Module], tuple[torch.Tensor, ...]]:
    """A tower in evaluation mode, its self-attentions, and what it is given."""
    torch.manual_seed(0)
    if kind == "vit":
        settings = Vision(kind="vit", options=TINY | {"patch_size": 8})
        vision = VisionEncoder(settings, channels=1, image_px=16).eval()
        parts = [layer.attention for layer in vision.tower.backbone.layers]
        return vision, parts, (torch.randn(2, 1, 16, 16),)
    text = TextEncoder(Text(options=TINY), vocab_size=20, max_tokens=6).eval()
    parts = [layer.attention.self for layer in text.backbone.encoder.layer]
    mask = torch.arange(6) < torch.tensor([[6], [3]])
    return text, parts, (torch.randint(20, (2, 6)), mask)


@pytest.mark.parametrize("kind", ["vit", "bert"])
def test_states_are_rounded_once_for_query_key_and_value_and_to_the_same_numbers(kind: str) -> None:
    """Oracle: the same tower whose products each round for themselves."""
    with virtual_gpu():
        tower, parts, given = _tower(kind)
        tower, given = tower.to("cuda"), tuple(x.to("cuda") for x in given)
        seen: list[torch.Tensor] = []
        for part in parts:
            for linear in [m for n, m in part.named_children() if n[0] in "qkv"]:
                linear.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
        results = []
        for hooks in ("rounded once", "by each"):
            if hooks == "by each":
                for part in parts:
                    part._forward_pre_hooks.clear()
            with torch.autocast("cuda", torch.bfloat16):
                states = tower(*given)[1]
            weights = torch.linspace(-1, 1, states.shape[-1], device="cuda")
            learned = list(parts[0].parameters())
            gradients = torch.autograd.grad((states.float() * weights).sum(), learned)
            results.append([states.detach(), *gradients])
        once, by_each = seen[:6], seen[6:]
        assert all(x.dtype == torch.bfloat16 for x in once)
        assert len({id(x) for x in once}) == len(parts) == 2
        assert all(x.dtype == torch.float32 for x in by_each) and len(by_each) == 6
        assert torch.equal(results[0][0], results[1][0])
        # a bias of keys has no gradient but rounding: held to the largest
        largest = max(float(x.norm()) for x in results[1][1:])
        for ours, theirs in zip(results[0][1:], results[1][1:], strict=True):
            assert float((ours - theirs).norm()) <= 2e-3 * largest
        seen.clear()
        tower(*given)  # without autocast nothing is rounded
        assert all(x.dtype == torch.float32 for x in seen) and seen
