"""Proxy task: a swapped report must score below the true one by a margin."""

from __future__ import annotations

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from mlip.keyed_random import keyed_uniform
from mlip.losses.context import LossContext, mean_over_ranks
from mlip.losses.partner import draw_partners
from mlip.settings.config import Config


class Swapping(nn.Module):
    """mean over swapped samples of max(0, margin - sim(v_i, t_i) + sim(v_i, t_j)).

    sim = v . t + local_share * S. The scores S are those of the local level, paid once; with
    local_share 0 they are not asked for. A sample with an empty report, or without a report that
    differs from its own, drops the term.

    Source:  MLIP section 3.4 (text swapping); method.md section 6 (margin form ours).
    """

    def __init__(self, config: Config, dim: int) -> None:
        super().__init__()
        self.settings = config.loss.swapping

    def forward(self, context: LossContext) -> Tensor:
        settings, batch = self.settings, context.batch
        image_BD = context.features.image.embedding
        text_ND = context.text_embedding_all
        cosine_BN = image_BD @ text_ND.T
        swapped_B = draw_partners(context, "swap_partner", cosine_BN.detach())
        uniform_B1 = keyed_uniform(context.seed, "swap_choice", context.step, batch.global_index)
        is_swapped_B = (uniform_B1[:, 0] < settings.probability) & context.has_partner
        similarity_BN = cosine_BN
        if settings.local_share > 0:
            similarity_BN = cosine_BN + settings.local_share * context.local_scores
        true_B = similarity_BN.diagonal(context.first)
        false_B = similarity_BN.gather(1, swapped_B[:, None]).squeeze(1)
        return mean_over_ranks(F.relu(settings.margin - true_B + false_B), is_swapped_B)
