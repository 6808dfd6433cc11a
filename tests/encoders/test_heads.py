"""The heads' batch norm sees real rows only, and the same head serves vectors and rows."""

from __future__ import annotations

import torch
from torch import nn

from mlip.config import Heads
from mlip.encoders.heads import ProjectionHead, RowBatchNorm


def test_only_real_rows_decide_and_padding_becomes_zero() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, 4, generator=generator) * 2 + 1
    mask = torch.arange(5) < torch.tensor([5, 2, 1])[:, None]
    x[~mask] = torch.nan
    ours, plain = RowBatchNorm(4), nn.BatchNorm1d(4)
    for mode in (True, False):  # statistics of the batch, then the ones that were kept
        ours.train(mode)
        plain.train(mode)
        out = ours(x, mask)
        torch.testing.assert_close(out[mask], plain(x[mask]))
        assert bool((out[~mask] == 0).all())
    torch.testing.assert_close(ours.norm.running_mean, plain.running_mean)


def test_a_head_with_it_serves_vectors_and_rows_alike() -> None:
    torch.manual_seed(0)
    head = ProjectionHead(6, 3, Heads(hidden=8, norm="batch")).eval()
    x = torch.randn(2, 4, 6)
    torch.testing.assert_close(head(x)[:, 1], head(x[:, 1]))
    kept = torch.tensor([[True, True, False, False], [True, False, True, True]])
    torch.testing.assert_close(head(x, kept)[kept], head(x)[kept])
