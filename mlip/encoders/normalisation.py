"""Normalisation of a ResNet tower: batch statistics over all ranks, groups, or frozen.

torch's own SyncBatchNorm refuses CPU tensors; this one runs on any device and backend.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from mlip.ranks.distributed import is_distributed


class _SynchronisedNorm(torch.autograd.Function):
    """Batch normalisation with mean and variance over all ranks' pixels.

    The fused native kernels do the passes over pixels; only per-channel sums cross ranks.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        pixels = x.numel() // x.shape[1]
        _, mean, inverse_std = torch.native_batch_norm(x, weight, bias, None, None, True, 0.0, eps)
        variance = inverse_std.double() ** -2 - eps
        mean = mean.double()
        # float64 sums: mean and mean square nearly cancel where a channel hardly varies
        counted = mean.new_full((1,), pixels)  # filled there: a number copied over would be a wait
        sums = torch.cat([mean * pixels, (variance + mean**2) * pixels, counted])
        dist.all_reduce(sums)
        count = sums[-1]
        channels = x.shape[1]
        mean = sums[:channels] / count
        variance = (sums[channels:-1] / count - mean**2).clamp_min(0.0)
        mean, variance = mean.float(), variance.float()
        out = F.batch_norm(x, mean, variance, weight, bias, False, 0.0, eps)
        ctx.save_for_backward(x, weight, mean, variance, count)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, variance, count)
        return out, mean, variance, count

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, mean, variance, count = ctx.saved_tensors
        grad = grads[0]
        inverse_std = torch.rsqrt(variance + ctx.eps)
        grad_x, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            grad, x, weight, mean, variance, None, None, False, ctx.eps, [True, True, True]
        )
        sums = torch.stack([grad_weight.float(), grad_bias.float()])
        dist.all_reduce(sums)
        # the part of the gradient that flows through the shared statistics is affine in x, so the
        # fused kernel serves as the affine map: broadcasting over 16 channels is ten times slower
        slope = weight * inverse_std * inverse_std * sums[0] / count
        offset = weight * inverse_std * sums[1] / count - slope * mean
        zero, one = torch.zeros_like(mean), torch.ones_like(mean)
        # not F.batch_norm: torch 2.11's refuses an eps of 0
        fused = torch.backends.cudnn.enabled
        correction = torch.batch_norm(x, slope, offset, zero, one, False, 0.0, 0.0, fused)
        return grad_x - correction, grad_weight, grad_bias, None


_is_recomputing = False


@contextlib.contextmanager
def recomputing() -> Iterator[None]:
    """Around a forward pass that is made again: running statistics have seen this batch."""
    global _is_recomputing
    _is_recomputing = True
    try:
        yield
    finally:
        _is_recomputing = False


class SynchronisedBatchNorm(nn.BatchNorm2d):
    """BatchNorm2d whose training statistics are over all ranks; one rank: torch's own."""

    def forward(self, input: Tensor) -> Tensor:
        if self.training and not is_distributed() and _is_recomputing:
            assert self.running_mean is not None and self.running_var is not None
            # given and thrown away: without them other tensors would be saved than the first time
            mean, variance = self.running_mean.clone(), self.running_var.clone()
            return F.batch_norm(
                input, mean, variance, self.weight, self.bias, True, self.momentum or 0.1, self.eps
            )
        if not (self.training and is_distributed()):
            return super().forward(input)
        out, mean, variance, count = _SynchronisedNorm.apply(
            input, self.weight, self.bias, self.eps
        )
        assert self.running_mean is not None and self.running_var is not None
        assert self.num_batches_tracked is not None
        if _is_recomputing:
            return out
        with torch.no_grad():
            unbiased = variance * (count / (count - 1)).float()
            momentum = self.momentum if self.momentum is not None else 0.1
            self.running_mean.lerp_(mean, momentum)
            self.running_var.lerp_(unbiased, momentum)
            self.num_batches_tracked.add_(1)
        return out


class FrozenBatchNorm(nn.BatchNorm2d):
    """BatchNorm2d that always uses its running statistics and never moves them."""

    def forward(self, input: Tensor) -> Tensor:
        return F.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
        )


def _groups(channels: int) -> int:
    """The most groups, at most 32 (Wu and He 2018), of at least 4 channels that divide evenly."""
    return next(g for g in range(min(32, max(1, channels // 4)), 0, -1) if channels % g == 0)


def set_normalisation(module: nn.Module, kind: str) -> None:
    """Replace every BatchNorm2d below `module` in place, keeping its weights where it has any."""
    for name, child in module.named_children():
        if not isinstance(child, nn.BatchNorm2d):
            set_normalisation(child, kind)
            continue
        channels = child.num_features
        new: nn.Module
        if kind == "group":
            new = nn.GroupNorm(_groups(channels), channels)
            new.weight, new.bias = child.weight, child.bias
        else:
            cls = SynchronisedBatchNorm if kind == "batch" else FrozenBatchNorm
            new = cls(channels, eps=child.eps, momentum=child.momentum)
            new.load_state_dict(child.state_dict())
        setattr(module, name, new)
