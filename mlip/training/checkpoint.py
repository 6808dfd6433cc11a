"""Checkpoints that any world size and ZeRO stage can read, that a kill cannot harm, and no pickle.

<run.dir>/checkpoints/step_00000500/
  parameters.safetensors   float32, whole, by name: consolidated weights
  exp_avg.safetensors, exp_avg_sq.safetensors   the optimiser's moments, by parameter name
  buffers.safetensors      persistent buffers
  ema.safetensors          averaged weights by name, where train.ema_decay is set
  state.json               step, counts, random generators, loader, config, versions, and the shapes
                           of towers that began with a folder
  SHA256SUMS               of the files above; `sha256sum -c` checks them by hand
  COMPLETE                 written last: the hash of SHA256SUMS

Everything is written and fsynced under a temporary name and then renamed, so a kill leaves the
previous checkpoint and a leftover that the next job removes. Reading verifies every hash: neither
safetensors nor torch notices a flipped bit.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from mlip.ranks import distributed
from mlip.settings.config import Config
from mlip.settings.config_file import CHECKPOINTS
from mlip.system.machine import limit_reached
from mlip.system.output_file import file_sha256, sync
from mlip.training.checkpoint_content import (
    is_finite,
    load_tensors,
    refuse_constant,
    require_state,
)
from mlip.training.checkpoint_settings import check_settings
from mlip.training.ema import EMAState
from mlip.training.faults import SAVE_PHASES, fire
from mlip.training.lifecycle import CheckpointError
from mlip.training.optimizer import MOMENTS
from mlip.training.step import TrainingState

FORMAT = 1
_TENSORS = ("parameters", *MOMENTS, "buffers")
_EMA = "ema"
_SUMS, _MARKER, STATE = "SHA256SUMS", "COMPLETE", "state.json"
_PREFIX, _PARTIAL = "step_", ".writing-"
_PASSED_OVER = "PASSED_OVER"  # in a damaged one


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint as read."""

    folder: Path
    training: TrainingState
    state: dict[str, Any]  # state.json

    @property
    def step(self) -> int:
        return int(self.state["step"])


def checkpoints_of(run_dir: str | Path) -> list[Path]:
    """Folders of finished saves, newest first; their content is not verified here."""
    folder = Path(run_dir) / CHECKPOINTS
    if not folder.is_dir():
        return []
    return sorted(
        (
            path
            for path in folder.iterdir()
            # a link is none of ours: retention would reach what it leads to
            if path.name.startswith(_PREFIX) and path.is_dir() and not path.is_symlink()
        ),
        key=lambda path: path.name,
        reverse=True,
    )


def folder_of(run_dir: str | Path, step: int) -> Path:
    """Where the checkpoint of a step lies, or would lie."""
    return Path(run_dir) / CHECKPOINTS / f"{_PREFIX}{step:08d}"


def save(
    run_dir: str | Path, training: TrainingState, state: Mapping[str, Any], *, keep: int
) -> Path:
    """Write one checkpoint from rank 0; a collective call.

    All but the newest `keep` and the best on val (state["validation"]) are dropped.

    Raises:  CheckpointError on every rank where it cannot be written; earlier ones are untouched.
    """
    step = int(state["step"])
    final = folder_of(run_dir, step)
    best = (state.get("validation") or {}).get("best_step")
    problem = None
    if distributed.is_main():
        try:
            _write(final, training, state, Path(run_dir))
            _retain(Path(run_dir), keep, step, best)
        except CheckpointError as error:
            problem = str(error)
        except Exception as error:  # safetensors has error types of its own for a full disk
            problem = f"{final}: cannot be written: {error}"
    else:
        for phase in SAVE_PHASES:  # what can happen to a rank that waits for rank 0's save
            fire(phase, step, run_dir)
    problem = distributed.broadcast_object(problem)
    if problem is not None:
        raise CheckpointError(problem)
    return final


def _write(final: Path, training: TrainingState, state: Mapping[str, Any], run_dir: Path) -> None:
    step = int(state["step"])
    if final.exists() and _damage(final) is None:
        return  # the same state: a stop was asked for right after a resume
    tensors: dict[str, dict[str, Tensor]] = {
        "parameters": training.parameters,
        **training.moments,
        "buffers": training.buffers,
        **({_EMA: training.ema.parameters} if training.ema is not None else {}),
    }
    for kind, group in tensors.items():
        for name, tensor in group.items():
            if not is_finite(tensor):
                raise CheckpointError(
                    f"{final}: {kind} {name} holds a number that is not finite; such a state is "
                    "never saved, the last good checkpoint is kept"
                )
    final.parent.mkdir(parents=True, exist_ok=True)
    _check_space(final.parent, tensors)
    remove_leftovers(run_dir)
    partial = final.parent / f"{_PARTIAL}{final.name}"
    partial.mkdir()
    for kind, group in tensors.items():
        owned = {n: t.detach().cpu().contiguous().clone() for n, t in group.items()}
        save_file(owned, partial / f"{kind}.safetensors")
        fire("ckpt-write", step, run_dir)
    counts = {
        "optimizer_steps": training.optimizer_steps,
        "ema_updates": training.ema.updates if training.ema is not None else None,
    }
    text = json.dumps({**state, **counts}, allow_nan=False)
    (partial / STATE).write_text(text, encoding="utf-8")
    names = [*(f"{kind}.safetensors" for kind in tensors), STATE]
    sums = "".join(f"{file_sha256(partial / name)}  {name}\n" for name in names)
    (partial / _SUMS).write_text(sums, encoding="utf-8")
    for name in (*names, _SUMS):
        sync(partial / name)
    fire("ckpt-fsync", step, run_dir)
    fire("pointer-update", step, run_dir)
    (partial / _MARKER).write_text(file_sha256(partial / _SUMS) + "\n", encoding="utf-8")
    sync(partial / _MARKER)
    sync(partial)
    if final.exists():
        shutil.rmtree(final)  # a damaged one of the same step, passed over at the start
    fire("ckpt-rename", step, run_dir)
    partial.rename(final)
    sync(final.parent)


def _check_space(folder: Path, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
    wanted = sum(t.numel() * t.element_size() for group in tensors.values() for t in group.values())
    total, _, free = shutil.disk_usage(folder)
    # and room for the JSON; a program's file system (FUSE) that does not tell says 0 of 0
    if total and free < wanted * 1.01 + 2**20:
        raise CheckpointError(
            f"{folder}: a checkpoint needs {wanted / 2**20:.1f} MiB, the disk has "
            f"{free / 2**20:.1f} MiB free; earlier checkpoints are untouched"
        )


def _retain(run_dir: Path, keep: int, step: int, best: int | None) -> None:
    # one of a later step was passed over as damaged: it must not push out a good one
    held = [p for p in checkpoints_of(run_dir) if p.name <= f"{_PREFIX}{step:08d}"]
    good = [p for p in held if not (p / _PASSED_OVER).exists()]
    kept = good[:keep]
    kept += [p for p in good[keep:] if best is not None and p == folder_of(run_dir, best)]
    # damaged ones may still help who looks into them, as long as good ones are few
    superfluous = [p for p in held if p not in kept and (p in good or len(kept) >= keep)]
    for old in superfluous:
        # without its marker a half-deleted folder is never mistaken for a checkpoint
        (old / _MARKER).unlink(missing_ok=True)
        fire("retention-delete", step, run_dir)
        shutil.rmtree(old)


def remove_leftovers(run_dir: str | Path) -> None:
    """Delete what a killed save left; only the job that holds the folder's lock may call it."""
    folder = Path(run_dir) / CHECKPOINTS
    for partial in folder.glob(f"{_PARTIAL}*"):
        if partial.is_dir() and not partial.is_symlink():
            shutil.rmtree(partial)
        else:
            partial.unlink()


def find_newest(run_dir: str | Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose every hash holds, and what is wrong with those passed over.

    Raises:  CheckpointError where there are checkpoints and none is intact, or may be read.
    """
    problems: list[str] = []
    folders = checkpoints_of(run_dir)
    for folder in folders:
        problem = _damage(folder)
        if problem is None:
            return folder, problems
        problems.append(f"{folder}: {problem}")
    if folders:
        raise CheckpointError(
            "no intact checkpoint is left: "
            + "; ".join(problems)
            + f"; if {run_dir} is a copy that was cut, copy it again; to start over, delete its "
            "folder checkpoints"
        )
    return None, problems


def require_intact(folder: Path) -> None:
    """Raises:  CheckpointError where a hash of it does not hold, or it may not be read."""
    if problem := _damage(folder):
        raise CheckpointError(
            f"{folder}: {problem}; if it is a copy that was cut, copy it again, else name another "
            "checkpoint, or the folder of the run for its newest intact one"
        )


def _damage(folder: Path, only: str | None = None) -> str | None:
    """Why the checkpoint, or the one file of it that is named, cannot be trusted; or None.

    Raises:  CheckpointError for one that this user may not read, or a limit of the machine keeps
             from being read.
    """
    try:
        marker = (folder / _MARKER).read_text(encoding="utf-8").strip()
        if marker != file_sha256(folder / _SUMS):
            return f"{_SUMS} is not the one that {_MARKER} names"
        lines = (folder / _SUMS).read_text(encoding="utf-8").splitlines()
        names = set()
        for line in lines:
            expected, name = line.split("  ")
            if Path(name).name != name:
                return f"{_SUMS} names a file outside: {name!r}"
            if only in (None, name) and file_sha256(folder / name) != expected:
                return f"{name} is not what was written (SHA-256 differs)"
            names.add(name)
    except FileNotFoundError as error:
        return f"{Path(str(error.filename)).name} is missing"
    except PermissionError as error:  # nothing is wrong with it: no older one is taken instead
        raise CheckpointError(
            f"{error.filename}: cannot be read: {error.strerror}; a run's tensors are open to the "
            "user alone who trained it: ask that one for an `mlip export`, or for the right to read"
        ) from None
    except (OSError, ValueError) as error:
        if told := limit_reached(error):  # nothing is wrong with it either
            raise CheckpointError(f"{folder}: cannot be read: {told}") from None
        return f"cannot be read: {error}"
    missing = {*(f"{kind}.safetensors" for kind in _TENSORS), STATE} - names
    return f"{_SUMS} lacks {sorted(missing)}" if missing else None


def read_state(folder: Path) -> dict[str, Any] | None:
    """state.json where its hash holds, of whatever format, without a look at tensors; else None.

    Raises:  CheckpointError as find_newest, for one that may not be read
    """
    if _damage(folder, only=STATE) is not None:
        return None
    with contextlib.suppress(OSError, ValueError, RecursionError):
        state = json.loads((folder / STATE).read_text("utf-8"), parse_constant=refuse_constant)
        return state if isinstance(state, dict) else None
    return None


def read(folder: Path, *, moments: bool = True) -> Checkpoint:
    """A checkpoint whose hashes hold (find_newest, require_intact); tensors on the CPU.

    moments  false where nothing is trained on: two thirds of the tensors stay unread
    """
    try:
        text = (folder / STATE).read_text(encoding="utf-8")
        state = json.loads(text, parse_constant=refuse_constant)
        if state.get("format") != FORMAT:
            raise CheckpointError(
                f"{folder}: format {state.get('format')!r}, this version reads format {FORMAT}"
            )
        require_state(state)
        updates = state.get("ema_updates")
        kinds = [kind for kind in _TENSORS if moments or kind not in MOMENTS]
        kinds += [] if updates is None else [_EMA]
        tensors = {kind: load_tensors(folder / f"{kind}.safetensors") for kind in kinds}
        ema = None if updates is None else EMAState(tensors[_EMA], updates)
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: cannot be read: {error}") from error
    except (AttributeError, KeyError, TypeError) as error:  # JSON, but not what was written
        raise CheckpointError(f"{folder}: {STATE} is not of a checkpoint: {error!r}") from error
    training = TrainingState(
        parameters=tensors["parameters"],
        moments={key: tensors[key] for key in MOMENTS if moments},
        buffers=tensors["buffers"],
        optimizer_steps=state["optimizer_steps"],
        ema=ema,
    )
    return Checkpoint(folder, training, state)


def load_newest(config: Config, *, allow_mismatch: bool = False) -> Checkpoint | None:
    """The newest intact checkpoint of run.dir on every rank, or None; a collective call.

    Raises:  CheckpointError where none is intact, or where the newest was made with settings that
             differ in more than those that are free and allow_mismatch is not set.
    """
    found: tuple[Path | None, list[str]] = (None, [])
    problem = None
    if distributed.is_main():
        try:
            found = find_newest(config.run.dir)
            _mark_passed_over(config.run.dir, found[0])
        except CheckpointError as error:
            problem = str(error)
    found, problem = distributed.broadcast_object((found, problem))
    if problem is not None:
        raise CheckpointError(problem)
    folder, passed_over = found
    for text in passed_over:
        distributed.log_once(f"checkpoint passed over: {text}", logging.WARNING)
    if folder is None:
        return None
    checkpoint = read(folder)
    check_settings(folder, checkpoint.state, config, allow_mismatch=allow_mismatch)
    return checkpoint


def _mark_passed_over(run_dir: str | Path, taken: Path | None) -> None:
    """Those newer than the one taken are damaged: none may count among those that are kept."""
    for folder in checkpoints_of(run_dir):
        if folder == taken:
            return
        (folder / _PASSED_OVER).touch()
