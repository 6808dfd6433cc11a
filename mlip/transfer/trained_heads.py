"""Which scores of a model a loss has trained: a CLIP-style run has patches and words of no use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlip.settings.losses import Loss
from mlip.settings.typed_tree import ConfigError

_NONE = (
    "no loss trained the local score (loss.local_alignment.weight=0): its projections are those "
    "that the training began with"
)


def is_local_trained(opened: Any) -> bool:
    """Whether the local score of a model that mlip.pretrained has opened, and with it the maps, may
    have learned something: a run that began with another model has what that one had learned."""
    return learns_local(opened.config.loss) or began_as_one(opened.origin.get("start"))


def learns_local(loss: Loss) -> bool:
    """Whether a training by these losses teaches the local score."""
    swaps = loss.swapping.weight > 0 and loss.swapping.local_share > 0
    return loss.local_alignment.weight > 0 or swaps


def began_as_one(start: Any) -> bool:
    """Whether both towers came from one folder, as those of train.start do: an export keeps of that
    setting what model_facts.start_of tells, here given, and not the place."""
    image, text = ((start or {}).get(tower) or {} for tower in ("image", "text"))
    return image.get("kind") == "folder" and image == text


def untrained_text(run: Mapping[str, Any]) -> str:
    """What stands beside an evaluation's local numbers where they are a control; else "".

    run  of the results; those of earlier versions do not know
    """
    if run.get("is_local_trained", True):
        return ""
    return f"{_NONE}; it, the combined score and the maps are a control"


def require_local(opened: Any, asked: str) -> None:
    """Raises:  ConfigError where `asked` (an option and what to do without it) needs the local
    score of a model that has none: the answer would be noise"""
    if not is_local_trained(opened):
        raise ConfigError(f"{asked}: of this model {_NONE}")
