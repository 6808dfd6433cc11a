"""Contrastive losses of token-knowledge-patch scores, and the module that learns their scales."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from mlip.kernels._autograd import no_second_derivative, savable
from mlip.kernels._contrastive import (
    Pairing,
    Statistics,
    center,
    chunk_bounds,
    logits_gradient,
    logsumexp_statistics,
    loss_value,
    make_pairing,
    over_ranks,
    pull,
)
from mlip.kernels._dispatch import check_impl
from mlip.kernels._distributed import Group, sum_over_group
from mlip.kernels._scalars import require_tensor, scalar_tensor
from mlip.kernels.token_knowledge_patch.checks import (
    MIN_AGGREGATION_SCALE,
    check_options,
    check_scale,
)
from mlip.kernels.token_knowledge_patch.op import scores_and_validity

MAX_LOGIT_SCALE = 100.0
MAX_ATTENTION_SCALE = 200.0  # the largest that the kernels are tested at
MOST = {
    "log_logit_scale": MAX_LOGIT_SCALE,
    "log_attention_scale": MAX_ATTENTION_SCALE,
    "log_knowledge_scale": MAX_ATTENTION_SCALE,
    "log_aggregation_scale": MAX_ATTENTION_SCALE,
}


class _ContrastiveFromScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores, logit_scale, pair_ids, image_valid, text_valid, group):
        pairing = make_pairing(scores, pair_ids, image_valid, text_valid, group)
        if pairing.weight.shape[0] != scores.shape[1]:
            raise ValueError(
                f"expected scores [{scores.shape[0]}, {pairing.weight.shape[0]}]: one column per "
                f"image of all ranks, got {list(scores.shape)}; pass the group that made the scores"
            )

        def chunk(start: int, stop: int) -> Tensor:
            return scores[start:stop] * logit_scale

        row, column, positive = logsumexp_statistics(chunk, scores.shape[0], pairing)
        stats = over_ranks(row, column, positive, pairing, group)
        # masks and ids as well: changed in place before the backward pass they are torch's error
        ctx.save_for_backward(
            scores, logit_scale, stats.row_lse, stats.column_lse, stats.positive, pairing.weight,
            pairing.ids, pairing.image_valid, pairing.text_valid,
        )  # fmt: skip
        ctx.counts, ctx.offset, ctx.group = pairing.counts, pairing.offset, group
        return loss_value(stats, pairing)

    @staticmethod
    @no_second_derivative
    def backward(ctx: Any, grad: Tensor):
        scores, logit_scale, row_lse, column_lse, positive, weight, *optional = ctx.saved_tensors
        ids, image_valid, text_valid = optional
        stats = Statistics(row_lse, column_lse, positive)
        pairing = Pairing(ctx.counts, ctx.offset, ids, image_valid, text_valid, None, weight)
        grad = sum_over_group(grad, ctx.group)
        pulls = pull(stats, pairing, scores.shape[0])
        out, scale_grad = torch.empty_like(scores), torch.zeros_like(logit_scale)
        for start, stop in chunk_bounds(*scores.shape):
            dz = scores[start:stop] * logit_scale
            dz = logits_gradient(dz, start, stats, pulls, pairing).mul_(grad)
            if ctx.needs_input_grad[1]:
                middle = center(stats, pairing, logit_scale)
                pulled = dz * (scores[start:stop] - middle)
                if image_valid is not None or text_valid is not None:
                    # an invalid half may hold NaN
                    pulled = torch.where(dz == 0, torch.zeros_like(dz), pulled)
                scale_grad += pulled.sum()
            out[start:stop] = dz.mul_(logit_scale)
        return out, scale_grad, None, None, None, None


def contrastive_loss_from_scores(
    scores: Tensor,
    *,
    logit_scale: float | Tensor,
    pair_ids: Tensor | None = None,
    image_valid: Tensor | None = None,
    text_valid: Tensor | None = None,
    group: Group = None,
) -> Tensor:
    """Symmetric InfoNCE of logit_scale * scores, mean of both directions over the anchors.

    Shapes:  scores [M, N], N over all ranks of `group`; pair_ids [M] int64, image_valid and
             text_valid [M] bool, this rank's rows: image m and text m are a pair; scores of an
             invalid image or text count for nothing, NaN too
    Returns: scalar in nats, the same on every rank; 0 with gradient 0 where no anchor is left
    Units:   logit_scale is already exponentiated
    Raises:  ValueError for shapes and dtypes; for ids or a mask that came on some ranks only (found
             on a CPU alone: on a GPU a look would synchronise)
    Source:  method section 4 (ours): an invalid half leaves the loss, its partner is no anchor but
             stays a negative; equal ids leave each other's negatives
    """
    require_tensor("scores", scores)
    if scores.ndim != 2 or not scores.is_floating_point():
        raise ValueError(
            f"expected scores [M, N] in floating point, got {scores.dtype} {list(scores.shape)}"
        )
    dtype = torch.float64 if scores.dtype == torch.float64 else torch.float32
    scale = scalar_tensor("logit_scale", logit_scale, dtype, scores.device)
    # no product in it, so autocast lowers nothing
    given = (scores.to(dtype), scale, pair_ids, image_valid, text_valid)
    return _ContrastiveFromScores.apply(*map(savable, given), group)


def token_knowledge_patch_loss(
    patches: Tensor,
    tokens: Tensor,
    knowledge: Tensor | None = None,
    *,
    logit_scale: float | Tensor,
    pair_ids: Tensor | None = None,
    group: Group = None,
    token_weights: Tensor | None = None,
    knowledge_weights: Tensor | None = None,
    knowledge_mask: Tensor | None = None,
    patch_mask: Tensor | None = None,
    attention_scale: float | Tensor = 10.0,
    knowledge_scale: float | Tensor = 10.0,
    knowledge_gain: float | Tensor = 0.5,
    knowledge_share: float = 0.25,
    pooling: str = "attention",
    aggregation: str = "mean",
    aggregation_scale: float | Tensor = 5.0,
    impl: str = "auto",
) -> Tensor:
    """contrastive_loss_from_scores of token_knowledge_patch_scores, whose keywords it takes.

    Shapes:  patches [B, P, D], tokens [B, T, D], knowledge [B, K, D]; pair_ids [B] int64
    Returns: scalar in nats, the same on every rank; gradients are W times the true ones, so
             data-parallel averaging gives the gradient of the whole batch
    Raises:  ValueError, also for a rank of `group` without pairs. patch_mask, pair_ids,
             token_weights and knowledge come on every rank or on none, which is checked on a CPU
             alone: on a GPU a look would synchronise
    """
    for name, value in (("patches", patches), ("tokens", tokens)):
        require_tensor(name, value)
    if patches.shape[0] != tokens.shape[0]:
        raise ValueError(
            f"expected as many images as texts on a rank, got {patches.shape[0]} and "
            f"{tokens.shape[0]}; use token_knowledge_patch_scores for unequal sides"
        )
    scores, image_valid, text_valid = scores_and_validity(
        patches,
        tokens,
        knowledge,
        token_weights=token_weights,
        knowledge_weights=knowledge_weights,
        knowledge_mask=knowledge_mask,
        patch_mask=patch_mask,
        attention_scale=attention_scale,
        knowledge_scale=knowledge_scale,
        knowledge_gain=knowledge_gain,
        knowledge_share=knowledge_share,
        pooling=pooling,
        aggregation=aggregation,
        aggregation_scale=aggregation_scale,
        group=group,
        impl=impl,
    )
    return contrastive_loss_from_scores(
        scores,
        logit_scale=logit_scale,
        pair_ids=pair_ids,
        image_valid=image_valid,
        text_valid=text_valid,
        group=group,
    )


class TokenKnowledgePatchLoss(nn.Module):
    """token_knowledge_patch_loss with its scales as parameters (their logarithms).

    With learn_scales the logarithms of logit_scale, knowledge_scale, attention_scale (not for
    "max") and aggregation_scale (for "lse") are parameters; all others are buffers. Call
    clamp_scales_() after each optimiser step: clamping in forward would end the gradient.
    Raises:  ValueError for an option or scale that cannot serve
    """

    log_logit_scale: Tensor
    log_attention_scale: Tensor
    log_knowledge_scale: Tensor
    log_aggregation_scale: Tensor

    def __init__(
        self,
        *,
        pooling: str = "attention",
        aggregation: str = "mean",
        learn_scales: bool = True,
        logit_scale: float = 1 / 0.07,
        attention_scale: float = 10.0,
        knowledge_scale: float = 10.0,
        knowledge_gain: float = 0.5,
        knowledge_share: float = 0.25,
        aggregation_scale: float = 5.0,
        group: Group = None,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        others: dict[str, float | Tensor] = {"knowledge_gain": knowledge_gain}
        others["aggregation_scale"] = aggregation_scale
        check_options(pooling, aggregation, others, knowledge_share)
        check_impl(impl)
        self.pooling, self.aggregation = pooling, aggregation
        self.knowledge_gain, self.knowledge_share = knowledge_gain, knowledge_share
        self.group, self.impl = group, impl
        scales = {
            "logit_scale": logit_scale,
            "attention_scale": attention_scale,
            "knowledge_scale": knowledge_scale,
            "aggregation_scale": aggregation_scale,
        }
        unused = set()
        if pooling == "max":
            unused.add("attention_scale")
        if aggregation == "mean":
            unused.add("aggregation_scale")
        for name, value in scales.items():
            check_scale(name, value, 0.0, open_end=True)
            log = torch.tensor(math.log(value))
            # a parameter that no gradient ever reaches would break data-parallel training
            if learn_scales and name not in unused:
                self.register_parameter(f"log_{name}", nn.Parameter(log))
            else:
                self.register_buffer(f"log_{name}", log)

    def __deepcopy__(self, memo: dict[int, Any]) -> TokenKnowledgePatchLoss:
        # averages of weights copy a model; a process group is a handle that cannot be copied
        memo[id(self.group)] = self.group
        made = type(self).__new__(type(self))
        memo[id(self)] = made
        made.__dict__ = copy.deepcopy(self.__dict__, memo)
        return made

    @torch.no_grad()
    def clamp_scales_(self) -> None:
        """Clamp the learned logarithms: logit_scale to at most 100, the others to 200, and
        aggregation_scale to at least 0.02, below which scores lose their digits.

        A scale that is not learned stays what the caller chose.
        """
        for name, log in self.named_parameters(recurse=False):
            if name not in MOST:  # a subclass may have parameters of its own
                continue
            log.clamp_(max=math.log(MOST[name]))
            if name == "log_aggregation_scale":
                log.clamp_(min=math.log(MIN_AGGREGATION_SCALE))

    def forward(
        self,
        patches: Tensor,
        tokens: Tensor,
        knowledge: Tensor | None = None,
        *,
        token_weights: Tensor | None = None,
        knowledge_weights: Tensor | None = None,
        knowledge_mask: Tensor | None = None,
        patch_mask: Tensor | None = None,
        pair_ids: Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        loss = token_knowledge_patch_loss(
            patches,
            tokens,
            knowledge,
            logit_scale=self.log_logit_scale.exp(),
            pair_ids=pair_ids,
            group=self.group,
            token_weights=token_weights,
            knowledge_weights=knowledge_weights,
            knowledge_mask=knowledge_mask,
            patch_mask=patch_mask,
            attention_scale=self.log_attention_scale.exp(),
            knowledge_scale=self.log_knowledge_scale.exp(),
            knowledge_gain=self.knowledge_gain,
            knowledge_share=self.knowledge_share,
            pooling=self.pooling,
            aggregation=self.aggregation,
            aggregation_scale=self.log_aggregation_scale.exp(),
            impl=self.impl,
        )
        return {"contrastive_loss": loss} if output_dict else loss
