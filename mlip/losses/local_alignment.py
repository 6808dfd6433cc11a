"""Local level: token-knowledge-patch alignment through the kernel, or MGCA's in-pair token loss."""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from mlip.config import Config
from mlip.kernels.token_knowledge_patch import contrastive_loss_from_scores
from mlip.losses.context import LossContext, mean_over_ranks
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
        self.in_pair = InPairAlignment(dim) if is_mgca else None

    def forward(self, context: LossContext) -> Tensor:
        if self.in_pair is not None:
            text = context.features.text
            loss_B = self.in_pair(
                context.features.image.patches,
                text.tokens,
                context.batch.content_mask,
                text.attention,
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
    (InfoNCE within the report, both ways), and each patch its own attended token vector. Needs no
    other pair: nothing is gathered.

    Shapes:  patches [B, P, D], tokens [B, T, D], mask [B, T] bool, attention [B, T] or None (the
             weights of the tokens' terms; None = uniform) -> [B], 0 for an empty report
    Source:  MGCA (Wang et al. 2022, arXiv 2210.06044), section 3.3, cross-attention-based
             token-wise alignment with one head; patch terms are weighted uniformly.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.token_query = nn.Linear(dim, dim)
        self.patch_key_value = nn.Linear(dim, 2 * dim)
        self.patch_query = nn.Linear(dim, dim)
        self.token_key_value = nn.Linear(dim, 2 * dim)
        self.out_token = nn.Linear(dim, dim)
        self.out_patch = nn.Linear(dim, dim)

    def forward(
        self, patches: Tensor, tokens: Tensor, mask: Tensor, attention: Tensor | None
    ) -> Tensor:
        dtype = self.token_query.weight.dtype
        patch_BPD = unit_length(patches).to(dtype)
        token_BTD = unit_length(torch.where(mask.unsqueeze(-1), tokens, 0.0)).to(dtype)
        key, value = self.patch_key_value(patch_BPD).chunk(2, dim=-1)
        seen_BTD = self.out_token(_attend(self.token_query(token_BTD), key, value, None))
        key, value = self.token_key_value(token_BTD).chunk(2, dim=-1)
        read_BPD = self.out_patch(_attend(self.patch_query(patch_BPD), key, value, mask))

        weight_BT = mask.to(torch.float64 if dtype == torch.float64 else torch.float32)
        if attention is not None:
            shown_BT = torch.where(mask, attention.detach(), 0.0).to(weight_BT.dtype)
            has_weight = shown_BT.sum(dim=1, keepdim=True) > 0
            weight_BT = torch.where(has_weight, shown_BT, weight_BT)
        weight_BT = weight_BT / weight_BT.sum(dim=1, keepdim=True).clamp_min(1e-12)
        token_B = _matching(token_BTD, seen_BTD, mask, weight_BT)
        all_patches = mask.new_ones(patch_BPD.shape[:2])
        uniform_BP = all_patches.to(weight_BT.dtype) / patch_BPD.shape[1]
        patch_B = _matching(patch_BPD, read_BPD, all_patches, uniform_BP)
        return torch.where(mask.any(dim=1), 0.5 * (token_B + patch_B), 0.0)


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """One-head attention [B, L, D]; a row without any unmasked key gives zero."""
    logits = query @ key.transpose(1, 2) * query.shape[-1] ** -0.5
    # a softmax is float32 or better whatever the parameters' dtype
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if mask is None:
        return torch.softmax(logits, dim=-1).to(value.dtype) @ value
    # the largest negative number, not -inf: an all-masked row must not become NaN
    logits = logits.masked_fill(~mask[:, None, :], torch.finfo(logits.dtype).min)
    return (torch.softmax(logits, dim=-1) * mask[:, None, :]).to(value.dtype) @ value


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
