"""Which settings a resumed run must share with its checkpoint, and which are free to change."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlip.ranks import distributed
from mlip.settings.config import Config, difference, from_dict
from mlip.training.lifecycle import CheckpointError

# Settings that change how a step is computed or shown, but not which numbers come out, and the
# places of files (the manifest's content is compared by the loader's own state).
FREE_SETTINGS = (
    "run.dir",
    "run.threads",
    "run.timeout_s",
    "run.offline",
    "run.exact",
    "run.deterministic",
    "data.manifest",
    "data.root",
    "data.verify",
    "data.bad_share",
    "data.workers",
    "data.prefetch",
    "data.phantom.",
    "batch.micro_images",
    "batch.micro_texts",
    "train.engine",
    "train.zero_stage",
    "train.compile",
    "train.offload",
    "train.checkpoint_steps",
    "train.keep_checkpoints",
    "train.monitor",
    "train.patience",
    "train.log_steps",
    "train.max_nan_steps",
    "train.spike_factor",
    "train.tensorboard",
    "train.wandb",
    "train.mlflow",
    "model.vision.checkpointing",
    "model.text.checkpointing",
    "knowledge.cache_dir",
    "data.columns.labels",
    "evaluate.",
    "transfer.",
)


def check_settings(
    folder: Path, state: Mapping[str, Any], config: Config, *, allow_mismatch: bool
) -> None:
    """Raises:  CheckpointError naming every setting that differs, unless allow_mismatch."""
    try:
        saved = from_dict(state["config"])
    except ValueError as error:
        raise CheckpointError(f"{folder}: its settings are not valid: {error}") from None
    different = {
        key: values
        for key, values in difference(saved, config).items()
        if not key.startswith(FREE_SETTINGS)
    }
    if not different:
        return
    shown = ", ".join(f"{k} (saved {a!r}, now {b!r})" for k, (a, b) in different.items())
    if not allow_mismatch:
        raise CheckpointError(
            f"{folder} belongs to other settings: {shown}; choose another run.dir, "
            "restore the settings, or pass --allow-mismatch"
        )
    distributed.log_once(f"resuming although settings differ: {shown}", logging.WARNING)
