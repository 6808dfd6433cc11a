"""Killed, hung and stopped ranks (F01, F02, F08): nothing is lost but at most an interval.

Oracle: the same run without a fault; every step's numbers and the last checkpoint, to the bit.
"""

from __future__ import annotations

import functools
import os
import random
import signal
import time
from pathlib import Path

import pytest

from mlip.training import checkpoint
from mlip.training.faults import SAVE_PHASES, STEP_PHASES
from tests.faults import jobs
from tests.temporary import shared_folder

pytestmark = pytest.mark.long
SEEDS = (1, 2, 3)


@functools.cache
def whole(*settings: str) -> Path:
    """The run that nothing happened to."""
    folder = shared_folder("whole") / "run"
    jobs.finish(folder, *settings)
    return folder


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("phase", [*STEP_PHASES, *SAVE_PHASES])
@pytest.mark.parametrize("victim", [0, 1])
def test_kill_of_each_rank_at_each_phase(victim, phase, seed, tmp_path, record_property):
    draw = random.Random(f"{victim} {phase} {seed}")
    if phase == "retention-delete":
        at = jobs.STEPS  # two are kept: the third save is the first that deletes
    else:
        at = draw.choice((4, 8)) if phase in SAVE_PHASES else draw.randrange(5, jobs.STEPS)
    stage = f"train.zero_stage={draw.choice((1, 2, 3))}"
    run = tmp_path / "run"
    codes = jobs.run(run, stage, fault=f"kill@{victim}:{at}:{phase}")
    (fired,) = jobs.events(run, "fault")
    record_property("fired", 1)
    assert codes[victim] == -9
    if codes[1 - victim] != 0:  # after the last save a survivor may be done
        assert codes[1 - victim] == 6
        (error,) = jobs.events(run, "error")
        record_property("notice_s", error["caught"] - fired["time"])
        assert error["caught"] - fired["time"] < 5.0
        assert f"rank {victim}" in error["waited"]
    newest, problems = checkpoint.find_newest(run)
    assert not problems
    saved = checkpoint.read(newest).step if newest is not None else 0  # gone at the run's end
    begin = time.monotonic()
    jobs.finish(run, stage)
    record_property("resume_s", time.monotonic() - begin)
    resumed = jobs.events(run, "started")[1]["step"]
    record_property("steps_lost", at - resumed)
    assert resumed == saved
    assert at - resumed <= jobs.EVERY
    jobs.require_same_end(whole(stage), run)
    assert not list((run / "checkpoints").glob(".writing-*"))


@pytest.mark.parametrize("phase", ["load", "forward", "allreduce", "backward", "optimizer"])
def test_a_hung_rank_is_named_with_the_collective(phase, tmp_path, record_property):
    run = tmp_path / "run"
    farm = jobs.begin(run, "run.timeout_s=5", fault=f"hang@1:6:{phase}")
    try:
        farm.processes[0].join(120)
        assert farm.processes[0].exitcode == 6, farm.output()
    finally:
        farm.kill()
    (fault,), (error,) = jobs.events(run, "fault"), jobs.events(run, "error")
    took = error["caught"] - fault["time"]
    record_property("fired", 1)
    record_property("over_timeout", took / 5.0 - 1.0)
    # 10 % over what was configured; the machine may be busy with other things beside
    assert 4.9 < took < 5.5 + 2.0
    assert "waiting for rank 1: stopped, last sign" in error["waited"]
    assert error["waited"].startswith("in all_") and "phase" in error["waited"]
    jobs.finish(run)
    jobs.require_same_end(whole(), run)


@pytest.mark.parametrize("number", range(20))
def test_a_stop_at_a_random_instant_loses_no_step(number, tmp_path, record_property):
    # to one rank or both, SIGTERM or SIGUSR1, sometimes twice, also while a save is written
    draw = random.Random(number)
    more = ("train.max_steps=400", "train.checkpoint_steps=3")
    run = tmp_path / "run"
    farm = jobs.begin(run, *more)
    deadline = time.monotonic() + 120
    while jobs.logged(run) < 1 and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(draw.uniform(0.0, 0.6))
    kind = draw.choice((signal.SIGTERM, signal.SIGUSR1))
    for _ in range(draw.choice((1, 2))):
        farm.signal(kind, draw.choice((0, 1, None)))
        time.sleep(draw.uniform(0.0, 0.02))
    begin = time.monotonic()
    codes = farm.wait(60)
    record_property("stop_s", time.monotonic() - begin)
    assert codes == [75, 75], f"{codes}\n{farm.output()}"
    assert time.monotonic() - begin < 10
    (event,) = jobs.events(run, "stopped")
    newest, problems = checkpoint.find_newest(run)
    assert newest is not None and not problems
    saved = checkpoint.read(newest).step
    record_property("steps_lost", jobs.logged(run) - saved)
    assert saved == event["step"] == jobs.logged(run)
    # and what comes after is what would have come: resumed, stopped again two steps on
    farm = jobs.begin(run, *more, fault=f"term@0:{saved + 2}:load")
    assert farm.wait(120) == [75, 75], farm.output()
    assert len(jobs.events(run, "fault")) == 1
    oracle = tmp_path / "oracle"
    farm = jobs.begin(oracle, *more, fault=f"term@0:{saved + 2}:load")
    assert farm.wait(120) == [75, 75], farm.output()
    assert jobs.steps(run) == jobs.steps(oracle)


@pytest.mark.parametrize("world", [2, 4])
def test_an_error_on_one_rank_ends_all_with_its_code(world, tmp_path, record_property):
    codes = jobs.run(tmp_path / "run", world=world, fault="error@1:6:forward")
    assert len(jobs.events(tmp_path / "run", "fault")) == 1
    record_property("fired", 1)
    assert codes == [1] * world


SPOILED = [(k, p) for k in ("nan", "inf") for p in ("load", "forward", "backward", "optimizer")]


@pytest.mark.parametrize(("kind", "phase"), SPOILED)
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_bad_numbers_on_one_rank_skip_the_step_on_all(
    stage, kind, phase, tmp_path, record_property
):
    run = tmp_path / "run"
    codes = jobs.run(run, f"train.zero_stage={stage}", fault=f"{kind}@1:6:{phase}")
    assert len(jobs.events(run, "fault")) == 1
    record_property("fired", 1)
    skipped = jobs.events(run, "skipped")
    if phase == "optimizer" and stage == 2:  # the skipped step makes weights of the masters again
        assert (codes, [e["step"] for e in skipped]) == ([0, 0], [8])
        jobs.run(tmp_path / "batch", "train.zero_stage=2", fault=f"{kind}@1:7:load")
        assert jobs.steps(run) == jobs.steps(tmp_path / "batch")  # nothing of it is left
    elif phase == "optimizer":  # a spoiled weight spoils every step after: three, then the end
        assert (codes, [e["step"] for e in skipped]) == ([5, 5], [8, 9, 10])
    else:
        assert codes == [0, 0] and [e["step"] for e in skipped] == [7]
    for event in skipped:  # the batch of both ranks, by rows of the manifest
        first = (event["step"] - 1) * 8
        assert event["manifest_rows"] == [(first + i) % 40 for i in range(8)]
    for folder in checkpoint.checkpoints_of(run):
        training = checkpoint.read(folder).training
        assert all(t.isfinite().all() for t in training.parameters.values())
        assert all(t.isfinite().all() for g in training.moments.values() for t in g.values())


def test_a_spike_on_one_rank_is_run_again_by_all(tmp_path, record_property):
    # test_spikes.py tells causes apart; here: ranks agree, and the run ends as if nothing happened
    run = tmp_path / "run"
    watched = ("train.spike_factor=1.25", "train.max_steps=16", "train.lr=0.001")
    codes = jobs.run(run, *watched, fault="spike@1:12:forward")
    assert codes == [0, 0] and len(jobs.events(run, "fault")) == 1
    record_property("fired", 1)
    (spike,) = jobs.events(run, "spike")
    assert spike["cause"] == "hardware" and len(spike["manifest_rows"]) == 8
    assert jobs.steps(run) == jobs.steps(whole(*watched))


def test_two_jobs_on_one_folder_and_the_first_goes_on(tmp_path):
    run = tmp_path / "run"
    first = jobs.begin(run, "train.max_steps=100000")
    deadline = time.monotonic() + 60
    while jobs.logged(run) < 1 and time.monotonic() < deadline:
        time.sleep(0.02)
    try:
        assert jobs.begin(run).wait(60) == [2, 2]
        assert all(process.is_alive() for process in first.processes)
    finally:
        first.signal(signal.SIGTERM)
    assert first.wait(60) == [75, 75]


def test_a_clock_that_jumps_changes_nothing(tmp_path):
    # the newest checkpoint is the one of the highest step, whatever its files' times say
    run = tmp_path / "run"
    jobs.run(run, fault="kill@0:9:load")
    for path in (run / "checkpoints").rglob("*"):
        os.utime(path, (0, 0) if "00000008" in str(path) else (2**31, 2**31))
    jobs.finish(run)
    assert jobs.events(run, "started")[1]["step"] == 8
    jobs.require_same_end(whole(), run)
