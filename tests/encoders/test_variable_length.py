"""Attention over texts of any length one behind another is attention over padded ones."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from mlip.encoders.attention import attention, variable_length_attention
from mlip.encoders.packing import Packing
from mlip.encoders.text import TextEncoder
from mlip.settings.config import Text
from tests.kernels.oracle import relative_error

OPTIONS = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
LENGTHS = (12, 2, 7, 1)


def packed_rows(device: str, dtype: torch.dtype) -> tuple[Packing, list[Tensor]]:
    """Query, key and value [1, heads, n, d] as a BERT layer hands them over."""
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randn(1, sum(LENGTHS), 2, 32, generator=generator) for _ in range(3)]
    made = [x.to(device, dtype).transpose(1, 2).requires_grad_() for x in rows]
    return Packing.of(mask.to(device)), made


@contextlib.contextmanager
def waits_are_errors(device: str) -> Iterator[None]:
    if device != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


# torch asks the driver which attention it could use, for tensors on a CPU too
NO_DRIVER = torch.version.cuda is not None and not torch.cuda.is_available()
CASES = [
    pytest.param(
        "cpu",
        torch.float64,
        1e-10,
        marks=pytest.mark.skipif(NO_DRIVER, reason="a CUDA build of torch without a driver"),
    ),
    pytest.param("cuda", torch.float32, 1e-4, marks=pytest.mark.gpu),
    pytest.param("cuda", torch.bfloat16, 2e-2, marks=pytest.mark.gpu),
]


@pytest.mark.parametrize(("device", "dtype", "tolerance"), CASES)
def test_every_text_attends_to_itself_alone(
    device: str, dtype: torch.dtype, tolerance: float
) -> None:
    """Oracle: padded attention with a mask, in the same type; gradients of both."""
    packing, rows = packed_rows(device, dtype)
    weight = torch.linspace(-1.0, 1.0, sum(LENGTHS) * 64).view(1, -1, 2, 32).to(device, dtype)
    with waits_are_errors(device):
        query, key, value = rows
        out = variable_length_attention(query, key, value, packing, scale=0.3, dropout=0.0)
        got = torch.autograd.grad((out * weight).sum(), rows)
    query, key, value = (packing.unpack_heads(x) for x in rows)
    padded = attention(query, key, value, packing.attention_mask(), impl="sdpa", scale=0.3)
    truth = packing.pack(padded.transpose(1, 2))
    want = torch.autograd.grad((truth * weight).sum(), rows)
    assert out.shape == truth.shape == (1, sum(LENGTHS), 2, 32)
    for ours, theirs in zip([out, *got], [truth, *want], strict=True):
        assert relative_error(ours, theirs) <= tolerance


@pytest.mark.gpu
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_text_tower_on_a_gpu_gives_the_states_and_gradients_of_padded_reports(
    checkpointing: bool,
) -> None:
    mask = (torch.arange(12) < torch.tensor(LENGTHS)[:, None]).cuda()
    ids = torch.randint(5, 50, mask.shape, generator=torch.Generator().manual_seed(2)).cuda()
    results = []
    for kind in ("sdpa", "varlen"):
        torch.manual_seed(0)
        is_packed = kind == "varlen"
        encoder = TextEncoder(
            Text(options=OPTIONS, packed=is_packed, checkpointing=checkpointing),
            vocab_size=50,
            max_tokens=12,
            attention=kind,
            keeps_attention=True,
        ).cuda()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            _, states, attended = encoder(ids, mask)
        assert attended is not None
        # not the squares: behind a normalisation their sum is a constant, and its gradient nothing
        weight = torch.linspace(-1.0, 1.0, states.shape[-1], device="cuda")
        (states[mask].float() * weight).sum().backward()
        # a key's bias moves every score of a query alike: its gradient is rounding alone
        gradients = [
            p.grad
            for name, p in encoder.named_parameters()
            if p.grad is not None and not name.endswith("key.bias")
        ]
        results.append([states[mask], attended, *gradients])
    assert len(results[0]) == len(results[1]) > 25
    for padded, jagged in zip(*results, strict=True):
        assert relative_error(jagged, padded) <= 3e-2
