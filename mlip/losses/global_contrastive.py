"""Global level: symmetric InfoNCE over four pairings of embeddings and their divergent views."""

from __future__ import annotations

import torch.nn as nn
from torch import Tensor

from mlip.divergence import DivergenceEncoder
from mlip.kernels.info_nce import info_nce_views_loss
from mlip.losses.context import LossContext, mean_over_ranks
from mlip.settings.config import Config


class GlobalContrastive(nn.Module):
    """1/4 [ NCE(v, t) + NCE(v~, t) + NCE(v, t~) + NCE(v~, t~) ], and the term "divergence".

    Over all N pairs of all ranks; equal pair_ids are never each other's negatives. With
    model.divergence.kind=none, and in evaluation mode, it is NCE(v, t): CLIP's loss.

    Returns: scalar in nats; context.regularisers["divergence"] = mean over both modalities of
             beta_kl * KL + beta_spread * spread
    Source:  MLIP section 3.2; method.md section 3 (four views and the mean of the two
             modalities' regularisers are ours).
    """

    def __init__(self, config: Config, dim: int) -> None:
        super().__init__()
        settings = config.model.divergence
        self.has_views = settings.kind != "none"
        if self.has_views:
            self.divergence_image = DivergenceEncoder(dim, settings, "divergence_image")
            self.divergence_text = DivergenceEncoder(dim, settings, "divergence_text")

    def forward(self, context: LossContext) -> Tensor:
        image = context.features.image.embedding
        text = context.features.text.embedding

        images, texts = [image], [text]
        if self.has_views and self.training:
            keys = {"seed": context.seed, "step": context.step}
            index = context.batch.global_index
            image_view, image_divergence = self.divergence_image(image, index, **keys)
            text_view, text_divergence = self.divergence_text(text, index, **keys)
            divergence_B = 0.5 * (image_divergence + text_divergence)
            context.regularisers["divergence"] = mean_over_ranks(divergence_B, index >= 0)
            images.append(image_view)
            texts.append(text_view)
        return info_nce_views_loss(
            images,
            texts,
            context.scales.logit_scale(),
            pair_ids=context.batch.pair_id,
            group=context.group,
        )
