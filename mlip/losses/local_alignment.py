"""Local level: token-knowledge-patch alignment through the kernel, or MGCA's in-pair token loss."""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from mlip.kernels.token_knowledge_patch import contrastive_loss_from_scores
from mlip.losses.context import LossContext, mean_over_ranks
from mlip.settings.config import Config
from mlip.token_weights import token_weights
from mlip.unit_length import unit_length

MGCA_TEMPERATURE = 0.1  # MGCA's local temperature (Wang et al. 2022, section 4.1)


class LocalAlignment(nn.Module):
    """InfoNCE of both directions over the scores S of all images with all texts.

    The scores come from context.local_scores, each pair once on one rank; swapping uses the same
    ones. An empty report is neither anchor nor negative.

    Returns: scalar in nats
    Source:  MLIP section 3.3; method.md section 4. kind=mgca: InPairAlignment.
    """

    def __init__(self, config: Config, dim: int) -> None:
        super().__init__()
        is_mgca = config.loss.local_alignment.kind == "mgca"
        self.in_pair = InPairAlignment() if is_mgca else None

    def forward(self, context: LossContext) -> Tensor:
        if self.in_pair is not None:
            text = context.features.text
            loss_B = self.in_pair(
                context.features.image.patches,
                text.tokens,
                context.batch.content_mask,
                # attention is there where token_weights asks for it
                token_weights(context.batch.content_mask, text.attention),
            )
            return mean_over_ranks(loss_B, context.batch.content_mask.any(dim=1))
        return contrastive_loss_from_scores(
            context.local_scores,
            logit_scale=context.scales.logit_scale_local(),
            pair_ids=context.batch.pair_id,
            text_valid=context.text_valid,
            group=context.group,
        )


class InPairAlignment(nn.Module):
    """Tokens against what they attend to among the pair's patches, and patches likewise.

    Each token must find its own attended patch vector among those of the report's other tokens
    (InfoNCE within the report, both ways), and each patch its own attended token vector. Attention
    is a softmax of the cosine that patches and tokens have, over the temperature of the loss, with
    nothing learned of its own: the cosine is what is trained. Needs no other pair: nothing is
    gathered.

    Shapes:  patches [B, P, D], tokens [B, T, D], mask [B, T] bool, weights [B, T] of the tokens'
             terms, 0 outside mask -> [B], 0 for an empty report
    Source:  MGCA (Wang et al. 2022, arXiv 2210.06044), section 3.3, cross-attention-based
             token-wise alignment as its released code (HKU-MedAI/MGCA) runs it; the learned
             projections of the paper's formulas are off there. Patch terms are weighted uniformly.
    """

    def forward(self, patches: Tensor, tokens: Tensor, mask: Tensor, weights: Tensor) -> Tensor:
        patch_BPD = _wide(unit_length(patches))
        token_BTD = _wide(unit_length(torch.where(mask.unsqueeze(-1), tokens, 0.0)))
        logits_BTP = token_BTD @ patch_BPD.transpose(1, 2) / MGCA_TEMPERATURE
        seen_BTD = torch.softmax(logits_BTP, dim=2) @ patch_BPD
        # the lowest number, not -inf: patches of an empty report must not become NaN
        lowest = torch.finfo(logits_BTP.dtype).min
        read_BTP = torch.softmax(logits_BTP.masked_fill(~mask.unsqueeze(2), lowest), dim=1)
        read_BPD = read_BTP.transpose(1, 2) @ token_BTD

        weight_BT = torch.where(mask, weights.to(patch_BPD.dtype), 0.0)
        weight_BT = weight_BT / weight_BT.sum(dim=1, keepdim=True).clamp_min(1e-12)
        token_B = _matching(token_BTD, seen_BTD, mask, weight_BT)
        all_patches = mask.new_ones(patch_BPD.shape[:2])
        uniform_BP = all_patches.to(weight_BT.dtype) / patch_BPD.shape[1]
        patch_B = _matching(patch_BPD, read_BPD, all_patches, uniform_BP)
        return torch.where(mask.any(dim=1), 0.5 * (token_B + patch_B), 0.0)


def _wide(x: Tensor) -> Tensor:
    """In float32 or better: softmax and loss are."""
    return x if x.dtype == torch.float64 else x.float()


def _matching(left: Tensor, right: Tensor, mask: Tensor, weight: Tensor) -> Tensor:
    """Weighted InfoNCE between equal positions of two sets of rows, both ways, [B]."""
    left, right = unit_length(left), unit_length(right)
    logits = left @ right.transpose(1, 2) / MGCA_TEMPERATURE
    lowest = torch.finfo(logits.dtype).min
    target = torch.arange(logits.shape[1], device=logits.device).expand(logits.shape[:2])
    forth = F.cross_entropy(
        logits.masked_fill(~mask[:, None, :], lowest).transpose(1, 2), target, reduction="none"
    )
    back = F.cross_entropy(logits.masked_fill(~mask[:, :, None], lowest), target, reduction="none")
    return 0.5 * (torch.where(mask, forth + back, 0.0) * weight).sum(dim=1)
