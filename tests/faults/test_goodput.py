"""Useful time under a kill every two minutes for ten, with the real launcher and cold starts.

FAULTS_GOODPUT="seconds,period" shortens it: a number then, not the goal's.
"""

from __future__ import annotations

import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.faults import jobs
from tests.rank_farm import free_port

pytestmark = pytest.mark.long
ROOT = Path(__file__).resolve().parents[2]
GOAL = 0.75


def _launch(run: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--master_port", str(free_port()), "tests/training/toy_run.py", f"run.dir={run}"]
    command += ["train.max_steps=10000000", "train.checkpoint_steps=50", "train.zero_stage=2"]
    command += ["batch.global_pairs=256"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "FAULT": ""}
    with open(run.with_suffix(".out"), "ab") as out:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=out)


def test_goodput_under_kills(tmp_path, record_property):
    seconds, period = map(float, os.environ.get("FAULTS_GOODPUT", "600,120").split(","))
    run, draw = tmp_path / "run", random.Random(0)
    begin = time.monotonic()
    kills, lost = 0, 0
    job = _launch(run)
    try:
        while (now := time.monotonic() - begin) < seconds:
            if now >= (kills + 1) * period and jobs.logged(run) > 0:
                ranks = [
                    p
                    for p in psutil.Process(job.pid).children(recursive=True)
                    if "tests/training/toy_run.py" in " ".join(p.cmdline())
                ]
                if ranks:
                    before = jobs.logged(run)
                    draw.choice(ranks).send_signal(signal.SIGKILL)
                    kills += 1
                    job.wait(60)
                    newest = jobs.checkpoint.checkpoints_of(run)[0].name
                    lost += before - int(newest[5:])
            if job.poll() is not None:
                job = _launch(run)  # what a scheduler or --max-restarts does
            time.sleep(0.2)
        wall = time.monotonic() - begin
    finally:
        job.send_signal(signal.SIGTERM)
        try:
            job.wait(60)
        except subprocess.TimeoutExpired:
            job.kill()
    done = jobs.checkpoint.read(jobs.checkpoint.checkpoints_of(run)[0]).step
    # a step's time where no start is near: the median between two lines of the log
    times = [json.loads(x)["time"] for x in (run / "log.jsonl").read_text().splitlines()]
    step_s = statistics.median(b - a for a, b in zip(times, times[1:], strict=False))
    mean_s = statistics.mean(b - a for a, b in zip(times, times[1:], strict=False) if b - a < 5)
    goodput = done * mean_s / wall
    for name, value in (
        ("goodput", round(goodput, 3)),
        ("kills", kills),
        ("steps_lost", lost),
        ("steps", done),
        ("median_step_s", round(step_s, 4)),
        ("seconds", round(wall, 1)),
        ("period", period),
    ):
        record_property(name, value)
    assert kills >= int(seconds / period) - 1
    if (seconds, period) == (600.0, 120.0):
        assert goodput >= GOAL
