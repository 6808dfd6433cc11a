"""Keyed draws: pure functions of the key, uniform, normal, and independent between keys."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mlip.kernels.keyed_uniform import splitmix_uniform
from mlip.keyed_random import STREAMS, keyed_normal, keyed_uniform

INDEX = torch.arange(20_000)


def test_a_draw_depends_on_its_own_key_only() -> None:
    whole = keyed_uniform(7, "augment", 3, INDEX, 2)
    shuffled = torch.randperm(len(INDEX))
    assert torch.equal(keyed_uniform(7, "augment", 3, INDEX[shuffled], 2), whole[shuffled])
    assert torch.equal(keyed_uniform(7, "augment", 3, INDEX[5:6], 2), whole[5:6])


def _splitmix64(state: int) -> int:
    """The paper's generator on Python's integers, cut to 64 bits after every step."""
    most = (1 << 64) - 1
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & most
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & most
    return state ^ (state >> 31)


@pytest.mark.parametrize("word", [0, 7, 2**63 + 5])
def test_numbers_are_those_of_every_other_version(word: int) -> None:
    """A run that goes on after an upgrade draws what it would have drawn."""
    made = splitmix_uniform(word, torch.tensor([0, 3, 10**12]), 2)
    gamma = 0x9E3779B97F4A7C15
    for row, index in zip(made.tolist(), (0, 3, 10**12), strict=True):
        key = _splitmix64((word + (index + 1) * gamma) % 2**64)
        bits = [_splitmix64((key + (lane + 1) * gamma) % 2**64) >> 11 for lane in (0, 1)]
        assert row == [(b + 0.5) * 2.0**-53 for b in bits]


def test_draws_are_uniform_and_never_zero_or_one() -> None:
    draws = keyed_uniform(1, "order", 0, INDEX, 4)
    counts = torch.histc(draws.float(), bins=20, min=0.0, max=1.0)
    expected = draws.numel() / 20
    # chi-square with 19 degrees of freedom stays below 43.8 in 999 of 1000 cases
    assert float(((counts - expected) ** 2 / expected).sum()) < 43.8
    assert 0.0 < float(draws.min()) and float(draws.max()) < 1.0


def _without_mixing(state: int) -> int:
    """The number that _splitmix64 takes to `state`."""
    most = (1 << 64) - 1
    for shift, factor in ((31, 0x94D049BB133111EB), (27, 0xBF58476D1CE4E5B9), (30, 1)):
        whole = state
        for _ in range(64 // shift):
            whole = state ^ (whole >> shift)
        state = (whole * pow(factor, -1, 1 << 64)) & most
    return state


def test_the_largest_number_is_below_one_and_the_least_above_zero() -> None:
    """Rows are int(number * rows): 1 would be past the last. 2^53 - 1 and a half rounds to 2^53."""
    gamma = 0x9E3779B97F4A7C15
    for bits, wanted in ((2**64 - 1, 1 - 2.0**-53), (0, 2.0**-54)):
        key = (_without_mixing(bits) - gamma) % 2**64
        word = (_without_mixing(key) - gamma) % 2**64
        assert splitmix_uniform(word, torch.tensor([0])).item() == wanted


def test_neighbouring_keys_are_uncorrelated() -> None:
    a = keyed_uniform(1, "augment", 5, INDEX)[:, 0]
    others = [
        keyed_uniform(2, "augment", 5, INDEX)[:, 0],
        keyed_uniform(1, "sentences", 5, INDEX)[:, 0],
        keyed_uniform(1, "augment", 6, INDEX)[:, 0],
        keyed_uniform(1, "augment", 5, INDEX + 1)[:, 0],
    ]
    for b in others:
        correlation = torch.corrcoef(torch.stack([a, b]))[0, 1]
        assert abs(float(correlation)) < 4 / len(INDEX) ** 0.5


def test_normal_draws_have_unit_moments() -> None:
    draws = keyed_normal(3, "divergence_image", 11, INDEX, 5).double()
    assert abs(float(draws.mean())) < 0.02
    assert abs(float(draws.var()) - 1) < 0.02
    assert abs(float((draws**4).mean()) - 3) < 0.1


def test_large_and_negative_seeds_are_keys_too() -> None:
    seeds = [0, -1, 2**63, 2**64 - 1]
    draws = [float(keyed_uniform(seed, "augment", 0, INDEX[:1])) for seed in seeds]
    assert draws[1] == draws[3]  # equal modulo 2^64
    assert len(set(draws[:3])) == 3


def test_streams_have_distinct_numbers() -> None:
    assert len(set(STREAMS.values())) == len(STREAMS)


@pytest.mark.parametrize(
    ("word", "index", "width", "named"),
    [
        (-1, INDEX, 1, "word: expected an integer 0"),
        (1 << 64, INDEX, 1, "word: expected an integer 0"),
        (2.5, INDEX, 1, "word: expected an integer"),
        (torch.tensor([1, 2]), INDEX, 1, "word: expected an integer"),
        (1, INDEX.int(), 1, "index .20000. torch.int32"),
        (1, INDEX[:, None], 1, "index .20000, 1. torch.int64"),
        (1, INDEX, 0, "width 0"),
        (1, INDEX, 1.5, "width 1.5"),
    ],
)
def test_a_key_of_another_kind_is_refused(
    word: Any, index: torch.Tensor, width: Any, named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        splitmix_uniform(word, index, width)
