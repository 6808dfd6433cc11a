"""MLIPModel: towers, heads, knowledge projection and scales; everything inference needs.

What only training needs (divergence encoder, prototypes, matching head) lives with the losses.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from mlip.batch import ABSENT, PRESENT, UNCERTAIN, ImageFeatures, KnowledgeFeatures, TextFeatures
from mlip.encoders.heads import ProjectionHead
from mlip.encoders.residual import round_norms
from mlip.encoders.rounded_weights import RoundedTogether
from mlip.encoders.text import TextEncoder
from mlip.encoders.vision import VisionEncoder
from mlip.kernels.token_knowledge_patch import token_knowledge_patch_scores
from mlip.precision import takes_bf16
from mlip.settings.config import Config
from mlip.token_weights import token_weights
from mlip.unit_length import unit_length

MAX_LOG_SCALE = math.log(100.0)  # CLIP's bound on the learned scale (Radford et al. 2021, 2.5)
INITIAL_LOG_SCALE = math.log(1 / 0.07)


class Scales(nn.Module):
    """The learned scalars; logit scales are stored as logarithms and clamped as parameters.

    Each is read as a scalar attribute (``scales.attention_scale``) but stored with one element:
    DeepSpeed 0.19 cannot broadcast, clip or partition a parameter without dimensions.
    """

    BOUNDS = {  # name -> (least, most) value, applied after each optimiser step
        "log_scale": (-MAX_LOG_SCALE, MAX_LOG_SCALE),
        "log_scale_local": (-MAX_LOG_SCALE, MAX_LOG_SCALE),
        "attention_scale": (0.0, 200.0),
        "knowledge_scale": (0.0, 200.0),
        "knowledge_gain": (0.0, 10.0),
        "aggregation_scale": (0.1, 100.0),
    }

    def __init__(self, config: Config) -> None:
        super().__init__()
        local = config.loss.local_alignment

        def scalar(value: float, learned: bool = True) -> nn.Parameter:
            return nn.Parameter(torch.tensor([value]), requires_grad=learned)

        self.stored = nn.ParameterDict(
            {
                "log_scale": scalar(INITIAL_LOG_SCALE),
                "log_scale_local": scalar(INITIAL_LOG_SCALE),
                "attention_scale": scalar(local.attention_scale, local.learn_scales),
                "knowledge_scale": scalar(local.knowledge_scale, local.learn_scales),
                # 0 switches enrichment off: it must not learn its way back
                "knowledge_gain": scalar(
                    local.knowledge_gain, local.learn_scales and local.knowledge_gain > 0
                ),
                "aggregation_scale": scalar(local.aggregation_scale, local.learn_scales),
            }
        )

    def __getattr__(self, name: str) -> Any:
        if name in Scales.BOUNDS:
            return self.stored[name].squeeze(0)
        return super().__getattr__(name)

    def logit_scale(self) -> Tensor:
        return self._exponential("log_scale")

    def logit_scale_local(self) -> Tensor:
        return self._exponential("log_scale_local")

    def _exponential(self, name: str) -> Tensor:
        log_scale = self.stored[name].squeeze(0)
        # in bfloat16 a scale of 14.29 would come out as 14.25
        return (log_scale if log_scale.dtype == torch.float64 else log_scale.float()).exp()

    @torch.no_grad()
    def clamp_(self) -> None:
        for name, (least, most) in self.BOUNDS.items():
            self.stored[name].clamp_(least, most)


class MLIPModel(nn.Module):
    """Both towers with their heads, and the concept table's projection.

    Shapes:  concept_vectors [E, d_k] float32, one row a concept of the table
    Raises:  ValueError for settings that cannot be honoured (see the encoders)
    Source:  MLIP sections 3.1 and 3.2; heads as MGCA's with LayerNorm; scales and state
             embedding ours.
    """

    # no step changes them: of a large table a copy in each would take as long as the step
    FIXED_BUFFERS = ("concept_vectors",)

    def __init__(self, config: Config, *, vocab_size: int, concept_vectors: Tensor) -> None:
        super().__init__()
        self.config = config
        model, data = config.model, config.data
        offline = config.run.offline
        self.vision = VisionEncoder(
            model.vision,
            channels=data.channels,
            image_px=data.crop_px,
            attention=model.attention,
            residual=config.train.residual,
            offline=offline,
        )
        self.text = TextEncoder(
            model.text,
            vocab_size=vocab_size,
            max_tokens=data.max_tokens,
            attention=model.attention,
            residual=config.train.residual,
            keeps_attention=config.loss.local_alignment.token_weights == "attention",
            offline=offline,
        )
        dim, heads = model.embed_dim, model.heads
        self.image_head = ProjectionHead(self.vision.global_dim, dim, heads)
        self.patch_head = ProjectionHead(self.vision.patch_dim, dim, heads)
        self.report_head = ProjectionHead(self.text.dim, dim, heads)
        self.token_head = ProjectionHead(self.text.dim, dim, heads)
        if config.train.residual == "bf16":
            for head in self.heads():
                round_norms(head)
        self.register_buffer("concept_vectors", concept_vectors.float().clone())
        width = concept_vectors.shape[1]
        self.state_embedding = nn.Embedding(3, width)
        # as long as a whitened concept vector's entries: a state must be able to turn the row
        nn.init.normal_(self.state_embedding.weight, std=width**-0.5)
        self.knowledge_projection = nn.Linear(width, dim, bias=False)
        self.scales = Scales(config)
        weights = torch.zeros(3)
        weights[PRESENT] = config.knowledge.weight_present
        weights[ABSENT] = config.knowledge.weight_absent
        weights[UNCERTAIN] = config.knowledge.weight_uncertain
        self.register_buffer("state_weights", weights, persistent=False)
        self._image_weights: Any
        self._text_weights: Any
        self.round_weights_together(False)

    concept_vectors: Tensor
    state_weights: Tensor

    @property
    def device(self) -> torch.device:
        return self.state_weights.device

    @property
    def scores_knowledge(self) -> bool:
        """Whether mentions take part in the local score."""
        local = self.config.loss.local_alignment
        return local.knowledge_gain > 0 or local.knowledge_share > 0

    def _autocast(self) -> Any:
        precision = self.config.train.precision
        if not takes_bf16(precision, self.device, is_training=self.training):
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def round_weights_together(self, is_on: bool = True) -> None:
        """Have a tower's and its heads' weights rounded at once, for an engine that may."""
        if not is_on:
            self._image_weights = self._text_weights = contextlib.nullcontext
            return
        self._image_weights = RoundedTogether([self.vision, self.image_head, self.patch_head])
        self._text_weights = RoundedTogether([self.text, self.report_head, self.token_head])

    def encode_image(self, image: Tensor) -> ImageFeatures:
        """Shapes:  image [B, C, H, W] normalised -> embedding [B, D] unit, patches [B, P, D]."""
        with self._autocast(), self._image_weights():
            pooled, patches, grid = self.vision(image)
            embedding = self.image_head(pooled)
            patches = self.patch_head(patches)
        return ImageFeatures(embedding=unit_length(embedding), patches=patches, grid=grid)

    def encode_text(
        self,
        token_ids: Tensor,
        token_mask: Tensor,
        content_mask: Tensor,
        token_counts: Tensor | None = None,
    ) -> TextFeatures:
        """Shapes:  [B, T] each -> embedding [B, D] unit, tokens [B, T, D], attention [B, T] where
        token_weights asks; token_counts [B] as in Batch, which only a packed text tower reads."""
        real: tuple[int, ...] = ()
        if self.text.is_packed and token_counts is not None:
            # outside the tower: torch.compile takes a number of any value, not one that is read
            real = (int(token_counts.sum()),)
        with self._autocast(), self._text_weights():
            pooled, states, attention = self.text(token_ids, token_mask, *real)
            embedding = self.report_head(pooled)
            tokens = self.token_head(states, content_mask)
        return TextFeatures(embedding=unit_length(embedding), tokens=tokens, attention=attention)

    def encode_knowledge(
        self, entity_ids: Tensor, entity_state: Tensor, entity_mask: Tensor
    ) -> KnowledgeFeatures:
        """Shapes:  [B, K] each -> KnowledgeFeatures; a report without mentions has all False.

        A concept that the vectors know nothing of (zero row) counts as not mentioned: its state
        alone would be a vector like any other. With knowledge_gain and knowledge_share 0 no mention
        is a row of the local score, so a report of mentions alone is an empty one.
        """
        vectors = self.concept_vectors[entity_ids]
        entity_mask = entity_mask & (vectors != 0).any(dim=-1)
        entities = self.knowledge_projection(vectors + self.state_embedding(entity_state))
        is_present = entity_mask & (entity_state == PRESENT)
        present = (entities * is_present.unsqueeze(-1)).sum(dim=1)
        return KnowledgeFeatures(
            entities=entities,
            mask=entity_mask,
            row_weights=self.state_weights[entity_state] * (entity_mask & self.scores_knowledge),
            present_mean=unit_length(present),
            has_present=is_present.any(dim=1),
        )

    def heads(self) -> list[nn.Module]:
        return [self.image_head, self.patch_head, self.report_head, self.token_head]

    def towers(self) -> list[nn.Module]:
        """What torch.compile can make one graph of each: no choice in it is made on values.

        The heads are left out: all four have one forward, and torch keeps at most eight graphs of
        one function.
        """
        return [self.vision, self.text]

    def token_weights(self, content_mask: Tensor, attention: Tensor | None) -> Tensor:
        """Weights of the tokens in the local score, [B, T] float32, 0 outside content_mask."""
        by_attention = self.config.loss.local_alignment.token_weights == "attention"
        return token_weights(content_mask, attention if by_attention else None)

    def local_scores(
        self,
        patches: Tensor,
        tokens: Tensor,
        content_mask: Tensor,
        attention: Tensor | None,
        knowledge: KnowledgeFeatures | None,
        *,
        group: Any = None,
    ) -> Tensor:
        """Token-knowledge-patch scores of every image with every text, [M, N] float32 or better.

        The one place where the settings of the local score meet the kernel: loss and evaluation
        call it alike. With `group`, texts of all ranks in rank order.
        """
        local = self.config.loss.local_alignment
        learned = local.learn_scales
        scales = self.scales
        if not self.scores_knowledge:
            knowledge = None  # nothing of it would show: its arithmetic is not paid either
        return token_knowledge_patch_scores(
            patches,
            tokens,
            knowledge.entities if knowledge is not None else None,
            token_weights=self.token_weights(content_mask, attention),
            knowledge_weights=knowledge.row_weights if knowledge is not None else None,
            knowledge_mask=knowledge.mask if knowledge is not None else None,
            attention_scale=scales.attention_scale if learned else local.attention_scale,
            knowledge_scale=scales.knowledge_scale if learned else local.knowledge_scale,
            knowledge_gain=scales.knowledge_gain if learned else local.knowledge_gain,
            knowledge_share=local.knowledge_share,
            pooling=local.pooling,
            aggregation=local.aggregation,
            aggregation_scale=scales.aggregation_scale if learned else local.aggregation_scale,
            group=group,
            impl=local.impl,
        )
