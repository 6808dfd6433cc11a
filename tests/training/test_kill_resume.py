"""Two ranks killed, told to stop, resumed, losses bit for bit; and the real launchers (long).

tests/faults holds the whole matrix of ranks, phases and seeds.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from mlip.training import checkpoint
from tests.faults import jobs
from tests.rank_farm import free_port

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = "tests/training/toy_run.py"
STEPS, EVERY = 12, 4


def _command(launcher: str, folder: Path, *more: str) -> list[str]:
    if launcher == "deepspeed":
        start = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2"]
        start += ["--master_port", str(free_port()), "--log_level", "error"]
    elif launcher == "torchrun":
        start = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
        start += ["--master_port", str(free_port())]
    else:
        start = [sys.executable]
    settings = [f"run.dir={folder}", f"train.max_steps={STEPS}", f"train.checkpoint_steps={EVERY}"]
    return [*start, SCRIPT, *settings, "train.keep_checkpoints=2", *more]


def _environment(fault: str | None) -> dict[str, str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
    environment.pop("FAULT", None)
    return environment | ({"FAULT": fault} if fault else {})


def _run(launcher: str, folder: Path, *more: str, fault: str | None = None) -> Any:
    return subprocess.run(
        _command(launcher, folder, *more),
        cwd=ROOT,
        env=_environment(fault),
        capture_output=True,
        text=True,
        timeout=400,
    )


def test_kill_and_stop_lose_nothing_but_an_interval(tmp_path):
    # oracle: the run that nothing happened to
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    jobs.finish(whole)
    assert sorted(jobs.steps(whole)) == list(range(1, STEPS + 1))

    # kill -9 of rank 1 in the middle of step 7; the other rank notices, names it and ends
    assert jobs.run(parts, fault="kill@1:6:backward") == [6, -9]
    (fault,), (error,) = jobs.events(parts, "fault"), jobs.events(parts, "error")
    assert error["rank"] == 0 and "waiting for rank 1: gone" in error["waited"]
    assert error["caught"] - fault["time"] < 15, "the survivor waited for a timeout"
    assert [c.name for c in checkpoint.checkpoints_of(parts)] == ["step_00000004"]

    # SIGTERM to rank 0 alone: both agree on a step, save and say 75
    assert jobs.run(parts, fault="term@0:8:load") == [75, 75]
    assert len(jobs.events(parts, "fault")) == 2
    assert checkpoint.checkpoints_of(parts)[0].name == "step_00000009"

    # what a kill inside a save leaves: rank 0 alone removes it, the other must not stumble
    leftover = parts / "checkpoints" / ".writing-step_00000008"
    shutil.copytree(checkpoint.checkpoints_of(parts)[0], leftover)
    jobs.finish(parts)
    assert not leftover.exists()
    assert [event["step"] for event in jobs.events(parts, "started")] == [0, 4, 9]
    jobs.require_same_end(whole, parts)


@pytest.mark.long
def test_the_launchers_pass_on_kills_and_stops(tmp_path):
    zero = "train.zero_stage=2"
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    done = _run("torchrun", whole, zero)
    assert done.returncode == 0, done.stderr[-3000:]
    oracle = jobs.steps(whole)
    assert sorted(oracle) == list(range(1, STEPS + 1))

    # kill -9 of rank 1 in the middle of step 7; the other rank notices and ends
    done = _run("torchrun", parts, zero, fault="kill@1:6:backward")
    (fault,), (error,) = jobs.events(parts, "fault"), jobs.events(parts, "error")
    assert done.returncode != 0 and (error["rank"], error["code"]) == (0, 6)
    # reliability: 5 s to notice; 2 s more look for the peer's last words
    assert error["time"] - fault["time"] < 15, "the survivor waited for a timeout"
    assert [c.name for c in checkpoint.checkpoints_of(parts)] == ["step_00000004"]

    # SIGTERM to rank 0 alone: both agree on a step, save and say 75
    done = _run("deepspeed", parts, zero, fault="term@0:8:load")
    assert done.returncode == 75, done.stderr[-3000:]
    assert len(jobs.events(parts, "fault")) == 2
    assert checkpoint.checkpoints_of(parts)[0].name == "step_00000009"

    # what a kill inside a save leaves: rank 0 alone removes it, the other must not stumble
    leftover = parts / "checkpoints" / ".writing-step_00000008"
    shutil.copytree(checkpoint.checkpoints_of(parts)[0], leftover)
    done = _run("torchrun", parts, zero)
    assert done.returncode == 0 and not leftover.exists(), done.stderr[-3000:]
    assert [event["step"] for event in jobs.events(parts, "started")] == [0, 4, 9]
    assert jobs.steps(parts) == oracle
    ends = [checkpoint.read(checkpoint.checkpoints_of(folder)[0]) for folder in (whole, parts)]
    assert ends[0].state["rng"] == ends[1].state["rng"]
    for name, tensor in ends[0].training.parameters.items():
        assert tensor.equal(ends[1].training.parameters[name]), name


@pytest.mark.long
@pytest.mark.parametrize(
    ("before", "after"), [(("torchrun", 2), ("python", 0)), (("python", 0), ("torchrun", 3))]
)
def test_another_world_size_and_stage_go_on_where_the_first_stopped(tmp_path, before, after):
    # test_engine_ranks holds the numbers to one process; here: that it goes on at the right step
    fault = "term@0:5:load"
    done = _run(before[0], tmp_path, f"train.zero_stage={before[1]}", fault=fault)
    assert done.returncode in (75, 1)  # torchrun has no other code than 1
    saved = checkpoint.checkpoints_of(tmp_path)[0]
    assert saved.name == "step_00000006"
    done = _run(after[0], tmp_path, f"train.zero_stage={after[1]}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "samples keep their order" in done.stderr
    assert sorted(jobs.steps(tmp_path)) == list(range(1, STEPS + 1))


@pytest.mark.long
def test_killing_the_deepspeed_command_stops_and_saves(tmp_path):
    # the command dies of SIGTERM without a word to its child launcher, which trains on
    command = _command("deepspeed", tmp_path, "train.max_steps=100000", "train.log_steps=1000000")
    job = subprocess.Popen(command, cwd=ROOT, env=_environment(None))
    ranks: list[psutil.Process] = []
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "log.jsonl").is_file() or not jobs.steps(tmp_path):
            assert time.monotonic() < deadline
            time.sleep(0.2)
        ranks = [p for p in psutil.Process(job.pid).children(recursive=True)]
        job.send_signal(signal.SIGTERM)
        job.wait()
        gone, alive = psutil.wait_procs(ranks, timeout=40)
        assert not alive
    finally:
        for process in ranks:
            if process.is_running():
                process.kill()
    assert len(jobs.events(tmp_path, "stopped")) == 1
    assert len(checkpoint.checkpoints_of(tmp_path)) >= 1
