"""`mlip evaluate` with transfer.task set: checkpoint in, results.json, table and page out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlip.dataloading.manifest import load_manifest
from mlip.encoders.options import tower_shape
from mlip.pages.transfer_page import write_transfer_page
from mlip.saved.pretrained_model import Pretrained
from mlip.saved.trained_model import open_checkpoint
from mlip.saved.weights import PretrainedError
from mlip.settings.config import Config, ConfigError, Vision
from mlip.settings.given import Given
from mlip.system.unread_output import terminal_text
from mlip.transfer.fingerprint import hash_of, image_preprocessing
from mlip.transfer.fits.kept_fits import kept_fits
from mlip.transfer.fits.protocol import transfer_run
from mlip.transfer.results_file import save_results
from mlip.transfer.table import table_lines
from mlip.transfer.trained_on import Training

SEED = "{seed}"


def evaluate_transfer(given: Given, folder: Path, *, device: str) -> dict[str, Any]:
    """Run the task of the settings and write results.json and report.html into `folder`.

    Finished fits are kept there until both are written: the same command goes on after a kill.
    Raises:  ConfigError where a checkpoint is needed and none is named, another process writes
             there, or a setting of the training was typed that was another one in it;
             PretrainedError where it was trained on pixels prepared in another way.
    """
    config, vision, facts, trainings = open_vision(given, device)
    manifest = load_manifest(config.data)
    with kept_fits(folder, print) as kept:
        results = transfer_run(
            *(config, manifest, vision),
            facts=facts,
            trainings=trainings,
            device=device,
            kept=kept,
            say=print,
        )
        saved = save_results(results, folder)  # before what is drawn from them
        page = write_transfer_page(folder, results)
        kept.remove()
    print(terminal_text(["", *table_lines(results), "", str(saved), str(page)]))
    return results


def open_vision(given: Given, device: str) -> tuple[Config, Any, dict[str, Any], list[Training]]:
    """(settings with the checkpoint's tower, its encoder by seed or None, facts of its training,
    what it was trained on).

    "{seed}" in the checkpoint's path stands for each of transfer.seeds: pre-trainings of their own.
    """
    config = given.config
    start, where = config.transfer.start, config.evaluate.checkpoint
    seeds = config.transfer.seeds
    if not takes_checkpoint(config):
        return config, None, {}, []
    if where is None:
        raise ConfigError(
            "transfer.start=checkpoint: say which one with checkpoint=DIR, or set transfer.start "
            "to random or imagenet"
        )
    if SEED in str(where):
        opened = {
            seed: _open(config, str(where).replace(SEED, str(seed)), device) for seed in seeds
        }
    else:
        opened = dict.fromkeys(seeds, _open(config, where, device))
    first = opened[seeds[0]]
    given.require_trained(first.config, str(where).replace(SEED, str(seeds[0])))
    for seed, own in opened.items():
        if _design(own) != _design(first):
            raise PretrainedError(
                f"{where}: the image towers of seeds {seeds[0]} and {seed} differ: expected one "
                "design over all seeds"
            )
    towers = dataclasses.replace(config, model=first.config.model)
    # a random start takes the checkpoint's shape and nothing of its training
    facts = dict(first.facts) if start == "checkpoint" else {}
    if facts and SEED in str(where):
        facts["checkpoint"] = str(where)
    trainings = [Training.of(own) for own in opened.values()] if start == "checkpoint" else []
    return towers, {seed: own.model.vision for seed, own in opened.items()}, facts, trainings


def takes_checkpoint(config: Config) -> bool:
    """Whether a task begins with a checkpoint, by its weights or by its shape alone."""
    start, where = config.transfer.start, config.evaluate.checkpoint
    return start == "checkpoint" or (start == "random" and where is not None)


def _design(opened: Pretrained) -> Vision:
    """Its image tower by shape: one run may name the folder it began with, another its options."""
    shape = tower_shape(opened.model.vision.tower.backbone.config)
    return dataclasses.replace(opened.config.model.vision, source=None, options=shape)


def _open(config: Config, where: Any, device: str) -> Pretrained:
    opened = open_checkpoint(
        where,
        device=device,
        lexicon=config.knowledge.lexicon,
        weights_of=config.evaluate.weights,
    )
    if config.transfer.start == "checkpoint":
        check_preprocessing(image_preprocessing(config), image_preprocessing(opened.config), where)
    return opened


def check_preprocessing(asked: Mapping[str, Any], trained: Mapping[str, Any], where: str) -> None:
    """Refuse a checkpoint whose training prepared its input in another way; both hashes shown.

    asked, trained  what mlip.transfer.fingerprint.preprocessing (or image_preprocessing) gave
    Raises:         PretrainedError naming each setting and what to add.
    """
    different = [key for key in asked if asked[key] != trained[key]]
    if not different:
        return
    shown = ", ".join(
        f"data.{key} (trained with {trained[key]!r}, asked {asked[key]!r})" for key in different
    )
    remedy = " ".join(f"data.{key}={trained[key]}" for key in different)
    raise PretrainedError(
        f"{where} was trained with preprocessing {hash_of(trained)[:12]}, the settings ask for "
        f"{hash_of(asked)[:12]}: {shown}; add {remedy}"
    )
