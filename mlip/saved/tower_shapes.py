"""Towers that began with a folder (model.vision.source), described by their shape instead.

Of such a folder a trained model needs the shape alone, as every weight follows from its checkpoint
or its export. So a run keeps the shapes (state.json of a checkpoint: "towers") and an export has
them in its settings: the folder may be gone by then, or hold something else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from mlip.encoders.options import tower_shape
from mlip.model import MLIPModel
from mlip.settings.config import Config, Model

TOWERS = ("vision", "text")
Shapes = dict[str, dict[str, Any]]  # "vision", "text" -> options of transformers' config


def with_source(settings: Model) -> list[str]:
    """The towers that settings describe by the folder that they begin with."""
    return [tower for tower in TOWERS if getattr(settings, tower).source is not None]


def shapes_of(settings: Model, model: MLIPModel) -> Shapes:
    """The shapes of those towers of the model that `settings` name a source of, ready for JSON."""
    backbones: dict[str, Any] = {
        "vision": model.vision.tower.backbone,
        "text": model.text.backbone,
    }
    return {tower: tower_shape(backbones[tower].config) for tower in with_source(settings)}


def by_shape(config: Config, shapes: Mapping[str, Mapping[str, Any]]) -> Config:
    """The settings with these towers described by shape; the others stay as they are."""
    described = {
        tower: dataclasses.replace(
            getattr(config.model, tower), source=None, options=dict(shapes[tower])
        )
        for tower in with_source(config.model)
        if tower in shapes
    }
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **described))


def kept_shapes(state: Mapping[str, Any]) -> Shapes:
    """Those of a checkpoint's state.json; none of a version that kept none.

    Raises:  TypeError where they are something else
    """
    kept = state.get("towers") or {}
    if not isinstance(kept, dict) or not kept.keys() <= set(TOWERS):
        raise TypeError(f"towers: expected the shapes of {' and '.join(TOWERS)}")
    for tower, shape in kept.items():
        if not isinstance(shape, dict):
            raise TypeError(f"towers.{tower}: expected options, got a {type(shape).__name__}")
    return kept
