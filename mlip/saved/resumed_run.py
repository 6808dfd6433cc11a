"""What a run that goes on takes of its newest checkpoint before its tensors are read.

The model is built for them, with towers by shape, a vocabulary and concepts of their sizes; no
folder that it began with is needed again. The engine fills every weight and buffer later.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from mlip.encoders.source_shape import changed_options, told
from mlip.model import MLIPModel
from mlip.ranks import distributed
from mlip.saved.tower_shapes import by_shape, kept_shapes
from mlip.saved.weights import embedding_rows, without_draws
from mlip.settings.config import Config
from mlip.training.checkpoint import checkpoints_of, find_newest, read_state, require_intact
from mlip.training.lifecycle import CheckpointError

_VECTORS = "model.concept_vectors"
_FILES = ("parameters.safetensors", "buffers.safetensors")


@dataclass(frozen=True)
class Resumed:
    """A run that goes on."""

    config: Config  # with towers by shape, where the run has kept it
    vocab_size: int  # rows of the text tower's embedding
    concepts: tuple[int, int]  # shape of the concept vectors
    start: dict[str, Any] | None  # where the towers' first weights came from (model_facts.start_of)

    def build_model(self, *, words: int, concepts: int) -> MLIPModel:
        """The model with whatever lies in memory as weights, until the engine has loaded them.

        words, concepts  of the vocabulary and the concept table that the run goes on with
        Raises:          CheckpointError where the checkpoint's weights know others
        """
        if words > self.vocab_size or concepts != self.concepts[0]:
            raise CheckpointError(
                f"run.dir={self.config.run.dir} was trained with other content: its weights are of "
                f"{self.vocab_size} words and {self.concepts[0]} concepts (tokenizer, "
                f"concept_table), now there are {words} and {concepts}; restore it "
                "(docs/reliability.md, Another version), or choose another run.dir"
            )
        with without_draws():
            return MLIPModel(
                self.config, vocab_size=self.vocab_size, concept_vectors=torch.zeros(self.concepts)
            )


def open_resumed(config: Config, *, allow_mismatch: bool = False) -> Resumed | None:
    """What the run of run.dir goes on with; None where it has no checkpoint yet.

    Of a version that kept no shapes the towers are opened from their sources, as are with
    allow_mismatch those that a source now gives another shape. A collective call: rank 0 reads, as
    a node that does not see the checkpoints yet would begin, and ask for what no other one does.
    Raises:  CheckpointError where no checkpoint is intact, where the one to go on with holds what
             no save writes, or where a source is there and gives another shape; ValueError where
             that source is another kind of model
    """
    found: Resumed | None = None
    refusal: Exception | None = None
    if distributed.is_main():
        try:
            found = _read(config, allow_mismatch)
        except CheckpointError as error:
            refusal = error
        except ValueError as error:
            refusal = ValueError(str(error))  # one of a library's need not be one that can be sent
    found, refusal = distributed.broadcast_object((found, refusal))
    if refusal is not None:
        raise refusal
    if found is None:
        return None
    # a node may have its data elsewhere
    return dataclasses.replace(found, config=dataclasses.replace(config, model=found.config.model))


def _read(config: Config, allow_mismatch: bool) -> Resumed | None:
    for folder in checkpoints_of(config.run.dir):
        state = read_state(folder)
        if state is None:
            continue
        try:
            shapes = _tensor_shapes(folder)
            kept = kept_shapes(state)
            rows, vectors = embedding_rows(shapes), shapes.get(_VECTORS)
            if rows is None or vectors is None or len(vectors) != 2:
                raise TypeError("its files hold no text tower or no concept vectors")
        except (OSError, SafetensorError):
            continue  # its hash does not hold either, which the engine's reading finds out
        except TypeError as error:
            if _is_damaged(folder):  # names of tensors too: the engine takes an older one
                continue
            raise CheckpointError(f"{folder}: is not of a training: {error}") from None
        for tower in _changed_towers(folder, config, kept, rows, allow_mismatch):
            del kept[tower]
        start = state.get("start")
        return Resumed(
            by_shape(config, kept),
            rows,
            (vectors[0], vectors[1]),
            start if isinstance(start, dict) else None,
        )
    if checkpoints_of(config.run.dir):
        find_newest(config.run.dir)  # says what is wrong with each
    return None


def _is_damaged(folder: Path) -> bool:
    try:
        require_intact(folder)
    except CheckpointError:
        return True
    return False


def _tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for name in _FILES:
        with safe_open(folder / name, framework="pt") as file:
            shapes |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
    return shapes


def _changed_towers(
    folder: Path,
    config: Config,
    kept: Mapping[str, dict[str, Any]],
    rows: int,
    allow_mismatch: bool,
) -> list[str]:
    """Towers whose source is there and gives another shape than the run has kept.

    Raises:  CheckpointError naming every option that differs, unless allow_mismatch
    """
    sizes: dict[str, dict[str, int]] = {
        "vision": {"num_channels": config.data.channels},
        "text": {"vocab_size": rows},
    }
    differences = {
        tower: changed_options(getattr(config.model, tower), shape, sizes[tower])
        for tower, shape in kept.items()
    }
    changed = [tower for tower, options in differences.items() if options]
    if not changed:
        return []
    said = "; ".join(
        f"model.{tower}.source={getattr(config.model, tower).source} has "
        f"{told(differences[tower], 'saved')}"
        for tower in changed
    )
    if not allow_mismatch:
        raise CheckpointError(
            f"{folder} was trained with towers of another shape: {said}; restore the folder (or "
            "take it away: the run has kept the shape), choose another run.dir, or pass "
            "--allow-mismatch"
        )
    distributed.log_once(f"resuming although {folder} differs: {said}", logging.WARNING)
    return changed
