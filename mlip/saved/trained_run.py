"""The model of a training checkpoint, or of a run's folder, with what the run has kept for it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlip.knowledge.concept_files import KEPT, load_concepts_of_run
from mlip.knowledge.linker import linker_of
from mlip.model import MLIPModel
from mlip.saved.agreement import check_concepts, read_config
from mlip.saved.export_folder import SETTINGS, WEIGHTS
from mlip.saved.model_facts import origin_of
from mlip.saved.pretrained_model import Pretrained
from mlip.saved.run_vocabulary import vocabulary_of_run
from mlip.saved.tower_shapes import by_shape, kept_shapes, with_source
from mlip.saved.weights import PretrainedError, embedding_rows, model_with
from mlip.settings.config import Config
from mlip.settings.config_file import CHECKPOINTS
from mlip.training import checkpoint as saved
from mlip.training.best_checkpoint import find_best, is_best, weights_watched
from mlip.training.step import TrainingState

logger = logging.getLogger("mlip")


def open_run(
    path: Path, *, device: torch.device | str, lexicon: str | None, weights_of: str
) -> Pretrained:
    """mlip.pretrained.open_checkpoint, of a path that is no export."""
    folder, run_dir = _checkpoint_of(path)
    read = saved.read(folder, moments=False)
    trained_by = read_config(read.state["config"], folder)
    tokenizer = vocabulary_of_run(
        folder, trained_by.model.text, run_dir, read.state.get("tokenizer")
    )
    asked = lexicon or trained_by.knowledge.lexicon
    table = load_concepts_of_run(run_dir, asked)
    check_concepts(
        folder,
        table,
        read.state.get("concept_table"),
        asked,
        f", or put {KEPT} of an `mlip export` by the version that trained it (commit "
        f"{read.state.get('commit') or 'unknown'}) into {run_dir}",
    )
    tensors = _tensors(folder, read.training, weights_of)
    weights = {
        name.removeprefix("model."): tensor
        for name, tensor in tensors.items()
        if name.startswith("model.")
    }
    rows = weights["concept_vectors"].shape[0] if "concept_vectors" in weights else len(table)
    if rows != len(table):
        raise PretrainedError(
            f"{folder}: the model knows {rows} concepts, the concept table has {len(table)}; give "
            "the table of the training run (knowledge.lexicon)"
        )
    words = embedding_rows({n: t.shape for n, t in weights.items()}) or tokenizer.vocab_size
    config, model = _model(folder, trained_by, read.state, words, weights)
    step = int(read.state["step"])
    facts = {
        "step": step,
        "pairs_seen": read.state.get("pairs_seen", step * config.batch.global_pairs),
        "checkpoint": str(folder),
        "weights": weights_of,
    }
    origin = origin_of(read.state, trained_by, is_best=is_best(folder, step))
    if origin["is_best_on_val"]:
        facts["is_best_on_val"] = True
        if (by := weights_watched(folder)) != weights_of:
            logger.warning(
                "%s: val chose it by its weights of another kind (%s); its %s ones are used, of "
                "which another checkpoint may be the best",
                *(folder, by, weights_of),
            )
    return Pretrained(
        *(model.to(device), config, tokenizer, table, linker_of(table), facts),
        prototypes=tensors.get("losses.category.prototypes"),
        origin=origin,
    )


def _checkpoint_of(path: Path) -> tuple[Path, Path]:
    """(folder of the intact checkpoint, folder of its run)."""
    if (path / saved.STATE).is_file():
        saved.require_intact(path)
        return path, path.resolve().parent.parent
    if not (path / CHECKPOINTS).is_dir():
        raise PretrainedError(
            f"checkpoint {path}: expected a run folder (with {CHECKPOINTS}/), a checkpoint (with "
            f"state.json) or an export (with {SETTINGS} and {WEIGHTS}); there is none of these"
        )
    found, passed_over = find_best(path)
    if found is None:
        raise PretrainedError(
            f"{path}: its folder checkpoints is empty: train first, or copy the run again"
        )
    for text in passed_over:
        logger.warning("checkpoint passed over: %s; %s is used", text, found.name)
    return found, path


def _tensors(folder: Path, training: TrainingState, weights_of: str) -> dict[str, Tensor]:
    tensors = {**training.parameters, **training.buffers}
    if weights_of == "ema":
        if training.ema is None:
            raise PretrainedError(
                f"{folder}: holds no average of the weights; train with train.ema_decay above 0, "
                "or set evaluate.weights=trained"
            )
        tensors |= training.ema.parameters
    return tensors


def _model(
    folder: Path, trained_by: Config, state: Any, words: int, weights: dict[str, Tensor]
) -> tuple[Config, MLIPModel]:
    """The model, and the settings that describe it without the folders that its towers began with.

    Raises:  PretrainedError for shapes that are none; and where a version kept no shapes, and the
             folder that a tower began with is gone or holds something else
    """
    try:
        config = by_shape(trained_by, kept_shapes(state))
    except TypeError as error:
        raise PretrainedError(f"{folder}: state.json is not of a checkpoint: {error}") from None
    try:
        return config, model_with(config, words, weights, str(folder))
    except PretrainedError:
        raise
    except ValueError as error:
        needed = with_source(config.model)
        if not needed:
            raise PretrainedError(f"{folder}: {error}") from error
        named = ", ".join(
            f"model.{tower}.source={getattr(config.model, tower).source}" for tower in needed
        )
        raise PretrainedError(
            f"{folder}: is of a version that kept no shape of its towers, so that it needs the "
            f"folder that they began with ({named}): {error}; put the folder back, or make an "
            "`mlip export` where it is"
        ) from error
