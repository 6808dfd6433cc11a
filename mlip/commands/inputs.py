"""What sub-commands of `mlip` share: settings of the command line, a device, the model they name.

Nothing that needs another package is imported before it is used (mlip/cli.py says what is missing).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mlip.settings.typed_tree import ConfigError

if TYPE_CHECKING:
    from mlip.settings.given import Given


def read_given(items: Sequence[str]) -> Given:
    """The Config of YAML files and overrides in any order, and what they name; files come first."""
    from mlip.settings.config import read
    from mlip.settings.given import given

    return given(read(*sort_items(items)))


def sort_items(items: Sequence[str]) -> tuple[list[str], list[str]]:
    """(files, overrides) of a command line; checkpoint=DIR is evaluate.checkpoint=DIR."""
    from mlip.settings.config import sort_settings

    if "checkpoint=" in items:  # "checkpoint=$DIR" where DIR is not set: run.dir's would be taken
        raise ConfigError(
            "checkpoint= is empty: expected a run folder, a checkpoint or an export, or leave it "
            "out for the checkpoint of run.dir"
        )
    files, overrides = sort_settings(items)
    return files, [
        f"evaluate.{item}" if item.startswith("checkpoint=") else item for item in overrides
    ]


def pick_device(asked: str | None) -> str:
    import torch

    if asked is not None:
        if asked.startswith("cuda") and not torch.cuda.is_available():
            raise ConfigError(f"--device {asked}: torch sees no GPU here; leave --device out")
        try:
            torch.empty(1, device=asked)
        except (RuntimeError, AssertionError):
            raise ConfigError(
                f"--device {asked}: torch has no such device here; expected cpu, cuda or cuda:1"
            ) from None
        return asked
    return "cuda" if torch.cuda.is_available() else "cpu"


def keep_memory(device: str) -> None:
    """On a CPU activations of one batch are the next one's memory: 3 to 14 % of an embedding."""
    from mlip.training.allocator import keep_freed_memory

    if device == "cpu":
        keep_freed_memory()


def open_trained(given: Given, device: str) -> Any:
    """The checkpoint of the settings (evaluate.checkpoint or run.dir) as it was trained.

    Raises:  ConfigError for a setting of the training that was typed, and is another one there
    """
    from mlip.saved.trained_model import open_checkpoint

    config = given.config
    where = config.evaluate.checkpoint or config.run.dir
    opened = open_checkpoint(
        where,
        device=device,
        lexicon=config.knowledge.lexicon,
        weights_of=config.evaluate.weights,
    )
    given.require_trained(opened.config, where)
    return opened


def open_with_settings(given: Given, device: str) -> Any:
    """The checkpoint of the settings (evaluate.checkpoint or run.dir) and the settings to use.

    The towers are the checkpoint's; pixels and tokens must be prepared as it was trained.
    """
    from mlip.commands.evaluate_transfer import check_preprocessing
    from mlip.transfer.fingerprint import preprocessing

    opened, config = open_trained(given, device), given.config
    where = str(config.evaluate.checkpoint or config.run.dir)
    check_preprocessing(preprocessing(config), preprocessing(opened.config), where)
    merged = dataclasses.replace(
        config,
        model=opened.config.model,
        loss=opened.config.loss,
        knowledge=dataclasses.replace(opened.config.knowledge, lexicon=config.knowledge.lexicon),
        train=dataclasses.replace(config.train, precision=opened.config.train.precision),
    )
    return opened, merged


def open_for_films(
    given: Given, device: str, *, by_patient: bool, by_split: bool | None = None
) -> tuple[Any, Any]:
    """The model with open_with_settings' settings as its own, and the manifest of films of which
    nothing is written yet.

    No columns are asked for but that of the image, by_patient that of the patient and by_split
    (None: as by_patient) that of the split.
    """
    from mlip.dataloading.manifest import load_manifest

    opened, config = open_with_settings(given, device)
    columns = dataclasses.replace(
        config.data.columns, report=None, study_id=None, image_id=None, labels=None
    )
    if config.data.verify == "none":
        columns = dataclasses.replace(columns, sha256=None)
    if not by_patient:
        columns = dataclasses.replace(columns, patient_id=columns.image)
    if not (by_patient if by_split is None else by_split):
        columns = dataclasses.replace(columns, split=None)
    data = dataclasses.replace(config.data, columns=columns, empty_report="image_only")
    config = dataclasses.replace(config, data=data)
    return dataclasses.replace(opened, config=config), load_manifest(config.data)
