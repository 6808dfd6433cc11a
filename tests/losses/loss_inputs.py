"""Small awkward batches, a two-tower fake model, and contexts for the tests of the losses."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from mlip.batch import (
    ABSENT,
    PRESENT,
    UNCERTAIN,
    Batch,
    Features,
    ImageFeatures,
    KnowledgeFeatures,
    TextFeatures,
)
from mlip.kernels.token_knowledge_patch import token_knowledge_patch_scores
from mlip.losses.context import LossContext
from mlip.ranks.distributed import world_group
from mlip.settings.config import Config, load
from mlip.unit_length import unit_length

PAIRS, PATCHES, TOKENS, ENTITIES, DIM = 9, 5, 6, 3, 8
EMPTY = 4  # the pair whose report has no token and no entity
LEAVES = ("image", "patches", "text", "tokens", "entities")


class FakeScales(nn.Module):
    """The learned scales as mlip.model has them, at values where every softmax is soft."""

    def __init__(self, logit_scale: float = 5.0) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(logit_scale).log())
        self.log_scale_local = nn.Parameter(torch.tensor(logit_scale).log())
        self.attention_scale = nn.Parameter(torch.tensor(4.0))

    def logit_scale(self) -> Tensor:
        return self.log_scale.exp()

    def logit_scale_local(self) -> Tensor:
        return self.log_scale_local.exp()


def config_of(*overrides: str) -> Config:
    small = [f"model.embed_dim={DIM}", "loss.category.prototypes=6", "loss.matching.heads=2"]
    return load([], [*small, *overrides])


def make_batch() -> Batch:
    """Nine pairs: 0 and 5 share a pair_id, 1 and 6 a set of present concepts, 4 is empty,
    3 has no present entity (absent and uncertain only), lengths differ."""
    lengths = torch.tensor([4, 3, 1, 2, 0, 4, 3, 2, 4])
    position = torch.arange(TOKENS)
    content = (position >= 1) & (position <= lengths[:, None])
    ids = torch.tensor(
        [[3, 1, 0], [2, 4, 2], [5, 0, 0], [1, 2, 0], [0, 0, 0], [6, 0, 0], [4, 2, 0], [7, 1, 0],
         [8, 5, 3]]
    )  # fmt: skip
    states = torch.full((PAIRS, ENTITIES), PRESENT)
    states[3] = torch.tensor([ABSENT, UNCERTAIN, PRESENT])
    states[7, 1] = ABSENT
    counts = torch.tensor([2, 3, 1, 2, 0, 1, 2, 2, 3])
    return Batch(
        image=torch.randn(PAIRS, 1, 4, 4, generator=torch.Generator().manual_seed(5)),
        token_ids=torch.arange(PAIRS * TOKENS).view(PAIRS, TOKENS) % 11,
        token_mask=position <= lengths[:, None] + 1,
        content_mask=content,
        entity_ids=ids,
        entity_state=states,
        entity_mask=torch.arange(ENTITIES) < counts[:, None],
        pair_id=torch.tensor([10, 11, 12, 13, 14, 10, 16, 17, 18]),
        global_index=torch.arange(PAIRS) + 90,
        row_index=torch.arange(PAIRS) + 500,
    )


def make_leaves(seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "image": (PAIRS, DIM),
        "patches": (PAIRS, PATCHES, DIM),
        "text": (PAIRS, DIM),
        "tokens": (PAIRS, TOKENS, DIM),
        "entities": (PAIRS, ENTITIES, DIM),
    }
    return {n: torch.randn(s, generator=generator, dtype=dtype) for n, s in shapes.items()}


def rows_of(batch: Batch, rows: Any) -> Batch:
    named = {name: value for name, value in vars(batch).items() if value is not None}
    return Batch(**{name: value[rows] for name, value in named.items()})


def features_of(leaves: dict[str, Tensor], batch: Batch) -> Features:
    is_present = batch.entity_mask & (batch.entity_state == PRESENT)
    weight = torch.tensor([1.0, 0.0, 0.5], dtype=leaves["image"].dtype)[batch.entity_state]
    mean = torch.where(is_present.unsqueeze(-1), leaves["entities"], 0.0).sum(dim=1)
    return Features(
        image=ImageFeatures(unit_length(leaves["image"]), leaves["patches"], (1, PATCHES)),
        text=TextFeatures(unit_length(leaves["text"]), leaves["tokens"]),
        knowledge=KnowledgeFeatures(
            entities=leaves["entities"],
            mask=batch.entity_mask,
            row_weights=weight * batch.entity_mask,
            present_mean=unit_length(mean),
            has_present=is_present.any(dim=1),
        ),
    )


def context_of(
    leaves: dict[str, Tensor], batch: Batch, scales: FakeScales | None = None, **keys: Any
) -> LossContext:
    """A LossContext over leaves; keys may set seed, step and progress."""
    features = features_of(leaves, batch)
    used = scales if scales is not None else FakeScales().to(leaves["image"].dtype)

    def local_scores(group: Any) -> Tensor:
        return scores(features, batch, used)

    return LossContext(
        features,
        batch,
        scales=used,
        seed=keys.get("seed", 3),
        step=keys.get("step", 7),
        progress=keys.get("progress", 2.0),
        local_scores=local_scores,
    )


def scores(features: Features, batch: Batch, scales: FakeScales) -> Tensor:
    return token_knowledge_patch_scores(
        features.image.patches,
        features.text.tokens,
        features.knowledge.entities,
        token_weights=batch.content_mask.to(features.text.embedding.dtype),
        knowledge_weights=features.knowledge.row_weights,
        knowledge_mask=features.knowledge.mask,
        attention_scale=scales.attention_scale,
        group=world_group(),
    )


def with_grad(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.clone().requires_grad_() for name, value in leaves.items()}


class FakeModel(nn.Module):
    """mlip.model.MLIPModel's interface over two linear towers."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Linear(16, (1 + PATCHES) * DIM)
        self.words = nn.Embedding(11, DIM)
        self.report = nn.Linear(DIM, DIM)
        self.concepts = nn.Embedding(9, DIM)
        self.states = nn.Embedding(3, DIM)
        self.scales = FakeScales()

    def encode_image(self, image: Tensor) -> ImageFeatures:
        rows = self.image(image.flatten(1)).view(-1, 1 + PATCHES, DIM)
        return ImageFeatures(unit_length(rows[:, 0]), rows[:, 1:], (1, PATCHES))

    def encode_text(
        self, token_ids: Tensor, token_mask: Tensor, content_mask: Tensor
    ) -> TextFeatures:
        words = self.words(token_ids)
        mean = (words * token_mask.unsqueeze(-1)).sum(dim=1)
        return TextFeatures(unit_length(self.report(mean)), words)

    def encode_knowledge(self, ids: Tensor, state: Tensor, mask: Tensor) -> KnowledgeFeatures:
        entities = self.concepts(ids) + self.states(state)
        is_present = mask & (state == PRESENT)
        weight = torch.tensor([1.0, 0.0, 0.5], dtype=entities.dtype)[state] * mask
        mean = unit_length((entities * is_present.unsqueeze(-1)).sum(dim=1))
        return KnowledgeFeatures(entities, mask, weight, mean, is_present.any(dim=1))

    def local_scores(
        self,
        patches: Tensor,
        tokens: Tensor,
        content_mask: Tensor,
        attention: Tensor | None,
        knowledge: KnowledgeFeatures,
        *,
        group: Any = None,
    ) -> Tensor:
        return token_knowledge_patch_scores(
            patches,
            tokens,
            knowledge.entities,
            token_weights=content_mask.to(tokens.dtype),
            knowledge_weights=knowledge.row_weights,
            knowledge_mask=knowledge.mask,
            attention_scale=self.scales.attention_scale,
            group=group,
        )
