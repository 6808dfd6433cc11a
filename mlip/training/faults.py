"""Faults on demand, for tests: FAULT=kind@rank:step:phase makes one rank fail at one place.

kind: kill (SIGKILL), term (SIGTERM), hang (SIGSTOP), nan (in phase forward the rank's loss, in
phase backward its gradients alone), error (RuntimeError). Several faults are joined by commas.
Each fires once and leaves a line in events.jsonl, so that a test can tell that it did. Where the
variable is not set nothing happens, at the cost of one dictionary look-up.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

from mlip import distributed
from mlip.config import ConfigError
from mlip.training.lifecycle import record_event

PHASES = (
    "load",
    "forward",
    "backward",
    "optimizer",
    "ckpt-write",
    "ckpt-fsync",
    "ckpt-rename",
    "retention-delete",
)
NAN_PHASES = ("forward", "backward")
KINDS = ("kill", "term", "hang", "nan", "error")

_fired: set[str] = set()


def fire(phase: str, step: int, folder: str | Path) -> bool:
    """Fail here if FAULT says so; True where the caller is to make its numbers NaN."""
    wanted = os.environ.get("FAULT")
    if not wanted:
        return False
    for fault in wanted.split(","):
        kind, rank, at_step, at_phase = _parse(fault)
        here = (rank, at_step, at_phase) == (distributed.rank(), step, phase)
        if not here or fault in _fired:
            continue
        _fired.add(fault)
        record_event(Path(folder), "fault", fault=kind, step=step, phase=phase)
        if kind == "nan":
            return True
        if kind == "error":
            raise RuntimeError(f"fault injected at step {step}, phase {phase}")
        signals = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "hang": signal.SIGSTOP}
        os.kill(os.getpid(), signals[kind])
    return False


def _parse(fault: str) -> tuple[str, int, int, str]:
    try:
        kind, _, place = fault.partition("@")
        rank, step, phase = place.split(":")
        if kind in KINDS and phase in PHASES and (kind != "nan" or phase in NAN_PHASES):
            return kind, int(rank), int(step), phase
    except ValueError:
        pass
    raise ConfigError(
        f"FAULT={fault!r}: expected kind@rank:step:phase with kind of {KINDS} and phase of {PHASES}"
    )
