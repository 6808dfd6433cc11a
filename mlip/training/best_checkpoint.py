"""Which checkpoint a run's folder stands for, where it is used: the best on val, else the newest.

A run goes on from its newest one; this is for evaluation, export and all that opens a run.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from mlip.training.checkpoint import (
    checkpoints_of,
    find_newest,
    folder_of,
    read_state,
    require_intact,
)
from mlip.training.lifecycle import CheckpointError


def find_best(run_dir: str | Path) -> tuple[Path | None, list[str]]:
    """The intact checkpoint of the step that val chose (train.monitor), else the newest intact one.

    Returns: its folder, None where there is none at all; and what is wrong with those passed over
    Raises:  CheckpointError where there are checkpoints and none is intact, or may be read.
    """
    newest, problems = find_newest(run_dir)
    if newest is None:
        return None, problems
    step = best_step(newest)
    if step is None or (best := folder_of(run_dir, step)).name == newest.name:
        return newest, problems
    try:
        require_intact(best)
    except CheckpointError as error:
        return newest, [*problems, f"the best on val, {error}"]
    return best, problems


def best_step(checkpoint: Path) -> int | None:
    """The step that val had chosen when a checkpoint was saved; None = val not watched."""
    try:
        step = _validation(checkpoint).get("best_step")
        return None if step is None else int(step)
    except (TypeError, ValueError):
        return None


def weights_watched(checkpoint: Path) -> str:
    """The weights that val scored: "trained", or "ema" for their average."""
    return str(_validation(checkpoint).get("weights", "trained"))


def _validation(checkpoint: Path) -> dict[str, Any]:
    """Nothing of a state.json whose hash does not hold, or that is not open to this user."""
    with contextlib.suppress(CheckpointError):
        found = (read_state(checkpoint) or {}).get("validation")
        return found if isinstance(found, dict) else {}
    return {}


def is_best(checkpoint: Path, step: int) -> bool | None:
    """Whether val chose this checkpoint's step among those of its run; None = val not watched.

    The newest one whose state is whole tells: a later one may have been better, and one that was
    saved on a stop was scored after it.
    """
    held = checkpoints_of(checkpoint.resolve().parent.parent) or [checkpoint]
    told = (best_step(folder) for folder in held)
    best = next((number for number in told if number is not None), None)
    return None if best is None else best == step
