"""Which scores of a model a loss has trained: a CLIP-style run has patches and words of no use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlip.config import to_dict
from mlip.typed_tree import ConfigError

_NONE = (
    "no loss trained the local score (loss.local_alignment.weight=0): its projections are those "
    "that the training began with"
)


def is_local_trained(settings: Mapping[str, Any]) -> bool:
    """Whether the local score, and with it the maps, may have learned something.

    settings  of the training, as config.to_dict gives them; a run that began with another model
              (train.start) has what that one had learned
    """
    loss = settings["loss"]
    swaps = loss["swapping"]["weight"] > 0 and loss["swapping"]["local_share"] > 0
    return bool(loss["local_alignment"]["weight"] > 0 or swaps or settings["train"]["start"])


def untrained_text(settings: Mapping[str, Any]) -> str:
    """What stands beside an evaluation's local numbers where they are a control; else ""."""
    if is_local_trained(settings):
        return ""
    return f"{_NONE}; it, the combined score and the maps are a control"


def require_local(opened: Any, asked: str) -> None:
    """Raises:  ConfigError where `asked` (an option and what to do without it) needs the local
    score of a model that has none: the answer would be noise"""
    if not is_local_trained(to_dict(opened.config)):
        raise ConfigError(f"{asked}: of this model {_NONE}")
