"""The learning rate and the weight-decay rule, as pure functions of settings and step."""

from __future__ import annotations

import math

import torch.nn as nn

from mlip.settings.config import Config

# normalisation layers by what their class is called, so that a new one needs no entry here
_NORM_SUFFIX = ("norm", "norm1d", "norm2d", "norm3d")
# our own parameters that are no weights of a linear map (method.md section 7)
_UNDECAYED_NAMES = ("scale", "gain", "prototypes")


def peak_lr(config: Config) -> float:
    """train.lr scaled by sqrt(global pairs / reference pairs); unscaled where the reference is 0.

    Source:  method.md section 7; the square root is the rule for Adam (Malladi et al. 2022).
    """
    reference = config.train.lr_reference_pairs
    share = config.batch.global_pairs / reference if reference > 0 else 1.0
    return config.train.lr * math.sqrt(share)


def total_steps(config: Config, rows: int) -> int:
    """train.max_steps, or the steps that cover the training rows train.epochs times."""
    train = config.train
    return train.max_steps or math.ceil(train.epochs * rows / config.batch.global_pairs)


def learning_rate(step: int, total_steps: int, config: Config) -> float:
    """The rate of 0-based optimiser step ``step``: linear warm-up, then a cosine to min_lr_share.

    With train.decay_share below 1 the rate stays at its peak in between and the cosine fills the
    last share of the steps; 0 keeps the peak. The last warm-up step and the first after it have
    the peak rate; the last step of the run has the least, where that is another one.
    Source:  cosine: Loshchilov and Hutter 2017; constant, then a decay: Zhai et al. 2022
             (arXiv 2106.04560), Haegele et al. 2024 (arXiv 2405.18392)
    """
    train = config.train
    warmup = min(train.warmup_steps, max(total_steps - 1, 0))
    if step < warmup:
        return peak_lr(config) * (step + 1) / warmup
    falling = train.decay_share * (total_steps - 1 - warmup)
    left = total_steps - 1 - step
    done = max(0.0, 1.0 - left / falling) if falling > 0 else 0.0
    cosine = 0.5 * (1.0 + math.cos(math.pi * done))
    return peak_lr(config) * (train.min_lr_share + (1.0 - train.min_lr_share) * cosine)


def undecayed_names(module: nn.Module) -> set[str]:
    """Names of trainable parameters without weight decay.

    Biases, everything in a normalisation layer, every vector and scalar, logit scales and
    prototypes.
    """
    names = set()
    for prefix, child in module.named_modules():
        is_norm = type(child).__name__.lower().endswith(_NORM_SUFFIX)
        for leaf, parameter in child.named_parameters(recurse=False):
            is_ours = any(part in leaf for part in _UNDECAYED_NAMES)
            if is_norm or is_ours or parameter.ndim < 2 or leaf.endswith("bias"):
                names.add(f"{prefix}.{leaf}" if prefix else leaf)
    return names
