"""A trained model that a run begins with (train.start): its weights, its vocabulary, its concepts.

Only the model is taken. What training alone needs (divergence encoders, prototypes, the matching
head, the optimiser's moments) begins anew, as for a run from pretrained towers.
"""

from __future__ import annotations

import logging
from pathlib import Path

from mlip.dataloading.reports.tokenizer import is_vocabulary, load_tokenizer
from mlip.model import MLIPModel
from mlip.saved.pretrained_model import Pretrained
from mlip.saved.tower_shapes import by_shape, shapes_of, with_source
from mlip.saved.trained_model import open_checkpoint
from mlip.saved.weights import PretrainedError, model_with
from mlip.settings.config import Config, ConfigError, load
from mlip.training.checkpoint import STATE
from mlip.transfer.fingerprint import hash_of_vocabulary, preprocessing

logger = logging.getLogger("mlip")


def open_start(config: Config) -> Pretrained | None:
    """The model of train.start, for a run that begins.

    Raises:  PretrainedError, CheckpointError where it cannot be opened; ConfigError where the
             settings ask for what a started run takes from its start.
    """
    if config.train.start is None:
        return None
    _require_no_other_towers(config, config.train.start)
    start = open_checkpoint(config.train.start, lexicon=config.knowledge.lexicon)
    _require_its_own(config, start)
    ours, theirs = preprocessing(config), preprocessing(start.config)
    changed = [key for key in ours if ours[key] != theirs[key]]
    if changed:
        logger.warning(
            "train.start=%s was trained with other preprocessing (%s): its first steps see images "
            "or texts of another kind",
            config.train.start,
            ", ".join(changed),
        )
    return start


def _require_no_other_towers(config: Config, start: str) -> None:
    """Raises:  ConfigError for a source that is not the one which the start itself began with."""
    if not (named := with_source(config.model)):
        return
    theirs = load([_with_settings(Path(start))], takes_exports=True).model
    for tower in named:
        source, its = getattr(config.model, tower).source, getattr(theirs, tower).source
        if source != its:
            raise ConfigError(
                f"train.start={start} brings the weights of both towers, model.{tower}.source="
                f"{source} would bring others: set it to null, with the sizes of that tower in "
                f"model.{tower}.options (--config of the start has them)"
            )


def _require_its_own(config: Config, start: Pretrained) -> None:
    """Raises:  ConfigError where another vocabulary or other concept vectors are asked for."""
    where, text = f"train.start={config.train.start}", config.model.text
    key, given = "tokenizer", text.tokenizer
    # a run goes on from the folder that its own settings name also where that one is gone
    if given is None and text.source is not None and is_vocabulary(text.source):
        key, given = "source", text.source
    if given is not None:
        if hash_of_vocabulary(load_tokenizer(given)) != hash_of_vocabulary(start.tokenizer):
            raise ConfigError(
                f"model.text.{key}={given}: is not the vocabulary of {where}, whose weights "
                "are of its words; leave it out"
            )
    asked, has = config.knowledge.vectors, Path(start.config.knowledge.vectors).name
    if Path(asked).name != has:
        raise ConfigError(
            f"knowledge.vectors={asked}: the vectors are those of {where}, made by {has}; set "
            f"knowledge.vectors={has}"
        )
    if config.knowledge.lexicon is None and start.table.provenance.get("source") != "lexicon":
        raise ConfigError(
            f"{where} was trained with a concept table of its own; name it with knowledge.lexicon"
        )


def started_model(config: Config, start: Pretrained) -> MLIPModel:
    """The model that the settings describe, with the weights of its start.

    A tower of which they name a source has the shape of the start's, which began with that folder:
    it may be gone, or hold something else.
    Raises:  ConfigError where the settings describe another model.
    """
    vocab_size = int(start.model.text.backbone.config.vocab_size)
    weights = start.model.state_dict()
    try:
        described = by_shape(config, shapes_of(config.model, start.model))
        return model_with(described, vocab_size, weights, f"train.start={config.train.start}")
    except PretrainedError as error:
        raise ConfigError(
            f"{error}; take the settings of the model from its folder: --config "
            f"{_with_settings(Path(config.train.start or ''))}, and yours behind it"
        ) from error


def _with_settings(start: Path) -> Path:
    """The folder that --config takes: a checkpoint's are its run's."""
    return start.resolve().parent.parent if (start / STATE).is_file() else start
