"""What the settings and the concept table of a saved model must be for it to be opened."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlip.knowledge.concepts import ConceptTable
from mlip.saved.weights import PretrainedError
from mlip.settings import config as configuration
from mlip.settings.config import Config


def read_config(tree: Mapping[str, Any], where: Path) -> Config:
    """The saved settings, for a model that is used and not trained on.

    Raises:  PretrainedError naming `where` for what are none
    """
    try:
        config = configuration.from_dict(tree)
    except ValueError as error:
        raise PretrainedError(f"{where}: {error}") from error
    # ways to compute, nothing that was learnt: xformers and Triton need their packages and a GPU
    towers, loss = config.model, config.loss
    if towers.attention == "xformers":
        towers = dataclasses.replace(towers, attention="sdpa")
    if loss.local_alignment.impl == "triton":
        local = dataclasses.replace(loss.local_alignment, impl="auto")
        loss = dataclasses.replace(loss, local_alignment=local)
    return dataclasses.replace(config, model=towers, loss=loss)


def check_concepts(
    folder: Path, table: ConceptTable, expected: str | None, path: str | None, or_else: str = ""
) -> None:
    """Another table's rows would mean other concepts, without any error to see.

    Raises:  PretrainedError naming the table that the model was trained with
    """
    if expected is not None and table.fingerprint != expected:
        raise PretrainedError(
            f"{folder}: the model was trained with the concept table {str(expected)[:12]}, "
            f"{path or 'the built-in lexicon'} is {table.fingerprint[:12]}; give the table of the "
            f"training run (knowledge.lexicon){'' if path else or_else}"
        )
