"""The public InfoNCE loss: argument checks, choice of implementation, open_clip's interface."""

from __future__ import annotations

import torch
import torch.nn as nn
from torch import Tensor

from mlip.kernels._dispatch import resolve
from mlip.kernels._distributed import Group, default_group
from mlip.kernels.info_nce.reference import info_nce_reference


def _check(image_features: Tensor, text_features: Tensor, pair_ids: Tensor | None) -> None:
    if image_features.ndim != 2 or image_features.shape != text_features.shape:
        raise ValueError(
            "expected image_features and text_features of one shape [B, D], got "
            f"{list(image_features.shape)} and {list(text_features.shape)}"
        )
    if image_features.device != text_features.device:
        raise ValueError(
            f"expected both features on one device, got {image_features.device} and "
            f"{text_features.device}"
        )
    if not (image_features.is_floating_point() and text_features.is_floating_point()):
        raise ValueError(
            f"expected floating-point features, got {image_features.dtype} and "
            f"{text_features.dtype}"
        )
    if pair_ids is not None and (
        pair_ids.dtype != torch.int64 or tuple(pair_ids.shape) != (image_features.shape[0],)
    ):
        raise ValueError(
            f"expected pair_ids int64 of shape [{image_features.shape[0]}], got {pair_ids.dtype} "
            f"{list(pair_ids.shape)}"
        )


def info_nce_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    *,
    pair_ids: Tensor | None = None,
    group: Group = None,
    impl: str = "auto",
) -> Tensor:
    """Symmetric InfoNCE of matched rows, mean of both directions, over the pairs of all ranks.

    Shapes:  image_features, text_features [B, D] unit length; pair_ids [B] int64, this rank's
             rows: equal ids are never each other's negatives
    Returns: scalar in nats, the same on every rank of `group`; float32 (float64 for float64)
    Units:   logit_scale is already exponentiated, as in open_clip
    Raises:  ValueError for shapes, dtypes or an impl that cannot serve
    Source:  van den Oord et al. 2018 (arXiv 1807.03748); Radford et al. 2021 (arXiv 2103.00020);
             the positive-excluded form and the exclusion of equal ids are ours
    Each rank's gradients are W times the true ones, so data-parallel averaging gives the gradient
    of the whole batch. On a GPU every rank must pass equal shapes.
    """
    _check(image_features, text_features, pair_ids)
    resolve(impl, image_features.device, "the Triton kernels are not bound yet")
    return info_nce_reference(image_features, text_features, logit_scale, pair_ids, group)


class ClipLoss(nn.Module):
    """open_clip's ClipLoss, constructor and call, on info_nce_loss.

    With world_size > 1 the batch is that of the default process group. The value is the global loss
    on every rank, with local_loss True or False alike.
    Raises:  ValueError for gather_with_grad=False over several ranks, or for horovod
    Source:  interface of mlfoundations/open_clip, src/open_clip/loss.py (MIT)
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ) -> None:
        super().__init__()
        if use_horovod:
            raise ValueError(
                "expected use_horovod=False: collectives run through torch.distributed; start the "
                "job with torchrun"
            )
        if world_size > 1 and not gather_with_grad:
            raise ValueError(
                "expected gather_with_grad=True with world_size > 1: without it the features of "
                "other ranks get no gradient, which is 1/W of the loss's gradient and not the "
                "gradient of the loss that is reported; pass gather_with_grad=True"
            )
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.cache_labels = cache_labels  # there are no labels to cache; kept for the signature
        self.rank = rank
        self.world_size = world_size

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        group = None
        if self.world_size > 1:
            group = default_group(self.world_size)
        loss = info_nce_loss(image_features, text_features, logit_scale, group=group)
        if logit_bias is not None:
            # a constant added to every logit cancels in both softmaxes: its gradient is 0
            loss = loss + 0.0 * logit_bias.sum()
        return {"contrastive_loss": loss} if output_dict else loss
