"""Scores of val at each checkpoint: what they leave alone, what they keep, when they end a run.

Scripted scores stand in for measured ones where the decision is what is tested.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from mlip.losses.held_out import HELD_OUT_LOSSES
from mlip.ranks import distributed
from mlip.settings import agreement as config_agreement
from mlip.settings.config import ConfigError, load
from mlip.training import checkpoint, faults, presence
from mlip.training.best_checkpoint import best_step, find_best, is_best
from mlip.training.lifecycle import CheckpointError, Preempted
from mlip.training.loop import Trainer
from mlip.training.stop_request import StopRequest
from mlip.training.validation import Validation
from tests.training.toy_run import (
    ToyHeldOut,
    make_batch,
    make_trainer,
    make_validation,
    toy_config,
)

NO_CONTRAST = ("loss.global_contrastive.weight=0", "loss.local_alignment.weight=0")
WATCHED = ("train.monitor=loss", "train.checkpoint_steps=2")


@pytest.fixture(autouse=True)
def _own_faults(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(faults, "_fired", set())


def _trainer(folder: Path, *more: str) -> Trainer:
    folder.mkdir(parents=True, exist_ok=True)
    settings = [f"run.dir={folder}", "train.max_steps=12", "train.engine=plain", *more]
    return make_trainer(toy_config(*settings), dropout=0.3)


def _run(folder: Path, *more: str) -> Trainer:
    trainer = _trainer(folder, *more)
    trainer.fit(StopRequest())
    return trainer


def _script(monkeypatch: pytest.MonkeyPatch, losses: Sequence[float], every: int = 2) -> list[int]:
    """The loss on val by the look's step; returns the steps that were looked at."""
    looked: list[int] = []

    def scores(self: Validation, engine: Any) -> dict[str, float]:
        step = (looked[-1] if looked else 0) + every
        looked.append(step)
        return {"total": losses[step // every - 1], "recall@1 image to text": 0.25}

    monkeypatch.setattr(Validation, "_scores", scores)
    return looked


def _steps(folder: Path) -> list[int]:
    return sorted(int(c.name.removeprefix("step_")) for c in checkpoint.checkpoints_of(folder))


def _lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(x) for x in (folder / "validation.jsonl").read_text().splitlines()]


def test_a_run_that_is_watched_is_the_same_run(tmp_path):
    # oracle: the run without; dropout on, so a generator that was asked would show
    _run(tmp_path / "alone", "train.checkpoint_steps=2")
    trainer = _run(tmp_path / "watched", *WATCHED)
    ends = [
        checkpoint.read(checkpoint.checkpoints_of(tmp_path / n)[0]) for n in ("alone", "watched")
    ]
    for kind in ("parameters", "buffers"):
        left, right = (getattr(end.training, kind) for end in ends)
        assert all(torch.equal(left[name], right[name]) for name in left)
    assert ends[0].state["rng"] == ends[1].state["rng"]
    log = [(tmp_path / n / "log.jsonl").read_text().splitlines() for n in ("alone", "watched")]
    totals = [[json.loads(line)["total"] for line in lines] for lines in log]
    assert totals[0] == totals[1]
    assert trainer.engine.objective.training
    held_out = trainer.validation.held_out
    assert isinstance(held_out, ToyHeldOut) and (held_out.rewinds, held_out.given) == (6, 0)
    trainer.validation.close()
    assert held_out.is_closed


def test_the_last_checkpoint_is_scored_too_and_no_score_has_a_gradient(tmp_path, monkeypatch):
    places: list[tuple[int, str]] = []  # what a lost rank is said to have been at
    monkeypatch.setattr(presence, "at", lambda step, phase: places.append((step, phase)))
    trainer = _trainer(tmp_path, "train.monitor=loss", "train.checkpoint_steps=5")
    with_gradient: list[bool] = []
    objective = trainer.engine.objective
    objective.register_forward_pre_hook(
        lambda module, given: (
            with_gradient.append(torch.is_grad_enabled()) if not module.training else None
        )
    )
    trainer.fit(StopRequest())
    assert [line["step"] for line in _lines(tmp_path)] == [5, 10, 12]
    assert [step for step, phase in places if phase == "validate"] == [5, 10, 12]
    assert with_gradient == [False] * 3 * ToyHeldOut.BATCHES


def test_watching_can_begin_change_and_end_with_any_start_of_a_run(tmp_path):
    _run(tmp_path, "train.checkpoint_steps=2")
    for more in ((*WATCHED, "train.patience=2"), (*WATCHED, "train.monitor_pairs=50"), ()):
        assert _trainer(tmp_path, *more).step == 12  # no --allow-mismatch


def test_the_weights_that_will_be_used_are_those_that_are_scored(tmp_path):
    """evaluate.weights=ema was evaluated and exported, and the other weights chose the best."""
    both = [*WATCHED, "train.ema_decay=0.9"]
    trainer = _run(tmp_path, *both, "evaluate.weights=ema")
    (last,) = [line for line in _lines(tmp_path) if line["step"] == 12]
    # oracle: the average as it was saved, in a model of its own
    saved = checkpoint.read(checkpoint.checkpoints_of(tmp_path)[0]).training
    other = _trainer(tmp_path / "other", *both)
    for name, parameter in other.engine.objective.named_parameters():
        parameter.data.copy_(saved.ema.parameters.get(name, saved.parameters[name]))
    found = make_validation(other.config)._scores(other.engine)
    assert {name: last[name] for name in found} == pytest.approx(found, rel=1e-6)
    assert last["weights"] == "ema" and trainer.validation.state_dict()["weights"] == "ema"
    trained = make_validation(trainer.config)._scores(trainer.engine)
    assert abs(trained["total"] - found["total"]) > 1e-4
    now = trainer.engine.objective.state_dict()
    assert all(torch.equal(now[name], tensor) for name, tensor in saved.parameters.items())


def test_a_run_of_which_the_average_is_watched_is_the_same_run(tmp_path):
    _run(tmp_path / "alone", "train.checkpoint_steps=2", "train.ema_decay=0.9")
    _run(tmp_path / "watched", *WATCHED, "train.ema_decay=0.9", "evaluate.weights=ema")
    ends = [
        checkpoint.read(checkpoint.checkpoints_of(tmp_path / n)[0]).training
        for n in ("alone", "watched")
    ]
    for left, right in (
        (ends[0].parameters, ends[1].parameters),
        (ends[0].ema.parameters, ends[1].ema.parameters),
    ):
        assert all(torch.equal(left[name], right[name]) for name in left)


def test_scores_of_other_weights_are_not_compared(tmp_path, caplog):
    trainer = _run(tmp_path, *WATCHED, "train.ema_decay=0.9")
    saved = trainer.validation.state_dict()
    with caplog.at_level("WARNING", logger="mlip"):
        again = _trainer(tmp_path, *WATCHED, "train.ema_decay=0.9", "evaluate.weights=ema")
    assert again.validation.best_step is None and "cannot be compared" in caplog.text
    # of a version that scored the trained ones alone, and did not say so
    del saved["weights"]
    other = make_validation(trainer.config)
    other.load_state_dict(saved)
    assert other.best_step == trainer.validation.best_step and not other.is_new
    own = {**again.validation.state_dict(), "best_step": 4, "best": 1.0}
    other = make_validation(again.config)
    other.load_state_dict(own)  # those of the same average are
    assert (other.best_step, other.best) == (4, 1.0)


@pytest.mark.parametrize(("steps", "looked"), [(5, [5, 6, 8, 9]), (9, [9])])
def test_watching_that_is_switched_on_later_begins_where_the_run_stands(
    tmp_path, monkeypatch, steps, looked
):
    """At a step that is not due too, and for a run that is over: nothing was looked at there."""
    monkeypatch.setenv("FAULT", "term@0:3:backward" if steps == 5 else "")
    settings = ("train.max_steps=9", "train.checkpoint_steps=2")
    if steps == 5:
        with pytest.raises(Preempted):
            _run(tmp_path, *settings)
    else:
        _run(tmp_path, *settings)
    assert _steps(tmp_path)[-1] == steps
    trainer = _run(tmp_path, *settings, "train.monitor=loss")
    assert [line["step"] for line in _lines(tmp_path)] == looked
    assert trainer.validation.best_step in looked


def test_scores_are_means_over_the_same_batches_in_evaluation_mode(tmp_path):
    trainer = _run(tmp_path, *WATCHED)
    (last,) = [line for line in _lines(tmp_path) if line["step"] == 12]
    again = make_validation(trainer.config)._scores(trainer.engine)
    assert {name: last[name] for name in again} == again  # dropout would give others
    assert last["pairs"] == ToyHeldOut.PAIRS
    assert [line["step"] for line in _lines(tmp_path)] == [2, 4, 6, 8, 10, 12]
    # three batches of six pairs: what is found is a multiple of 1/18
    share = last["recall@1 image to text"] * 18
    assert share == pytest.approx(round(share), abs=1e-4)
    engine = trainer.engine
    engine.objective.eval()
    each = [make_batch(ToyHeldOut.FIRST + n, ToyHeldOut.PAIRS) for n in range(ToyHeldOut.BATCHES)]
    totals = [engine.call(b, step=0, progress=0.0, held_out=True)[0].item() for b in each]
    assert last["total"] == pytest.approx(sum(totals) / 3, rel=1e-6)


def test_the_best_checkpoint_stays_and_is_what_the_run_stands_for(tmp_path, monkeypatch, caplog):
    looked = _script(monkeypatch, [3.0, 1.0, 2.0, math.nan, 1.0, 1.5])
    with caplog.at_level("INFO", logger="mlip"):
        _run(tmp_path, *WATCHED, "train.keep_checkpoints=1")
    assert looked == [2, 4, 6, 8, 10, 12]
    # equal is no better, and no number is better than NaN
    assert _steps(tmp_path) == [4, 12]
    assert [line["best_step"] for line in _lines(tmp_path)] == [2, 4, 4, 4, 4, 4]
    assert _lines(tmp_path)[3]["total"] is None
    best, problems = find_best(tmp_path)
    assert best is not None and best.name == "step_00000004" and not problems
    newest, _ = checkpoint.find_newest(tmp_path)
    assert newest is not None and newest.name == "step_00000012"  # what a resume takes
    said = [r.message for r in caplog.records if r.message.startswith("val after")]
    assert said[1].endswith("(the best so far)") and said[5].endswith("(best at step 4)")


def test_recall_is_better_when_it_is_higher(tmp_path, monkeypatch):
    looks = iter([0.2, 0.6, 0.5])

    def scores(self: Validation, engine: Any) -> dict[str, float]:
        value = next(looks)
        both = {"recall@1 image to text": value + 0.1, "recall@1 text to image": value - 0.1}
        return {"total": 1.0 + value, **both}

    monkeypatch.setattr(Validation, "_scores", scores)
    trainer = _run(tmp_path, "train.monitor=recall", "train.checkpoint_steps=4")
    assert (trainer.validation.best_step, trainer.validation.best) == (8, pytest.approx(0.6))


def test_patience_ends_a_run_which_then_trains_no_further(tmp_path, monkeypatch, caplog):
    _script(monkeypatch, [3.0, 1.0, 2.0, 2.0, 0.1, 0.1])
    with caplog.at_level("INFO", logger="mlip"):
        _run(tmp_path, *WATCHED, "train.patience=2")
    assert _steps(tmp_path) == [4, 6, 8]
    assert "no better loss on val at 2 checkpoints in a row" in caplog.text
    assert "best is that of step 4" in caplog.text
    looked = _script(monkeypatch, [9.0] * 6)
    again = _run(tmp_path, *WATCHED, "train.patience=2")  # the same command
    assert (again.step, looked, _steps(tmp_path)) == (8, [], [4, 6, 8])
    _script(monkeypatch, [0.5, 0.5, 0.5])  # who wants more gives more patience
    more = _run(tmp_path, *WATCHED, "train.patience=3")
    assert more.step == 12


def test_patience_counts_checkpoints_in_a_row(tmp_path, monkeypatch):
    _script(monkeypatch, [3.0, 1.0, 2.0, 0.5, 2.0, 0.1])
    assert _run(tmp_path, *WATCHED, "train.patience=2").step == 12


@pytest.mark.parametrize("step", [8, 7])  # where it is saved: at a look's step, and between
def test_a_stopped_run_decides_as_one_that_was_not(tmp_path, monkeypatch, step):
    _run(tmp_path / "whole", *WATCHED, "train.patience=3")
    monkeypatch.setenv("FAULT", f"term@0:{step - 2}:backward")
    with pytest.raises(Preempted):
        _run(tmp_path / "parts", *WATCHED, "train.patience=3")
    assert _steps(tmp_path / "parts")[-1] == step
    _run(tmp_path / "parts", *WATCHED, "train.patience=3")
    whole, parts = _lines(tmp_path / "whole"), _lines(tmp_path / "parts")
    assert all(line.pop("time") for line in [*whole, *parts])
    # at 8 the stop was saved at once, unlooked at; the run that went on looked first
    assert parts == whole
    states = [
        checkpoint.read(checkpoint.checkpoints_of(tmp_path / n)[0]).state
        for n in ("whole", "parts")
    ]
    assert states[0]["validation"]["best_step"] == states[1]["validation"]["best_step"] == 2


def test_a_best_checkpoint_that_could_not_be_saved_is_not_the_best(tmp_path, monkeypatch):
    _script(monkeypatch, [3.0, 1.0, 2.0, 2.5, 2.5, 2.5])
    save = checkpoint.save

    def full_at_4_and_8(run_dir: Any, training: Any, state: Any, *, keep: int) -> Path:
        if state["step"] in (4, 8):
            raise CheckpointError("no room")
        return save(run_dir, training, state, keep=keep)

    monkeypatch.setattr(checkpoint, "save", full_at_4_and_8)
    trainer = _run(tmp_path, *WATCHED, "train.keep_checkpoints=1")
    assert _steps(tmp_path) == [6, 12]
    best, problems = find_best(tmp_path)
    assert best is not None and best.name == "step_00000006" and not problems
    assert trainer.validation.looks_since == 3  # that of step 8 was no better, saved or not


def test_where_the_best_is_damaged_or_gone_the_newest_is_taken_and_said(tmp_path, monkeypatch):
    _script(monkeypatch, [3.0, 1.0, 2.0, 2.0, 2.0, 2.0])
    _run(tmp_path, *WATCHED)
    best, newest = (checkpoint.folder_of(tmp_path, step) for step in (4, 12))
    buffers = (newest / "buffers.safetensors").read_bytes()
    (newest / "buffers.safetensors").write_bytes(b"")
    found, problems = find_best(tmp_path)
    assert found == best and len(problems) == 1 and "step_00000012: buffers" in problems[0]
    (best / "buffers.safetensors").write_bytes(b"")
    found, problems = find_best(tmp_path)
    assert found == checkpoint.folder_of(tmp_path, 10)
    assert [p.split("/")[-1].split(":")[0] for p in problems] == [newest.name, best.name]
    (newest / "buffers.safetensors").write_bytes(buffers)
    found, problems = find_best(tmp_path)
    assert found is not None and found.name == "step_00000012"
    assert len(problems) == 1 and "the best on val" in problems[0] and "buffers" in problems[0]
    shutil.rmtree(best)
    found, problems = find_best(tmp_path)
    assert found is not None and found.name == "step_00000012" and "step_00000004" in problems[0]


def test_the_newest_checkpoint_tells_which_is_the_best(tmp_path, monkeypatch):
    """That of a stop is scored after it was saved, and its own state names an earlier one.

    A model card said "not trained to the end" of it, and "the best" of one that was so for a while.
    """
    _script(monkeypatch, [3.0, 1.0, 2.0, 2.0, 2.0, 2.0])
    monkeypatch.setenv("FAULT", "term@0:2:forward")
    with pytest.raises(Preempted):
        _run(tmp_path, *WATCHED, "train.keep_checkpoints=9")
    assert _steps(tmp_path) == [2, 4] and best_step(checkpoint.folder_of(tmp_path, 4)) == 2
    _run(tmp_path, *WATCHED, "train.keep_checkpoints=9")
    told = {step: is_best(checkpoint.folder_of(tmp_path, step), step) for step in _steps(tmp_path)}
    assert told == {step: step == 4 for step in (2, 4, 6, 8, 10, 12)}
    # no word of a damaged one is believed
    newest = checkpoint.folder_of(tmp_path, 12) / "state.json"
    whole = newest.read_text()
    newest.write_text(whole.replace('"best_step": 4', '"best_step": 8'))
    assert whole != newest.read_text() and is_best(checkpoint.folder_of(tmp_path, 4), 4)
    newest.write_text(whole)
    with monkeypatch.context() as closed:  # as one that this user may not read
        damage = checkpoint._damage

        def only_older(folder: Path, only: str | None = None) -> str | None:
            if folder == newest.parent:
                raise CheckpointError("cannot be read: Permission denied")
            return damage(folder, only)

        closed.setattr(checkpoint, "_damage", only_older)
        assert is_best(checkpoint.folder_of(tmp_path, 4), 4)
    monkeypatch.chdir(tmp_path / "checkpoints")
    assert is_best(Path("step_00000002"), 2) is False
    alone = Path(shutil.copytree(checkpoint.folder_of(tmp_path, 12), tmp_path / "a" / "b" / "c"))
    assert is_best(alone, 12) is False  # all that is known
    monkeypatch.setattr(checkpoint, "_damage", lambda folder, only=None: None)  # the hashes fit
    for content in ('{"best_step": "x"}', '{"best_step": []}', "[1]", "{"):
        content = f'{{"validation": {content}}}'
        (alone / "state.json").write_text(content)
        assert best_step(alone) is None and is_best(alone, 12) is None


def test_another_score_begins_anew_and_watching_can_end(tmp_path, monkeypatch):
    _script(monkeypatch, [1.0, 2.0, 2.0, 2.0, 2.0, 2.0])
    _run(tmp_path, *WATCHED, "train.max_steps=4")
    by_recall = ("train.monitor=recall", "train.checkpoint_steps=2", "train.max_steps=8")
    folder = tmp_path / "by_recall"
    shutil.copytree(tmp_path / "checkpoints", folder / "checkpoints")
    config = toy_config(f"run.dir={folder}", "train.engine=plain", *by_recall)
    trainer = make_trainer(config, dropout=0.3, allow_mismatch=True)  # max_steps is another
    assert trainer.validation.best_step is None
    trainer.fit(StopRequest())
    assert trainer.validation.best_step == 4  # looked at before the first step
    unwatched = toy_config(f"run.dir={folder}", "train.engine=plain", "train.max_steps=10")
    make_trainer(unwatched, dropout=0.3, allow_mismatch=True).fit(StopRequest())
    best, _ = find_best(folder)
    assert best is not None and best.name == "step_00000010"  # newest: nobody looks any more
    known = [is_best(checkpoint.folder_of(folder, step), step) for step in (8, 10)]
    assert known == [False, False]  # while somebody did it was that of step 4


@pytest.mark.parametrize("changed", ["batches", "pairs"])
def test_scores_of_other_pairs_are_not_compared_and_that_is_said(tmp_path, changed, caplog):
    """train.monitor_pairs is free to change: of 500 pairs each loss was better than of 1,000."""
    trainer = _run(tmp_path, *WATCHED)
    saved = trainer.validation.state_dict()
    other = make_validation(trainer.config)
    setattr(other, changed, 2)
    with caplog.at_level("WARNING", logger="mlip"):
        other.load_state_dict(saved)
    assert other.best_step is None and other.last_look == 0 and saved["best_step"] is not None
    assert f"step {saved['best_step']} is not kept for it" in caplog.text
    caplog.clear()
    make_validation(trainer.config).load_state_dict(saved)
    none_yet = {**saved, "best_step": None, "best": None}
    other.load_state_dict(none_yet)
    assert not caplog.text


@pytest.mark.parametrize("name", ["best_step", "best", "looks_since", "last_look"])
@pytest.mark.parametrize("value", ["x", []])
def test_a_state_that_no_save_writes_is_refused_by_the_checkpoints_name(
    tmp_path, monkeypatch, name, value
):
    _run(tmp_path, *WATCHED, "train.max_steps=2")
    folder = checkpoint.checkpoints_of(tmp_path)[0]
    state = json.loads((folder / "state.json").read_text())
    state["validation"][name] = value
    (folder / "state.json").write_text(json.dumps(state))
    monkeypatch.setattr(checkpoint, "_damage", lambda folder: None)  # the hashes fit
    with pytest.raises(CheckpointError, match=rf"{folder.name}: its state.json is not one"):
        _trainer(tmp_path, *WATCHED, "train.max_steps=2")


def test_all_ranks_go_on_with_what_rank_0_found(tmp_path, monkeypatch):
    """Nodes of other processors round otherwise: one would end its run, and the others wait."""
    _script(monkeypatch, [3.0])
    trainer = _trainer(tmp_path, *WATCHED)
    with monkeypatch.context() as rank_0:
        rank_0.setattr(distributed, "broadcast_object", lambda own: {**own, "total": 2.5})
        trainer.validation.look(trainer.engine, 2, trainer.log)
    assert trainer.validation.best == 2.5


def test_where_no_score_was_a_number_none_is_the_best(tmp_path, monkeypatch, caplog):
    _script(monkeypatch, [math.nan] * 6)
    with caplog.at_level("INFO", logger="mlip"):
        _run(tmp_path, *WATCHED, "train.patience=2")
    assert "no score was a number, none is the best" in caplog.text
    assert _steps(tmp_path) == [2, 4]
    assert "None" not in caplog.text


def test_settings_watch_by_the_losses_that_score_val():
    """Two lists of names: the settings are checked where no torch is loaded."""
    assert config_agreement._HELD_OUT["loss"] == HELD_OUT_LOSSES


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["train.patience=3"], "train.patience=3 with train.monitor=none"),
        (["train.monitor=recall", "loss.global_contrastive.weight=0"], "loss.global_contrastive"),
        (["train.monitor=loss", *NO_CONTRAST], "watches what is not trained"),
        (["train.monitor=auroc"], "train.monitor"),
        (["train.monitor_pairs=1"], "train.monitor_pairs"),
    ],
)  # fmt: skip
def test_what_cannot_be_watched_is_refused(settings, says):
    with pytest.raises(ConfigError, match=says):
        load([], settings)
    assert load([], ["train.monitor=loss", NO_CONTRAST[0]])
