"""A small training of two ranks that can be killed, stopped and started again in a second each."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from mlip.training import checkpoint
from tests import rank_farm
from tests.rank_farm import Farm
from tests.training.toy_run import run_rank

STEPS, EVERY = 12, 4


def begin(folder: Path, *more: str, world: int = 2, fault: str = "") -> Farm:
    """Start a run of 12 steps with a save every 4; ranks that die are not started again."""
    settings = [f"run.dir={folder}", f"train.max_steps={STEPS}", f"train.checkpoint_steps={EVERY}"]
    settings += ["train.keep_checkpoints=2", "train.zero_stage=2", "run.timeout_s=20", *more]
    out = folder.with_name(f"{folder.name}-output")
    shutil.rmtree(out, ignore_errors=True)
    return rank_farm.start(run_rank, world, *settings, environment={"FAULT": fault}, folder=out)


def run(folder: Path, *more: str, world: int = 2, fault: str = "") -> list[int]:
    """Exit codes of a run from its start or its last checkpoint to its end or its fault."""
    return begin(folder, *more, world=world, fault=fault).wait(600)


def finish(folder: Path, *more: str, world: int = 2) -> None:
    """Run to the last step; raises with the ranks' output where that fails."""
    farm = begin(folder, *more, world=world)
    codes = farm.wait(600)
    assert codes == [0] * world, f"exit codes {codes}\n{farm.output()}"


def steps(folder: Path) -> dict[int, tuple[Any, ...]]:
    """Step -> its numbers to the bit; a resumed run logs steps again, the later line holds."""
    found = {}
    for line in (folder / "log.jsonl").read_text().splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue  # cut by a kill
        found[entry["step"]] = (entry["total"], entry["grad_norm"], entry["terms"], entry["lr"])
    return found


def logged(folder: Path) -> int:
    """The last step that a run logged; 0 before the first."""
    try:
        return max(steps(folder), default=0)
    except FileNotFoundError:
        return 0


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    path = folder / "events.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def require_same_end(left: Path, right: Path) -> None:
    """Every step's numbers, and every tensor and generator of the last checkpoint, to the bit."""
    assert steps(left) == steps(right)
    ends = [checkpoint.read(checkpoint.checkpoints_of(folder)[0]) for folder in (left, right)]
    assert ends[0].step == ends[1].step == STEPS
    assert ends[0].state["rng"] == ends[1].state["rng"]
    assert ends[0].state["loader"] == ends[1].state["loader"]
    first, second = (end.training for end in ends)
    groups = [(first.parameters, second.parameters), (first.buffers, second.buffers)]
    groups += [(first.moments[key], second.moments[key]) for key in first.moments]
    for a, b in groups:
        assert a.keys() == b.keys()
        for name, tensor in a.items():
            assert tensor.equal(b[name]), name
