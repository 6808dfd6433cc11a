"""The vocabulary of a run: given, of its start, or trained on its reports; kept in its folder.

With another one ids would mean other words. The folder that a given one came from may be gone when
the run goes on or is opened: the run's own copy (<run.dir>/tokenizer) is then taken for it.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from mlip.dataloading.manifest import Manifest, ManifestError
from mlip.dataloading.reports.tokenizer import (
    ReportTokenizer,
    is_vocabulary,
    load_tokenizer,
    train_tokenizer,
)
from mlip.knowledge.linker import lexicon_words
from mlip.ranks import distributed, process_group
from mlip.saved.pretrained_model import Pretrained
from mlip.saved.weights import PretrainedError
from mlip.settings.config import Config, Text
from mlip.system.folder_lock import is_seen
from mlip.training.checkpoint import checkpoints_of
from mlip.transfer.fingerprint import hash_of_vocabulary

logger = logging.getLogger("mlip")
KEPT = "tokenizer"
_VOCABULARY_REPORTS = 20_000  # two million words; every word piece worth having is among them


def open_tokenizer(
    config: Config, manifest: Manifest, start: Pretrained | None = None
) -> ReportTokenizer:
    """The tokenizer of model.text, or the run's own: that of its start, or trained once on train.

    A collective call. One that is given is copied into a run that begins, and the copy is taken by
    a run that goes on where the given folder is gone.
    Raises:  ManifestError without training rows; ValueError where run.dir holds another vocabulary
             and no checkpoint that was trained with it
    """
    given, folder = _given(config.model.text), Path(config.run.dir) / KEPT
    goes_on = bool(checkpoints_of(config.run.dir))
    if given is not None:
        is_gone = goes_on and not is_vocabulary(given) and is_vocabulary(folder)
        # that of a start is equal to a given one, which may be gone (open_start)
        tokenizer = start.tokenizer if start else load_tokenizer(folder if is_gone else given)
        # nodes may differ in what they see of both folders: none waits for what another leaves out
        process_group.main_first(lambda: None if goes_on else _keep(tokenizer, given, folder))
        return tokenizer

    def make() -> None:
        # without a checkpoint it may be that of a failed try with other reports or settings:
        # trained again, equal ones give equal bytes
        if folder.is_dir() and goes_on:
            return
        if start is not None:
            start.tokenizer.save(folder)
            return
        rows = manifest.rows("train")
        if len(rows) == 0:
            raise ManifestError(
                f"manifest {manifest.path}: no training rows with a report; expected at least 2 "
                "rows of split train (see data.columns.split and data.empty_report)"
            )
        # evenly spaced: a million reports took minutes and 2 GiB for the same few thousand pieces
        rows = rows[:: -(-len(rows) // _VOCABULARY_REPORTS)]
        train_tokenizer(
            (manifest.text(int(row)) for row in rows),
            config.data.vocab_size,
            folder,
            patients=manifest.patient_key[rows].tolist(),
            min_patients=config.data.vocab_min_patients,
            # not the run's own table: that may be licensed, or hold names
            public=lexicon_words(),
        )

    process_group.main_first(make)
    is_seen(folder.is_dir, config.run.timeout_s)
    return load_tokenizer(folder)


def _given(text: Text) -> str | None:
    return text.tokenizer or text.source


def given_words(config: Config) -> int | None:
    """Entries of the vocabulary that the settings name, None where there is none to be read."""
    given = _given(config.model.text)
    return load_tokenizer(given).vocab_size if given and is_vocabulary(given) else None


def _keep(tokenizer: ReportTokenizer, given: str, folder: Path) -> None:
    if not folder.exists() or Path(given).resolve() != folder.resolve():
        tokenizer.save(folder)


def keep_vocabulary(config: Config, tokenizer: ReportTokenizer) -> None:
    """A given vocabulary into a run of a version that kept none, on rank 0.

    Call it when the resumed checkpoint is known to be of this vocabulary.
    """
    given, folder = _given(config.model.text), Path(config.run.dir) / KEPT
    if given is None or not distributed.is_main():
        return
    try:
        # another version of the library writes the same words in other bytes
        has = hash_of_vocabulary(load_tokenizer(folder)) if is_vocabulary(folder) else None
        if has != hash_of_vocabulary(tokenizer):
            _keep(tokenizer, given, folder)
    except (OSError, ValueError) as error:
        logger.warning("%s is needed to open this run: no copy of it is kept: %s", given, error)


def vocabulary_of_run(folder: Path, text: Text, run_dir: Path, trained: Any) -> ReportTokenizer:
    """The vocabulary that a checkpoint was trained with.

    trained  its hash, None where a version kept none: then a given one goes before the run's copy
    Raises:  PretrainedError where it is not there, or is another one
    """
    given = [] if (named := _given(text)) is None else [Path(named)]
    places = [*given, run_dir / KEPT] if trained is None else [run_dir / KEPT, *given]
    there = [place for place in places if os.path.isdir(place)]  # one may be another user's
    if not there:
        raise PretrainedError(
            f"{folder}: expected its vocabulary in {' or '.join(map(str, places))}, there is no "
            "such folder; restore it (a checkpoint is of use only in its run folder), or use a "
            "folder of `mlip export`"
        )
    found = {}
    for place in there:
        if place != there[-1] and not is_vocabulary(place):
            continue
        tokenizer = load_tokenizer(place)
        found[place] = hash_of_vocabulary(tokenizer)
        if trained in (None, found[place]):
            return tokenizer
    told = ", ".join(f"{place} is {has[:12]}" for place, has in found.items())
    raise PretrainedError(
        f"{folder}: the model was trained with the vocabulary {str(trained)[:12]}, {told}; restore "
        "that of the training run"
    )
