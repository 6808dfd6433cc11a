"""How hard phantoms are: a blind network must not do them, a supervised one must.

Run alone: python -m pytest -m long -s tests/dataloading/test_phantom_hardness.py (10 minutes on
one core). The numbers it prints are those of docs/phantoms.md.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ResNetConfig, ResNetModel

from mlip.dataloading.phantom.study import generate_study
from mlip.dataloading.phantom.study_types import CONCEPT_IDS

PX, CROP = 144, 128
pytestmark = pytest.mark.long


def draw(seed: int, count: int) -> tuple[Tensor, Tensor]:
    """Centre crops [N, 1, 128, 128], normalised as in training, and labels [N, 8]."""
    images = np.empty((count, 1, CROP, CROP), np.float32)
    labels = np.zeros((count, len(CONCEPT_IDS)), np.float32)
    edge = (PX - CROP) // 2
    for index in range(count):
        study = generate_study(seed, index, PX)
        crop = study.image[edge : edge + CROP, edge : edge + CROP]
        images[index, 0] = (crop / np.float32(65535) - 0.5) / 0.25
        labels[index, [CONCEPT_IDS.index(name) for name in study.labels]] = 1
    return torch.from_numpy(images), torch.from_numpy(labels)


def aurocs(labels: Tensor, scores: np.ndarray, name: str) -> np.ndarray:
    values = np.array([roc_auc_score(labels[:, k], scores[:, k]) for k in range(len(CONCEPT_IDS))])
    table = ", ".join(f"{c} {v:.3f}" for c, v in zip(CONCEPT_IDS, values, strict=True))
    print(f"\n{name}: macro {values.mean():.3f} (n={len(labels)}); {table}")
    return values


def probe_random_encoder(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], seed: int):
    """AUROC per finding of a logistic regression on a frozen, untrained small ResNet."""
    torch.manual_seed(seed)
    config = ResNetConfig(
        num_channels=1,
        embedding_size=32,
        hidden_sizes=[32, 64, 128],
        depths=[2, 2, 2],
        layer_type="basic",
    )
    tower = ResNetModel(config)
    with torch.no_grad():
        tower.train()  # batch statistics only: no weight changes
        for batch in train[0][:600].split(100):
            tower(batch)
        tower.eval()
        features = [
            torch.cat([tower(b).pooler_output.flatten(1) for b in images.split(100)]).numpy()
            for images in (train[0], test[0])
        ]
    scaler = StandardScaler().fit(features[0])
    known, asked = (scaler.transform(x) for x in features)
    scores = [
        LogisticRegression(C=0.1, max_iter=2000).fit(known, train[1][:, k]).decision_function(asked)
        for k in range(len(CONCEPT_IDS))
    ]
    return aurocs(test[1], np.stack(scores, axis=1), f"random encoder, seed {seed}")


class SmallNet(nn.Module):
    """Seven convolutions; mean and maximum pooling, because nodules are small."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        plan = [(1, 16, 2), (16, 32, 1), (32, 48, 2), (48, 48, 1), (48, 96, 2), (96, 96, 1)]
        for inputs, outputs, stride in [*plan, (96, 128, 2), (128, 128, 1)]:
            layers += [
                nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
                nn.BatchNorm2d(outputs),
                nn.ReLU(),
            ]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(256, len(CONCEPT_IDS))

    def forward(self, images: Tensor) -> Tensor:
        grid = self.body(images)
        return self.head(torch.cat([grid.mean((2, 3)), grid.amax((2, 3))], 1).float())


def supervised_ceiling(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], epochs: int):
    """AUROC per finding of a small network trained on the labels."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    images, labels = train
    network: Any = SmallNet()
    network.to(memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(network.parameters(), 3e-3, weight_decay=0.02)
    steps = epochs * (len(images) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=steps)
    for _ in range(epochs):
        order = torch.from_numpy(rng.permutation(len(images)))
        for chosen in order[: len(order) // 64 * 64].split(64):
            shift = tuple(rng.integers(-6, 7, 2).tolist())
            batch = torch.roll(images[chosen], shift, (2, 3))
            with torch.autocast("cpu", torch.bfloat16):
                logits = network(batch.contiguous(memory_format=torch.channels_last))
            loss = F.binary_cross_entropy_with_logits(logits, labels[chosen])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    network.eval()
    with torch.no_grad():
        scores = torch.cat([network(batch) for batch in test[0].split(100)]).numpy()
    return aurocs(test[1], scores, f"supervised, {epochs} epochs of {len(images)}")


def test_a_linear_probe_on_a_random_encoder_stays_below_three_quarters() -> None:
    train, test = draw(1, 3000), draw(1_000_001, 1000)
    macro = [probe_random_encoder(train, test, seed).mean() for seed in (0, 1, 2)]
    assert max(macro) <= 0.75


def test_a_supervised_network_finds_every_finding() -> None:
    values = supervised_ceiling(draw(1, 6000), draw(1_000_001, 1000), epochs=8)
    assert values.mean() >= 0.97
    assert values.min() >= 0.90
