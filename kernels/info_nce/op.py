"""The public InfoNCE loss: argument checks, choice of implementation, open_clip's interface."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from mlip.kernels._autograd import autocast_off, autocast_on, no_second_derivative, savable
from mlip.kernels._contrastive import (
    Pairing,
    Statistics,
    center,
    loss_value,
    make_pairing,
    over_ranks,
    own_rows,
    pull,
)
from mlip.kernels._dispatch import resolve
from mlip.kernels._distributed import (
    Group,
    default_group,
    gather,
    gather_rows,
    reduce_rows,
    row_counts,
    sum_over_group,
)
from mlip.kernels._scalars import require_tensor, scalar_tensor
from mlip.kernels.info_nce import reference

MAX_TRITON_DIM = 512  # what is tested; products of bfloat16 rows take D in parts
MAX_TRITON_DIM_FLOAT32 = 256  # the backward kernel holds a row tile of D accumulators


@torch.library.custom_op(
    "mlip_kernels::info_nce_statistics",
    mutates_args=(),
    schema=(
        "(Tensor image, Tensor text, Tensor scale, Tensor? ids, int offset) "
        "-> (Tensor, Tensor, Tensor)"
    ),
)
def _statistics(image, text, scale, ids, offset):
    from mlip.kernels.info_nce.triton_kernels import info_nce_statistics

    ids = None if ids is None else ids.contiguous()  # the kernels know no stride of ids
    own = None if ids is None else ids[offset : offset + image.shape[0]]
    with torch.cuda.device_of(image):  # Triton launches on the current device
        return info_nce_statistics(image, text, scale, own, ids, offset)


@_statistics.register_fake
def _(image, text, scale, ids, offset):
    row = image.new_empty((image.shape[0],), dtype=torch.float32)
    return row, text.new_empty((text.shape[0],), dtype=torch.float32), torch.empty_like(row)


@torch.library.custom_op(
    "mlip_kernels::info_nce_gradients",
    mutates_args=(),
    schema=(
        "(Tensor image, Tensor text, Tensor scale, Tensor middle, Tensor grad, Tensor? ids, "
        "Tensor row_lse, Tensor column_lse, Tensor row_pull, Tensor column_pull, int offset, "
        "bool want_scale) "
        "-> (Tensor, Tensor, Tensor)"
    ),
)
def _gradients(
    image, text, scale, middle, grad, ids, row_lse, column_lse, row_pull, column_pull, offset,
    want_scale,
):  # fmt: skip
    from mlip.kernels.info_nce.triton_kernels import info_nce_gradients

    pair = None
    if ids is not None:
        ids = ids.contiguous()
        pair = (ids[offset : offset + image.shape[0]], ids)
    with torch.cuda.device_of(image):
        return info_nce_gradients(
            image, text, (scale, middle), grad, pair, (row_lse, column_lse),
            (row_pull, column_pull), offset, want_scale,
        )  # fmt: skip


@_gradients.register_fake
def _(image, text, scale, middle, grad, ids, row_lse, column_lse, row_pull, column_pull, offset, _):
    text_grad = text.new_empty(text.shape, dtype=torch.float32)
    return torch.empty_like(image), text_grad, scale.new_empty(())


class _InfoNCE(torch.autograd.Function):
    """The mean loss over all pairings of image views [V, B, D] with text views [U, B, D]."""

    @staticmethod
    def forward(ctx: Any, images, texts, scale, pair_ids, group, is_triton):
        rows = images.shape[1]
        pairing = make_pairing(scale.new_empty((rows, 0)), pair_ids, None, None, group)
        every = _gather_views(texts, group, pairing.counts)
        parts = []
        for image in images:
            for text in every:
                if is_triton:
                    part = _statistics(image, text, scale, pairing.ids, pairing.offset)
                else:
                    part = reference.statistics(image, text, scale, pairing)
                parts.append(part)
        row, column, positive = (torch.stack(x) for x in zip(*parts, strict=True))
        stats = over_ranks(row, column, positive, pairing, group)
        ctx.save_for_backward(
            images, texts, scale, stats.row_lse, stats.column_lse, stats.positive,
            pairing.weight, pairing.ids,
        )  # fmt: skip
        ctx.counts, ctx.offset = pairing.counts, pairing.offset
        ctx.group, ctx.is_triton = group, is_triton
        return loss_value(stats, pairing).mean()

    @staticmethod
    @no_second_derivative
    def backward(ctx: Any, grad: Tensor):
        images, texts, scale, row_lse, column_lse, positive, weight, ids = ctx.saved_tensors
        stats = Statistics(row_lse, column_lse, positive)
        pairing = Pairing(ctx.counts, ctx.offset, ids, None, None, None, weight)
        every = _gather_views(texts, ctx.group, pairing.counts)
        grad = sum_over_group(grad, ctx.group) / row_lse.shape[0]
        want_scale = ctx.needs_input_grad[2]
        rows = images.shape[1]
        image_grads: dict[int, Tensor] = {}
        text_grads: dict[int, Tensor] = {}
        scale_grad = torch.zeros_like(scale)
        for v, image in enumerate(images):
            for u, text in enumerate(every):
                own = stats[v * texts.shape[0] + u]
                middle = center(own, pairing, scale) if want_scale else scale
                if ctx.is_triton:
                    row_pull, column_pull = pull(own, pairing, rows)
                    made = _gradients(
                        image, text, scale, middle, grad, ids,
                        own_rows(own.row_lse, rows, pairing).contiguous(), own.column_lse,
                        row_pull.contiguous(), column_pull, ctx.offset,
                        want_scale,
                    )  # fmt: skip
                else:
                    made = reference.gradients(
                        image, text, (scale, middle), grad, own, pairing, want_scale
                    )
                image_grads[v] = _add(image_grads.get(v), made[0])
                text_grads[u] = _add(text_grads.get(u), made[1])
                scale_grad = scale_grad + made[2]
        # [N, U, D], rows first for the exchange
        text_grad = _stack(list(text_grads.values()), 1)
        text_grad = reduce_rows(text_grad, ctx.group, pairing.counts).to(texts.dtype)
        image_grad = _stack(list(image_grads.values()), 0).to(images.dtype)
        return image_grad, text_grad.transpose(0, 1), scale_grad, None, None, None


def _gather_views(texts: Tensor, group: Group, counts: list[int]) -> Sequence[Tensor]:
    """Every rank's rows of each text view, in one exchange: [U, B, D] -> U of [N, D]."""
    if len(counts) == 1:
        return list(texts)
    every = gather(texts.transpose(0, 1), group, counts)
    return [view.contiguous() for view in every.unbind(1)]


def _stack(views: list[Tensor], dim: int) -> Tensor:
    # one view, the usual case, is not copied: at 65,536 x 512 each copy is 64 MiB or more
    return views[0].unsqueeze(dim) if len(views) == 1 else torch.stack(views, dim)


def _add(total: Tensor | None, part: Tensor) -> Tensor:
    # in float32 or better: bfloat16 would round after every view
    if total is None:
        return part
    return (total if total.dtype == torch.float64 else total.float()) + part


def _check(image_features: Tensor, text_features: Tensor, group: Group) -> None:
    for name, value in (("image_features", image_features), ("text_features", text_features)):
        require_tensor(name, value)
    if image_features.ndim != 2 or image_features.shape != text_features.shape:
        raise ValueError(
            "expected image_features and text_features of one shape [B, D], got "
            f"{list(image_features.shape)} and {list(text_features.shape)}"
        )
    # on a CPU a rank of a group may have no pair in an uneven last batch
    if image_features.numel() == 0 and (group is None or image_features.device.type != "cpu"):
        raise ValueError(
            f"expected at least one pair and D > 0, got {list(image_features.shape)}; skip the "
            "loss of an empty batch"
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
    Raises:  ValueError for shapes, dtypes or an impl that cannot serve, or for pair_ids that came
             on some ranks only (found on a CPU alone: on a GPU a look would synchronise)
    Source:  van den Oord et al. 2018 (arXiv 1807.03748); Radford et al. 2021 (arXiv 2103.00020);
             the positive-excluded form and the exclusion of equal ids are ours
    Each rank's gradients are W times the true ones, so data-parallel averaging gives the gradient
    of the whole batch. On a GPU every rank must pass equal shapes; on a CPU one may have no pair.
    """
    return info_nce_views_loss(
        [image_features], [text_features], logit_scale, pair_ids=pair_ids, group=group, impl=impl
    )


def info_nce_views_loss(
    image_views: Sequence[Tensor],
    text_views: Sequence[Tensor],
    logit_scale: float | Tensor,
    *,
    pair_ids: Tensor | None = None,
    group: Group = None,
    impl: str = "auto",
) -> Tensor:
    """The mean of info_nce_loss over every pairing of an image view with a text view.

    One exchange over the ranks serves all pairings: 7 collectives forward and backward instead of
    7 a pairing.

    Shapes:  image_views V of [B, D], text_views U of [B, D], unit length; the rest as in
             info_nce_loss
    Returns: scalar in nats
    Source:  views as in DeCLIP (Li et al. 2022, arXiv 2110.05208), section 3.2; the shared exchange
             is ours
    """
    views = [*image_views, *text_views]
    if len(image_views) == 0 or len(text_views) == 0:
        raise ValueError(
            f"expected at least one image view and one text view, got {len(image_views)} and "
            f"{len(text_views)}"
        )
    for view in views:
        _check(image_views[0], view, group)
    dim, device = views[0].shape[1], views[0].device
    dtypes = {view.dtype for view in views}
    refusal = None
    if torch.float64 in dtypes:
        refusal = "the inputs are float64, and the kernels work in float32"
    # float16 becomes bfloat16 as well: gradients of 1 / B^2 would underflow it
    is_narrow = dtypes != {torch.float32} or autocast_on(device.type)
    largest = MAX_TRITON_DIM if is_narrow else MAX_TRITON_DIM_FLOAT32
    if dim > largest and refusal is None:
        refusal = f"D={dim} is above {largest}, the largest that fits on chip"
    is_triton = resolve(impl, device, refusal) == "triton"
    wide = torch.float64 if torch.float64 in dtypes else torch.float32
    compute = torch.bfloat16 if is_triton and is_narrow else wide
    scale = scalar_tensor("logit_scale", logit_scale, wide, device)
    with autocast_off(device.type):
        images, texts = (
            savable(_stack([view.to(compute).contiguous() for view in side], 0))
            for side in (image_views, text_views)
        )
        return _InfoNCE.apply(images, texts, scale, savable(pair_ids), group, is_triton)


class ClipLoss(nn.Module):
    """open_clip's ClipLoss, constructor, call and the methods its subclasses use, on info_nce_loss.

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

    def _group(self) -> Group:
        return default_group(self.world_size) if self.world_size > 1 else None

    def get_ground_truth(self, device: torch.device, num_logits: int) -> Tensor:
        """The column of every row's positive in get_logits [num_logits]."""
        first = num_logits * self.rank if self.world_size > 1 and self.local_loss else 0
        return torch.arange(first, first + num_logits, device=device)

    def get_logits(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(logits of images against texts, of texts against images), for losses built on them.

        Rows are this rank's with local_loss, else those of all ranks. A matrix of B x B that
        forward never makes
        Raises:  ValueError with local_loss for ranks of different numbers of pairs (found on a CPU)
        """
        group = self._group()
        counts = row_counts(image_features, group)
        if self.local_loss and min(counts) < max(counts):
            raise ValueError(
                f"expected as many pairs on every rank with local_loss=True, got {counts}: "
                "get_ground_truth counts on it; pass local_loss=False"
            )
        every_image, every_text = (
            gather_rows(x, group, counts) for x in (image_features, text_features)
        )
        if not self.local_loss:
            image_features, text_features = every_image, every_text
        of_images = logit_scale * image_features @ every_text.T
        of_texts = logit_scale * text_features @ every_image.T if self.local_loss else of_images.T
        bias = 0.0 if logit_bias is None else logit_bias
        return of_images + bias, of_texts + bias

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        loss = info_nce_loss(image_features, text_features, logit_scale, group=self._group())
        if isinstance(logit_bias, Tensor):
            # a constant added to every logit cancels in both softmaxes: its gradient is 0
            loss = loss + 0.0 * logit_bias.sum()
        return {"contrastive_loss": loss} if output_dict else loss
