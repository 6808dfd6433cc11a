"""Faults on demand, for tests: FAULT=kind@rank:step:phase makes one rank fail at one place.

kind   kill (SIGKILL), term (SIGTERM), hang (SIGSTOP), error (RuntimeError);
       nan and inf spoil numbers of this rank alone: in phase load its images, forward its loss,
       backward its gradients, optimizer one of its weights;
       spike multiplies by 128: in phase load the images, forward the loss once, optimizer a weight
phase  where a step or a save is; `pointer-update` is the writing of the marker COMPLETE

Several faults are joined by commas. Each fires once and leaves a line in events.jsonl, so that a
test can tell that it did. Where the variable is not set nothing happens, at the cost of one
dictionary look-up.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

from mlip.ranks import distributed
from mlip.settings.config import ConfigError
from mlip.training.lifecycle import record_event

STEP_PHASES = ("load", "forward", "allreduce", "backward", "optimizer")
SAVE_PHASES = ("ckpt-write", "ckpt-fsync", "pointer-update", "ckpt-rename", "retention-delete")
PHASES = STEP_PHASES + SAVE_PHASES
SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "hang": signal.SIGSTOP}
# kind -> what the caller multiplies with, and the phases whose caller does
SPOILS = {
    "nan": (float("nan"), ("load", "forward", "backward", "optimizer")),
    "inf": (float("inf"), ("load", "forward", "backward", "optimizer")),
    "spike": (128.0, ("load", "forward", "optimizer")),  # an exponent bit or three
}
KINDS = (*SIGNALS, "error", *SPOILS)

_fired: set[str] = set()


def fire(phase: str, step: int, folder: str | Path) -> float | None:
    """Fail here if FAULT says so; a number where the caller is to multiply its own with it."""
    wanted = os.environ.get("FAULT")
    if not wanted:
        return None
    for fault in wanted.split(","):
        kind, rank, at_step, at_phase = _parse(fault)
        here = (rank, at_step, at_phase) == (distributed.rank(), step, phase)
        if not here or fault in _fired:
            continue
        _fired.add(fault)
        record_event(Path(folder), "fault", fault=kind, step=step, phase=phase)
        if kind in SPOILS:
            return SPOILS[kind][0]
        if kind == "error":
            raise RuntimeError(f"fault injected at step {step}, phase {phase}")
        os.kill(os.getpid(), SIGNALS[kind])
    return None


def _parse(fault: str) -> tuple[str, int, int, str]:
    try:
        kind, _, place = fault.partition("@")
        rank, step, phase = place.split(":")
        if kind in KINDS and phase in PHASES and phase in SPOILS.get(kind, (0.0, PHASES))[1]:
            return kind, int(rank), int(step), phase
    except ValueError:
        pass
    raise ConfigError(
        f"FAULT={fault!r}: expected kind@rank:step:phase with kind of {KINDS} and phase of "
        f"{PHASES}; {tuple(SPOILS)} only in phases {SPOILS['nan'][1]}"
    )
