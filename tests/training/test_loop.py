"""The loop in one process on a toy objective: resume, non-finite numbers, saves that fail.

Every test runs both ways of the loop: reading a step's numbers when it is done, as on a CPU, and
when the next one is under way, as on a GPU.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from mlip import precision
from mlip.ranks import distributed
from mlip.training import checkpoint, faults
from mlip.training.lifecycle import CheckpointError, NumericError, Preempted
from mlip.training.loop import Trainer
from mlip.training.step import StepUnderWay
from mlip.training.step_reader import SkippedSteps
from mlip.training.stop_request import StopRequest
from tests.faults.jobs import events
from tests.training.toy_run import make_trainer, toy_config


@pytest.fixture(autouse=True, params=[False, True], ids=["at once", "late"])
def reads_late(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    def make(*args: Any, **named: Any) -> Trainer:
        trainer = make_trainer(*args, **named)
        trainer.reader.reads_late = request.param
        return trainer

    monkeypatch.setattr(f"{__name__}.trainer_of", make)
    return request.param


trainer_of = make_trainer  # as the test at hand wants it


@pytest.fixture(autouse=True)
def _own_faults(monkeypatch: pytest.MonkeyPatch):
    """Fired faults belong to one test."""
    monkeypatch.setattr(faults, "_fired", set())


def _config(folder: Path, *more: str):
    return toy_config(f"run.dir={folder}", "train.max_steps=12", "train.engine=plain", *more)


def _log(folder: Path) -> dict[int, dict[str, Any]]:
    """Step -> entry; a resumed run logs steps again, the later line holds."""
    lines = (folder / "log.jsonl").read_text().splitlines()
    return {entry["step"]: entry for entry in map(json.loads, lines)}


def _numbers(folder: Path) -> list[tuple[float, float, float]]:
    log = _log(folder)
    return [(log[s]["total"], log[s]["grad_norm"], log[s]["lr"]) for s in sorted(log)]


def _run(folder: Path, *more: str, dropout: float = 0.3) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    trainer_of(_config(folder, *more), dropout=dropout).fit(StopRequest())


def test_a_stopped_run_goes_on_bit_for_bit(tmp_path, monkeypatch, reads_late):
    # oracle: the same run without a stop; dropout on, so the generators must come back too
    _run(tmp_path / "whole")
    last = 7 if reads_late else 6
    monkeypatch.setenv("FAULT", "term@0:4:backward")
    with pytest.raises(Preempted, match=f"after step {last} of 12"):
        _run(tmp_path / "parts")
    assert len(events(tmp_path / "parts", "fault")) == 1
    # the signal came in the fifth step's backward pass; ranks agree on it in the sixth step
    assert [c.name for c in checkpoint.checkpoints_of(tmp_path / "parts")] == [
        f"step_0000000{last}"
    ]
    torch.manual_seed(12345)  # what happens between must not matter
    _run(tmp_path / "parts")
    assert _numbers(tmp_path / "parts") == _numbers(tmp_path / "whole")
    ends = [checkpoint.read(checkpoint.checkpoints_of(tmp_path / n)[0]) for n in ("whole", "parts")]
    assert ends[0].step == ends[1].step == 12
    for name, tensor in ends[0].training.parameters.items():
        assert torch.equal(tensor, ends[1].training.parameters[name]), name
    assert ends[0].state["rng"] == ends[1].state["rng"]


def test_a_resume_that_forgot_the_generators_would_show(tmp_path, monkeypatch):
    _run(tmp_path / "whole")
    monkeypatch.setenv("FAULT", "term@0:4:backward")
    with pytest.raises(Preempted):
        _run(tmp_path / "parts")
    monkeypatch.setattr("mlip.training.randomness.restore", lambda *a, **k: torch.manual_seed(3))
    _run(tmp_path / "parts")
    assert _numbers(tmp_path / "parts") != _numbers(tmp_path / "whole")


def test_a_stop_in_the_last_steps_is_a_run_that_ended(tmp_path, monkeypatch):
    monkeypatch.setenv("FAULT", "term@0:10:backward")
    _run(tmp_path)
    assert events(tmp_path, "trained") and not events(tmp_path, "stopped")
    assert sorted(_log(tmp_path)) == list(range(1, 13))


@pytest.mark.parametrize("begun", [0, 4])
def test_a_stop_while_the_run_is_set_up_is_acted_on_before_the_first_step(tmp_path, begun):
    """It cost a first step, which may compile for minutes, and a save of nothing new."""
    if begun:
        _run(tmp_path, "train.max_steps=4")
    trainer = make_trainer(_config(tmp_path), dropout=0.3, allow_mismatch=True)
    stop = StopRequest()
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Preempted, match=f"before step {begun + 1} of 12; nothing was trained"):
        trainer.fit(stop)
    (event,) = events(tmp_path, "stopped")
    assert event["step"] == begun and len(_log(tmp_path)) == begun
    names = [c.name for c in checkpoint.checkpoints_of(tmp_path)]
    assert names == (["step_00000004"] if begun else [])


def test_both_ways_log_and_save_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("FAULT", "nan@0:3:forward,nan@0:7:backward")
    logs, ends = [], []
    for late in (True, False):
        monkeypatch.setattr(faults, "_fired", set())
        folder = tmp_path / str(late)
        folder.mkdir()
        trainer = make_trainer(_config(folder, "train.checkpoint_steps=4"), dropout=0.3)
        trainer.reader.reads_late = late
        trainer.fit(StopRequest())
        of_the_clock = ("time", "pairs_per_s", "data_wait_s", "memory_gib")
        logs.append([{k: e[k] for k in e if k not in of_the_clock} for e in _log(folder).values()])
        ends.append(checkpoint.read(checkpoint.checkpoints_of(folder)[0]))
    assert logs[0] == logs[1] and [e["step"] for e in logs[0]] == list(range(1, 13))
    assert [e["step"] for e in logs[0] if e.get("is_skipped")] == [4, 8]
    for key in ("skipped_steps", "skipped_in_a_row", "loader", "rng", "optimizer_steps"):
        assert ends[0].state[key] == ends[1].state[key], key
    for name, tensor in ends[0].training.parameters.items():
        assert torch.equal(tensor, ends[1].training.parameters[name]), name


def test_a_bad_step_before_an_error_is_told(tmp_path, monkeypatch):
    # read late, it had not been read when the next step's batch failed
    monkeypatch.setenv("FAULT", "nan@0:4:forward,error@0:5:load")
    with pytest.raises(RuntimeError, match="fault injected at step 5"):
        _run(tmp_path)
    assert sorted(_log(tmp_path)) == [1, 2, 3, 4, 5]
    (skipped,) = events(tmp_path, "skipped")
    assert skipped["step"] == 5 and skipped["manifest_rows"] == list(range(32, 40))


def test_a_gpu_that_does_not_come_to_an_end_is_not_waited_for(tmp_path, monkeypatch, reads_late):
    monkeypatch.setenv("FAULT", "error@0:5:load")
    monkeypatch.setattr("mlip.training.step_reader.LAST_STEP_S", 0.05)
    monkeypatch.setattr(StepUnderWay, "is_done", False)
    with pytest.raises(RuntimeError, match="fault injected at step 5"):
        _run(tmp_path)
    assert sorted(_log(tmp_path)) == [1, 2, 3, 4, 5][: 4 if reads_late else 5]


def test_times_of_steps_add_up_to_the_run_either_way(tmp_path):
    """A device that takes 50 ms a step, one after another: counted once each, none left out."""
    tmp_path.mkdir(exist_ok=True)
    trainer = trainer_of(_config(tmp_path))
    start, free_at = trainer.engine.start_step, 0.0

    def queued(*args: Any, **named: Any) -> Any:
        nonlocal free_at
        started = start(*args, **named)
        free_at = done_at = max(free_at, time.perf_counter()) + 0.05
        plain = started.result

        def result() -> Any:
            time.sleep(max(0.0, done_at - time.perf_counter()))
            return plain()

        started.result = result
        return started

    trainer.engine.start_step = queued
    begin = time.perf_counter()
    trainer.fit(StopRequest())
    seconds = [8 / entry["pairs_per_s"] for entry in _log(tmp_path).values()]
    assert len(seconds) == 12
    assert 0.99 * 12 * 0.05 < sum(seconds) < 1.01 * (time.perf_counter() - begin)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("rng", 0), {}),
        (("rng", 0, "torch"), None),
        (("rng", 0, "python"), 3),
        (("rng", 0, "python", 1), []),
        (("rng", 0, "numpy", 1), ["x"]),
        (("rng", 0, "numpy", 1), [-1] * 624),
        (("rng", 0, "torch"), "no hex"),
        (("rng", 0, "torch"), "00"),
        (("loader",), {}),
        (("world_size",), None),
    ],
)
def test_a_state_with_a_part_of_another_kind_is_an_error_of_the_checkpoint(tmp_path, place, value):
    """It was a traceback: "unexpected error", code 1."""
    first = make_trainer(_config(tmp_path, "train.max_steps=4"))
    first.fit(StopRequest())
    read = checkpoint.load_newest(first.config)
    within = read.state
    for key in place[:-1]:
        within = within[key]
    within[place[-1]] = value
    if value is None:
        del within[place[-1]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "load_newest", lambda *args, **named: read)
        with pytest.raises(
            CheckpointError, match=r"step_00000004: .*state\.json.*another run\.dir"
        ):
            make_trainer(_config(tmp_path, "train.max_steps=4"))


def test_counts_of_skipped_steps_go_on_after_a_resume(tmp_path):
    # or a run that is stopped now and then would never reach train.max_nan_steps
    trainer = trainer_of(_config(tmp_path))
    loader: Any = trainer.loader
    trainer.step = loader.step = 3
    trainer.skipped.in_all, trainer.skipped.in_a_row = 5, 2
    trainer.save()
    resumed = trainer_of(_config(tmp_path))
    assert (resumed.step, resumed.skipped) == (3, SkippedSteps(in_all=5, in_a_row=2))


def test_a_finished_run_trains_no_further(tmp_path):
    _run(tmp_path)
    before = _numbers(tmp_path)
    _run(tmp_path)
    assert _numbers(tmp_path) == before
    trainer = make_trainer(_config(tmp_path), dropout=0.3)
    stop = StopRequest()
    os.kill(os.getpid(), signal.SIGTERM)
    trainer.fit(stop)  # nothing is left to stop
    assert not events(tmp_path, "stopped")


def test_dropout_of_a_rank_has_a_seed_of_its_own(tmp_path):
    """Models are built alike on every rank; what they drop would be alike as well."""
    seeds = set()
    for seed in (0, 1):
        _run(tmp_path / str(seed), f"run.seed={seed}", "train.max_steps=1")
        seeds.add(torch.initial_seed())
    assert len(seeds | {0, 1}) == 4


def test_a_nan_step_is_skipped_and_its_rows_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("FAULT", "nan@0:3:forward")
    _run(tmp_path)
    (skipped,) = events(tmp_path, "skipped")
    assert skipped["step"] == 4 and skipped["terms"] == ["total"]
    assert skipped["manifest_rows"] == [24, 25, 26, 27, 28, 29, 30, 31]
    entry = _log(tmp_path)[4]
    assert entry["is_skipped"] and entry["total"] is None and entry["grad_norm"] is None
    state = checkpoint.read(checkpoint.checkpoints_of(tmp_path)[0])
    assert state.state["skipped_steps"] == 1 and state.state["optimizer_steps"] == 11
    assert all(t.isfinite().all() for t in state.training.parameters.values())


def test_bad_images_of_one_step_leave_nothing_behind_in_the_buffers(tmp_path, monkeypatch):
    # the queue remembers features of the batch: not those of a step that was skipped
    monkeypatch.setenv("FAULT", "nan@0:3:load")
    _run(tmp_path, "train.checkpoint_steps=4")
    (skipped,) = events(tmp_path, "skipped")
    assert skipped["step"] == 4 and not events(tmp_path, "not_saved")
    buffers = checkpoint.read(checkpoint.checkpoints_of(tmp_path)[0]).training.buffers
    assert buffers["queue"].isfinite().all() and int(buffers["count"]) == 11


def test_nan_steps_in_a_row_stop_the_run_and_keep_the_last_good_checkpoint(
    tmp_path, monkeypatch, reads_late
):
    monkeypatch.setenv("FAULT", ",".join(f"nan@0:{s}:forward" for s in (2, 5, 6, 7)))
    with pytest.raises(NumericError, match=r"step 8: .*3 in a row.*step_00000005") as caught:
        _run(tmp_path, "train.checkpoint_steps=5")
    assert caught.value.exit_code == 5
    assert [c.name for c in checkpoint.checkpoints_of(tmp_path)] == ["step_00000005"]
    # the one that was under way is told too
    assert sorted(_log(tmp_path)) == list(range(1, 10 if reads_late else 9))


def test_a_failed_save_between_is_said_and_the_run_goes_on(tmp_path, monkeypatch):
    free = checkpoint.shutil.disk_usage(tmp_path)
    asked = []

    def full(path):
        asked.append(path)
        return free._replace(free=1000) if len(asked) == 2 else free

    monkeypatch.setattr(checkpoint.shutil, "disk_usage", full)
    _run(tmp_path, "train.checkpoint_steps=4", "train.keep_checkpoints=5")
    names = [c.name for c in checkpoint.checkpoints_of(tmp_path)]
    assert names == ["step_00000012", "step_00000004"]
    (event,) = events(tmp_path, "not_saved")
    assert event["step"] == 8 and "MiB free" in event["reason"]


def test_a_failed_last_save_is_an_error(tmp_path, monkeypatch):
    free = checkpoint.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda p: free._replace(free=1000))
    with pytest.raises(CheckpointError, match="needs .* MiB, the disk has"):
        _run(tmp_path)


@pytest.mark.parametrize("key", ["concept_table", "tokenizer"])
def test_other_content_behind_the_same_settings_is_refused(tmp_path, key):
    # a vocabulary or a lexicon that was edited in place: no setting shows it
    def begin(value: str, **named: Any) -> Any:
        return trainer_of(_config(tmp_path), facts={key: value}, **named)

    begin("a" * 64).fit(StopRequest())
    with pytest.raises(CheckpointError, match=f"{key} .saved aaaaaaaaaaaa, now bbbbbbbbbbbb"):
        begin("b" * 64)
    assert begin("b" * 64, allow_mismatch=True).step == 12


@pytest.mark.parametrize(
    ("dropout", "says"), [(0.0, "losses agree to rounding"), (0.3, "losses do not agree: what the")]
)
def test_other_ranks_go_on_with_equal_losses_only_where_nothing_is_dropped(
    tmp_path, monkeypatch, dropout, says
):
    """Of a run with dropout it was said too, where its loss of the next step was 0.3 another."""
    first = make_trainer(_config(tmp_path, "train.max_steps=4"), dropout=dropout)
    first.fit(StopRequest())
    read = checkpoint.load_newest(first.config)
    read.state.update(world_size=2, rng=read.state["rng"] * 2)
    said: list[str] = []
    monkeypatch.setattr(distributed, "log_once", said.append)
    first._resume(read, allow_mismatch=False)
    assert said[-1].startswith(f"2 ranks before, 1 now: the samples keep their order, {says}")


def test_the_cost_of_the_gradient_cache_is_printed_once(tmp_path):
    _run(tmp_path, "batch.micro_images=2", "batch.micro_texts=4", "model.vision.norm=group")
    (event,) = events(tmp_path, "cache_cost")
    assert event["passes"] == 4 + 2 and 0.0 < event["share"] < 1.0
    assert event["step"] == 3  # the first two warm up
    _run(tmp_path / "whole")
    assert not events(tmp_path / "whole", "cache_cost")


def test_the_run_leaves_what_it_takes_to_repeat_it(tmp_path):
    _run(tmp_path)
    meta = json.loads((tmp_path / "meta.json").read_text())
    assert meta["config"]["train"]["max_steps"] == 12 and meta["engine"] == "plain"
    assert meta["threads"] == 1 and meta["world_size"] == 1
    assert (tmp_path / "config.yaml").read_text().startswith("run:")
    log = _log(tmp_path)
    assert log[12]["scales"].keys() == {"logit", "logit_local"}
    # 8 of 40 pairs a step; what a step is told is how much was done before it
    assert [log[step]["epoch"] for step in (1, 2, 12)] == pytest.approx([0.0, 0.2, 2.2])


def test_lines_name_losses_scales_gradient_rate_and_memory(tmp_path, capsys):
    _run(tmp_path)
    lines = [x for x in capsys.readouterr().out.splitlines() if x.startswith("step ")]
    assert [x.split()[1] for x in lines] == ["4/12", "8/12", "12/12"]  # train.log_steps=4
    for word in ("loss", "nce", "local", "scales", "grad", "lr", "pairs/s", "data", "GiB"):
        assert word in lines[0]


def test_the_precision_that_auto_came_to_is_said_and_kept(tmp_path, monkeypatch, caplog):
    """A run that goes on where bfloat16 has no products is told so: its numbers are others."""
    caplog.set_level(logging.INFO, "mlip")
    monkeypatch.setattr(precision, "multiplies_bf16", lambda device: True)
    monkeypatch.setenv("FAULT", "term@0:4:backward")
    with pytest.raises(Preempted):
        _run(tmp_path, "train.precision=auto")
    meta = json.loads((tmp_path / "meta.json").read_text())
    assert meta["precision"] == "bf16" and meta["config"]["train"]["precision"] == "auto"
    assert "bfloat16" not in caplog.text

    monkeypatch.setattr(precision, "multiplies_bf16", lambda device: False)
    _run(tmp_path, "train.precision=auto")
    assert "train.precision=auto takes fp32: this processor has no products" in caplog.text
    assert "begun in bf16, goes on in fp32" in caplog.text
    assert json.loads((tmp_path / "meta.json").read_text())["precision"] == "fp32"


def test_tensorboard_that_is_not_installed_is_a_clear_error(tmp_path, monkeypatch):
    import builtins

    plain = builtins.__import__

    def without(name, *rest):
        if name.startswith("torch.utils.tensorboard"):
            raise ImportError(name)
        return plain(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match="pip install tensorboard"):
        _run(tmp_path, "train.tensorboard=true")
