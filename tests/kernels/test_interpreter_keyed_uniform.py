"""The kernel of keyed draws in Triton's interpreter: torch's numbers to the bit."""

from __future__ import annotations

import pytest
import torch

from mlip.kernels.keyed_uniform import splitmix_uniform
from tests.kernels.interpreting import interpreted

pytest.importorskip("triton", reason="triton is not installed")

# the ends of both number ranges, words whose lower halves look like other types, and the one whose
# first number would round to 1
WORDS = [0, 1, 16, 2**31, 2**63 - 1, 2**63, 2**64 - 1, 0x9E3779B97F4A7C15, 0x1FDB84807C8BC327]


@interpreted
@pytest.mark.parametrize("width", [1, 3, 512, 1500])
@pytest.mark.parametrize("word", WORDS)
def test_numbers_are_torch_s_to_the_bit(word: int, width: int) -> None:
    ends = torch.tensor([0, 1, -1, 2**62, -(2**63), 2**63 - 1])
    index = torch.cat([ends, torch.arange(1000, 1005)])
    made = [splitmix_uniform(word, index, width, impl=impl) for impl in ("triton", "torch")]
    assert torch.equal(*made)


@interpreted
def test_rows_with_gaps_and_no_rows() -> None:
    index = torch.arange(40)[::3]
    made = [splitmix_uniform(9, index, 5, impl=impl) for impl in ("triton", "torch")]
    assert torch.equal(*made) and splitmix_uniform(9, index[:0], 5, impl="triton").shape == (0, 5)
