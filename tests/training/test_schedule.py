"""Learning rate and weight-decay groups against values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn as nn

from mlip.settings.config import load
from mlip.training.schedule import learning_rate, peak_lr, total_steps, undecayed_names


def _config(*more: str):
    settings = ["train.lr=0.1", "train.lr_reference_pairs=0", "train.warmup_steps=4"]
    return load([], [*settings, *more])


def test_warm_up_is_linear_and_the_cosine_ends_at_its_floor():
    config = _config("train.min_lr_share=0.1")
    rates = [learning_rate(step, 11, config) for step in range(11)]
    assert rates[:4] == pytest.approx([0.025, 0.05, 0.075, 0.1])
    assert rates[4] == pytest.approx(0.1)
    # steps 4 to 10: half-way is step 7, cos(pi/2) = 0
    assert rates[7] == pytest.approx(0.1 * (0.1 + 0.9 * 0.5))
    assert rates[10] == pytest.approx(0.01)
    assert all(a >= b for a, b in zip(rates[3:], rates[4:], strict=False))


def test_rate_stays_at_its_peak_until_the_last_share_of_the_steps():
    rates = [learning_rate(s, 25, _config("train.decay_share=0.4")) for s in range(25)]
    # steps 4 to 24 are 20 intervals, of which the last 8 fall: 16 to 24, half-way at 20
    assert rates[4:17] == pytest.approx([0.1] * 13)
    assert rates[20] == pytest.approx(0.05)
    assert rates[24] == pytest.approx(0.0)
    assert [learning_rate(s, 25, _config("train.decay_share=0")) for s in (4, 24)] == [0.1, 0.1]


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5])
def test_runs_shorter_than_the_warm_up_have_a_positive_rate_at_every_step(steps):
    rates = [learning_rate(step, steps, _config()) for step in range(steps)]
    # and reach the peak
    assert min(rates) > 0 and max(rates) == pytest.approx(0.1)


def test_rate_is_scaled_by_the_square_root_of_the_batch():
    config = load([], ["train.lr=2e-5", "batch.global_pairs=576"])
    assert peak_lr(config) == pytest.approx(2e-5 * math.sqrt(4))


def test_epochs_become_steps_that_cover_them():
    config = load([], ["train.epochs=2.5", "batch.global_pairs=16"])
    assert total_steps(config, rows=100) == 16  # 250 samples in batches of 16
    assert total_steps(load([], ["train.max_steps=7"]), rows=100) == 7


def test_no_decay_on_biases_norms_scales_and_prototypes():
    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(2, 2)
            self.norm = nn.LayerNorm(2)
            self.embedding = nn.Embedding(3, 2)
            self.prototypes = nn.Parameter(nn.init.zeros_(nn.Linear(2, 2).weight))
            self.log_scale = nn.Parameter(self.linear.bias.detach().clone())
            self.grid = nn.Conv2d(1, 1, 3)
            self.norms = nn.LayerNorm((2, 2))  # numbers of two sides
            self.positions = nn.ParameterDict({"bias": nn.Parameter(torch.zeros(2, 2))})
            self.layer = nn.ParameterDict({"gamma": nn.Parameter(torch.zeros(2))})

    names = undecayed_names(Part())
    assert names == {
        "linear.bias",
        "norm.weight",
        "norm.bias",
        "prototypes",
        "log_scale",
        "grid.bias",
        "norms.weight",
        "norms.bias",
        "positions.bias",
        "layer.gamma",
    }
