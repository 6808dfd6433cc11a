"""Public token-knowledge-patch scores and loss: argument checks, gathering, choice of
implementation. The arithmetic is in reference.py and triton_kernels.py."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from mlip.kernels._autograd import no_second_derivative
from mlip.kernels._contrastive import (
    chunk_bounds,
    logits_gradient,
    logsumexp_statistics,
    loss_value,
    make_pairing,
    pull,
)
from mlip.kernels._dispatch import resolve
from mlip.kernels._distributed import Group, gather_rows, row_counts, sum_over_group
from mlip.kernels.token_knowledge_patch.reference import (
    pair_scores,
    prepare_rows_in_budget,
    unit_rows,
)

POOLINGS = ("attention", "context", "max")
AGGREGATIONS = ("mean", "lse")
MAX_LOGIT_SCALE = 100.0
MAX_ATTENTION_SCALE = 200.0  # the largest that the kernels are tested at


def _expect_shape(name: str, value: Tensor | None, shape: tuple[int, ...], meaning: str) -> None:
    if value is not None and tuple(value.shape) != shape:
        raise ValueError(
            f"expected {name} {meaning} of shape {list(shape)}, got {list(value.shape)}"
        )


def _check_scale(name: str, value: float | Tensor, minimum: float, open_end: bool = False) -> None:
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(
                f"expected {name} to be a number or a 0-dim tensor, got shape {list(value.shape)}"
            )
        if value.device.type != "cpu":
            return  # reading it would synchronise
        value = float(value.detach())
    low_enough = value > minimum if open_end else value >= minimum
    if not math.isfinite(value) or not low_enough:
        bound = "greater than" if open_end else "at least"
        raise ValueError(f"expected {name} finite and {bound} {minimum:g}, got {value}")


def _check_inputs(
    patches: Tensor,
    tokens: Tensor,
    knowledge: Tensor | None,
    token_weights: Tensor | None,
    knowledge_weights: Tensor | None,
    knowledge_mask: Tensor | None,
    patch_mask: Tensor | None,
) -> None:
    features = {"patches": patches, "tokens": tokens}
    if knowledge is not None:
        features["knowledge"] = knowledge
    for name, value in features.items():
        if value.ndim != 3:
            raise ValueError(
                f"expected {name} of 3 dimensions [batch, rows, D], got {list(value.shape)}"
            )
        if not value.is_floating_point():
            raise ValueError(f"expected {name} in floating point, got {value.dtype}")
        if value.shape[2] != patches.shape[2]:
            raise ValueError(
                f"expected {name} with D={patches.shape[2]} as patches have, got "
                f"D={value.shape[2]}; project both sides to one size"
            )
        if 0 in value.shape and not (name == "knowledge" and value.shape[1] == 0):
            raise ValueError(
                f"expected {name} without an empty dimension, got {list(value.shape)}; skip the "
                "loss of an empty batch"
            )
    texts, length = tokens.shape[:2]
    if knowledge is None:
        if knowledge_weights is not None or knowledge_mask is not None:
            raise ValueError("expected knowledge beside knowledge_weights and knowledge_mask")
    else:
        entities = knowledge.shape[1]
        _expect_shape("knowledge", knowledge, (texts, entities, patches.shape[2]), "[N, K, D]")
        _expect_shape("knowledge_weights", knowledge_weights, (texts, entities), "[N, K]")
        _expect_shape("knowledge_mask", knowledge_mask, (texts, entities), "[N, K]")
    _expect_shape("token_weights", token_weights, (texts, length), "[N, T]")
    _expect_shape("patch_mask", patch_mask, tuple(patches.shape[:2]), "[M, P]")
    for name, mask in (("knowledge_mask", knowledge_mask), ("patch_mask", patch_mask)):
        if mask is not None and mask.dtype != torch.bool:
            raise ValueError(f"expected {name} of dtype bool, True = real, got {mask.dtype}")
    weights = {"token_weights": token_weights, "knowledge_weights": knowledge_weights}
    others = dict(features)
    for name, weight in weights.items():
        if weight is None:
            continue
        if not weight.is_floating_point():
            raise ValueError(f"expected {name} in floating point, got {weight.dtype}")
        if weight.device.type == "cpu" and not bool((weight >= 0).all()):
            raise ValueError(
                f"expected {name} >= 0 without NaN, got a minimum of {float(weight.min())}; 0 masks"
            )
        others[name] = weight
    masks = {"knowledge_mask": knowledge_mask, "patch_mask": patch_mask}
    others.update({name: mask for name, mask in masks.items() if mask is not None})
    for name, value in others.items():
        if value.device != patches.device:
            raise ValueError(
                f"expected {name} on {patches.device}, where patches are, got {value.device}"
            )


def _scores_and_validity(
    patches: Tensor,
    tokens: Tensor,
    knowledge: Tensor | None = None,
    *,
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
    group: Group = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The scores, and which images [M] and texts of this rank take part (None = all)."""
    if pooling not in POOLINGS:
        raise ValueError(f"expected pooling one of {POOLINGS}, got {pooling!r}")
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"expected aggregation one of {AGGREGATIONS}, got {aggregation!r}")
    _check_inputs(
        patches,
        tokens,
        knowledge,
        token_weights,
        knowledge_weights,
        knowledge_mask,
        patch_mask,
    )
    _check_scale("attention_scale", attention_scale, 0.0)
    _check_scale("knowledge_scale", knowledge_scale, 0.0)
    _check_scale("knowledge_gain", knowledge_gain, -math.inf)
    _check_scale("aggregation_scale", aggregation_scale, 0.0, open_end=True)
    if isinstance(knowledge_share, Tensor) or not 0.0 <= knowledge_share <= 1.0:
        raise ValueError(f"expected knowledge_share a number in [0, 1], got {knowledge_share!r}")
    resolve(impl, patches.device, "the Triton kernels are not bound yet")

    floats = [x for x in (patches, tokens, knowledge) if x is not None]
    dtype = torch.float64 if any(x.dtype == torch.float64 for x in floats) else torch.float32

    def scalar(value: float | Tensor) -> Tensor:
        return torch.as_tensor(value, device=patches.device).to(dtype).reshape(())

    with torch.autocast(patches.device.type, enabled=False):
        rows, weight = prepare_rows_in_budget(
            tokens,
            knowledge,
            token_weights,
            knowledge_weights,
            knowledge_mask,
            scalar(knowledge_scale),
            scalar(knowledge_gain),
            float(knowledge_share),
            dtype,
        )
        is_maskable = token_weights is not None or knowledge is not None
        text_valid = weight.detach().sum(1) > 0 if is_maskable else None
        image_valid = None if patch_mask is None else patch_mask.any(1)
        counts = row_counts(rows, group)
        rows, weight = gather_rows(rows, group, counts), gather_rows(weight, group, counts)
        scores = pair_scores(
            rows,
            weight,
            unit_rows(patches, patch_mask, dtype),
            patch_mask,
            scalar(attention_scale),
            scalar(aggregation_scale),
            pooling=pooling,
            aggregation=aggregation,
        )
    return scores, image_valid, text_valid


def token_knowledge_patch_scores(
    patches: Tensor,
    tokens: Tensor,
    knowledge: Tensor | None = None,
    *,
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
    group: Group = None,
    impl: str = "auto",
) -> Tensor:
    """S[m, n]: how well text n, its tokens enriched by its entities, aligns with image m.

    Shapes:  patches [M, P, D], tokens [N, T, D], knowledge [N, K, D], any length; token_weights
             [N, T] >= 0, 0 = masked; knowledge_weights [N, K] >= 0, 0 = enriches tokens but is no
             row; knowledge_mask [N, K] and patch_mask [M, P] bool, True = real
    Returns: [M, N] float32 (float64 for float64 inputs); with `group` N counts the texts of all
             ranks in rank order. A text without weight or an image without a patch has S = 0
    Units:   scales dimensionless, numbers or 0-dim tensors that may require grad
    Raises:  ValueError for shapes, dtypes, devices, an option or an impl that cannot serve;
             negative weights are found on CPU tensors only (a check on a GPU would synchronise)
    Source:  method section 4 (ours, after Huang et al. 2021, GLoRIA, for "context" and "lse", and
             Khattab and Zaharia 2020, arXiv 2004.12832, for "max")
    """
    scores, _, _ = _scores_and_validity(
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
    return scores


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

        stats = logsumexp_statistics(chunk, scores.shape[0], pairing, group)
        ctx.save_for_backward(scores, logit_scale)
        ctx.stats, ctx.pairing, ctx.group = stats, pairing, group
        return loss_value(stats, pairing, group)

    @staticmethod
    @no_second_derivative
    def backward(ctx: Any, grad: Tensor):
        scores, logit_scale = ctx.saved_tensors
        grad = sum_over_group(grad, ctx.group)
        pulls = pull(ctx.stats, ctx.pairing)
        out, scale_grad = torch.empty_like(scores), torch.zeros_like(logit_scale)
        for start, stop in chunk_bounds(*scores.shape):
            dz = scores[start:stop] * logit_scale
            dz = logits_gradient(dz, start, ctx.stats, pulls, ctx.pairing).mul_(grad)
            if ctx.needs_input_grad[1]:
                scale_grad += (dz * scores[start:stop]).sum()
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
             text_valid [M] bool, this rank's rows: image m and text m are a pair
    Returns: scalar in nats, the same on every rank; 0 with gradient 0 where no anchor is left
    Units:   logit_scale is already exponentiated
    Source:  method section 4 (ours): an invalid half leaves the loss, its partner is no anchor but
             stays a negative; equal ids leave each other's negatives
    """
    if scores.ndim != 2 or not scores.is_floating_point():
        raise ValueError(
            f"expected scores [M, N] in floating point, got {scores.dtype} {list(scores.shape)}"
        )
    if pair_ids is not None and pair_ids.dtype != torch.int64:
        raise ValueError(f"expected pair_ids of dtype int64, got {pair_ids.dtype}")
    dtype = torch.float64 if scores.dtype == torch.float64 else torch.float32
    scale = torch.as_tensor(logit_scale, device=scores.device).to(dtype).reshape(())
    with torch.autocast(scores.device.type, enabled=False):
        return _ContrastiveFromScores.apply(
            scores.to(dtype), scale, pair_ids, image_valid, text_valid, group
        )


def token_knowledge_patch_loss(
    patches: Tensor,
    tokens: Tensor,
    knowledge: Tensor | None = None,
    *,
    logit_scale: float | Tensor,
    pair_ids: Tensor | None = None,
    group: Group = None,
    **scores_options: Any,
) -> Tensor:
    """contrastive_loss_from_scores of token_knowledge_patch_scores, whose keywords it takes.

    Shapes:  patches [B, P, D], tokens [B, T, D], knowledge [B, K, D]; pair_ids [B] int64
    Returns: scalar in nats, the same on every rank; gradients are W times the true ones, so
             data-parallel averaging gives the gradient of the whole batch
    """
    if patches.shape[0] != tokens.shape[0]:
        raise ValueError(
            f"expected as many images as texts on a rank, got {patches.shape[0]} and "
            f"{tokens.shape[0]}; use token_knowledge_patch_scores for unequal sides"
        )
    scores, image_valid, text_valid = _scores_and_validity(
        patches, tokens, knowledge, group=group, **scores_options
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

    With learn_scales the logarithms of logit_scale, attention_scale, knowledge_scale and, for
    "lse", aggregation_scale are parameters; without it they are buffers. Call clamp_scales_() after
    each optimiser step: clamping in the forward pass would end the gradient.
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
        if pooling not in POOLINGS:
            raise ValueError(f"expected pooling one of {POOLINGS}, got {pooling!r}")
        if aggregation not in AGGREGATIONS:
            raise ValueError(f"expected aggregation one of {AGGREGATIONS}, got {aggregation!r}")
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
            _check_scale(name, value, 0.0, open_end=True)
            log = torch.tensor(math.log(value))
            # a parameter that no gradient ever reaches would break data-parallel training
            if learn_scales and name not in unused:
                self.register_parameter(f"log_{name}", nn.Parameter(log))
            else:
                self.register_buffer(f"log_{name}", log)

    @torch.no_grad()
    def clamp_scales_(self) -> None:
        """Clamp the learned logarithms: logit_scale to 100, the softmax scales to 200."""
        self.log_logit_scale.clamp_(max=math.log(MAX_LOGIT_SCALE))
        self.log_attention_scale.clamp_(max=math.log(MAX_ATTENTION_SCALE))
        self.log_knowledge_scale.clamp_(max=math.log(MAX_ATTENTION_SCALE))
        self.log_aggregation_scale.clamp_(max=math.log(MAX_ATTENTION_SCALE))

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
