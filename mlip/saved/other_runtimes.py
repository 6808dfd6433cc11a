"""What exports for other runtimes share: the model as those know it, and how theirs is tried."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from mlip.model import MLIPModel
from mlip.saved.weights import PretrainedError, model_with
from mlip.settings.config import Config

MOST_DIFFERENT = 1e-4  # of the largest number of an output; float32 gives 1e-6


def plain_model(model: MLIPModel, config: Config) -> MLIPModel:
    """The model in float32 with torch's attention over padded texts: what other runtimes know.

    config  the settings of `model`, its towers described by size (no source)
    """
    text = dataclasses.replace(config.model.text, packed=False, checkpointing=False)
    vision = dataclasses.replace(config.model.vision, checkpointing=False)
    towers = dataclasses.replace(config.model, attention="sdpa", text=text, vision=vision)
    train = dataclasses.replace(config.train, precision="fp32", residual="fp32")
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    return model_with(
        dataclasses.replace(config, model=towers, train=train),
        int(model.text.backbone.config.vocab_size),
        state,
        "the model",
    )


def difference(found: Tensor, own: Tensor) -> float:
    """Largest one of two outputs, as a part of our own's largest number; infinite for NaN."""
    off = (found - own).abs().max() / own.abs().max().clamp(min=1e-12)
    return float(off.nan_to_num(torch.inf))


def require_alike(what: str, found: float, without: str) -> None:
    """Raises:  PretrainedError where they differ by more than rounding.

    what     of which runtime and version, and from what
    without  the option to leave out
    """
    if not found <= MOST_DIFFERENT:
        raise PretrainedError(
            f"{what} by {found:.1e} of the largest number ({MOST_DIFFERENT:.0e} expected at "
            f"most); nothing was written: export without {without}"
        )
