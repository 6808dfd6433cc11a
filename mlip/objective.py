"""Objective: the model and its weighted losses; one forward call is one step's total."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from mlip.batch import Batch, Features, ImageFeatures, KnowledgeFeatures, TextFeatures
from mlip.losses import LOSSES
from mlip.losses.context import LossContext
from mlip.losses.held_out import HELD_OUT_LOSSES, recall_terms
from mlip.ranks.distributed import max_of_numbers
from mlip.settings.config import Config, ConfigError
from mlip.training.determinism import random_part
from mlip.training.grad_cache import cached_forward, equal_passes


class Objective(nn.Module):
    """MLIPModel plus every loss whose weight is above 0.

    forward(batch, step=..., progress=...) -> (total, terms): the total is the same on every rank,
    and averaging parameter gradients over ranks gives the gradient of the whole global batch.
    `terms` holds each loss before its weight, detached, for the log. `progress` is in epochs.
    With held_out=True, in evaluation mode: the contrastive losses alone, and in `terms` also
    recall@10 among the batch's pairs, for pairs that are not trained on.

    Raises:  ConfigError where every weight is 0, or run.exact is set and a part cannot be exact
    Source:  method.md section 7.
    """

    def __init__(self, config: Config, model: nn.Module) -> None:
        super().__init__()
        self.config = config
        self.model: Any = model
        self.weights = {name: getattr(config.loss, name).weight for name in LOSSES}
        self.losses = nn.ModuleDict(
            {
                name: cls(config, config.model.embed_dim)
                for name, cls in LOSSES.items()
                if self.weights[name] > 0
            }
        )
        if not self.losses:
            raise ConfigError("every loss.<name>.weight is 0: nothing would be trained")
        if config.run.exact:
            _require_exact(model)

    def forward(
        self, batch: Batch, *, step: int, progress: float, held_out: bool = False
    ) -> tuple[Tensor, dict[str, Tensor]]:
        context = self.context(batch, step=step, progress=progress)
        terms: dict[str, Tensor] = {}
        total: Tensor | float = 0.0
        losses = {n: x for n, x in self.losses.items() if not held_out or n in HELD_OUT_LOSSES}
        # losses are float32 or better whatever precision the caller's towers run in
        with torch.autocast(batch.pair_id.device.type, enabled=False):
            for loss in losses.values():
                # what the host will have to read is asked for before the long ones are queued
                if (prepare := getattr(loss, "prepare", None)) is not None:
                    context.prepared[loss] = prepare(context)
            for name, loss in losses.items():
                value = loss(context)
                terms[name] = value.detach()
                total = total + self.weights[name] * value
            if held_out:
                terms |= recall_terms(context)
        for name, value in context.regularisers.items():
            terms[name] = value.detach()
            total = total + value
        assert isinstance(total, Tensor)
        return total, terms

    def context(self, batch: Batch, *, step: int, progress: float) -> LossContext:
        """Features of a batch, micro-batch by micro-batch where set, and what the losses share."""
        features = self.encode(batch)
        model, image, text = self.model, features.image, features.text

        def local_scores(group: Any) -> Tensor:
            # nothing here may lead back to the context: such a circle keeps a step's batch and
            # features until Python's collector comes, which for old objects it hardly ever does
            report, shown, knowledge = _equal_widths(text, batch.content_mask, features.knowledge)
            return model.local_scores(
                image.patches,
                report.tokens,
                shown,
                report.attention,
                knowledge,
                group=group,
            )

        return LossContext(
            features,
            batch,
            scales=model.scales,
            seed=self.config.run.seed,
            step=step,
            progress=progress,
            local_scores=local_scores,
        )

    def encode(self, batch: Batch) -> Features:
        """Both towers over this rank's pairs, and its entities."""
        settings, model = self.config.batch, self.model
        grid: list[tuple[int, int]] = []

        def image_tower(image: Tensor) -> tuple[Tensor, ...]:
            features = model.encode_image(image)
            grid.append(features.grid)
            return features.embedding, features.patches

        def text_tower(*tensors: Tensor) -> tuple[Tensor, ...]:
            features = model.encode_text(*tensors)
            kept = () if features.attention is None else (features.attention,)
            return features.embedding, features.tokens, *kept

        def passes(micro_size: int) -> int:
            return equal_passes(len(batch), micro_size, batch.image.device)

        image_size, text_size = settings.micro_images, settings.micro_texts
        image = cached_forward(image_tower, (batch.image,), image_size, passes(image_size))
        texts = [batch.token_ids, batch.token_mask, batch.content_mask]
        if batch.token_counts is not None:
            texts.append(batch.token_counts)
        text = cached_forward(text_tower, texts, text_size, passes(text_size))
        return Features(
            image=ImageFeatures(embedding=image[0], patches=image[1], grid=grid[0]),
            text=TextFeatures(text[0], text[1], text[2] if len(text) == 3 else None),
            knowledge=model.encode_knowledge(
                batch.entity_ids, batch.entity_state, batch.entity_mask
            ),
        )


def _equal_widths(
    text: TextFeatures, content_mask: Tensor, knowledge: KnowledgeFeatures
) -> tuple[TextFeatures, Tensor, KnowledgeFeatures]:
    """The same with T and K padded to the widest rank's: gathered rows must have one shape."""
    tokens, entities = text.tokens.shape[1], knowledge.mask.shape[1]
    widest = max_of_numbers([tokens, entities])
    more_tokens, more_entities = widest[0] - tokens, widest[1] - entities
    if more_tokens == more_entities == 0:
        return text, content_mask, knowledge
    text = dataclasses.replace(
        text,
        tokens=F.pad(text.tokens, (0, 0, 0, more_tokens)),
        attention=None if text.attention is None else F.pad(text.attention, (0, more_tokens)),
    )
    knowledge = dataclasses.replace(
        knowledge,
        entities=F.pad(knowledge.entities, (0, 0, 0, more_entities)),
        mask=F.pad(knowledge.mask, (0, more_entities)),
        row_weights=F.pad(knowledge.row_weights, (0, more_entities)),
    )
    return text, F.pad(content_mask, (0, more_tokens)), knowledge


def _require_exact(model: nn.Module) -> None:
    """Refuse what draws random numbers per rank or per pass; the losses themselves are keyed."""
    name = random_part(model)
    if name is not None:
        tower = "model.text.options" if ".text" in f".{name}" else "model.vision.options"
        raise ConfigError(
            f"run.exact: the model's {name} drops at random, by rank and by micro-batch; set "
            f"its probability to 0 in {tower} (hidden_dropout_prob, "
            "attention_probs_dropout_prob)"
        )
