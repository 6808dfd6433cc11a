"""Activation checkpointing of a transformers' tower: model.vision.checkpointing and
model.text.checkpointing.
"""

from __future__ import annotations

from typing import Any


def checkpoint_layers(backbone: Any) -> None:
    """Have each layer keep its input alone and run again in the backward pass.

    transformers renamed the call within 5.x; the old name warns there and is gone from 6 on.
    """
    enable = getattr(backbone, "activation_checkpointing_enable", None)
    if enable is None:
        enable = backbone.gradient_checkpointing_enable
    enable({"use_reentrant": False})
