"""The average of the weights: its arithmetic, its life through saves, and its way to evaluation."""

from __future__ import annotations

import pytest
import torch

import train
from mlip.pretrained import open_checkpoint
from mlip.settings.config import ConfigError, load
from mlip.training import checkpoint
from mlip.training.ema import EMA
from mlip.training.lifecycle import CheckpointError
from tests.small_run import small_run
from tests.training.test_loop import _own_faults, _run  # noqa: F401
from tests.training.toy_run import make_trainer, toy_config

COUNTS, SKIPPED = torch.tensor(False), torch.tensor(True)


@pytest.mark.parametrize("most", [0.99, 0.6])
def test_the_average_is_the_recursion_and_early_steps_forget_the_start(most):
    # oracle: the recursion by hand, in Python floats; the ramp reaches 0.6 at the thirteenth step
    weight = torch.tensor([1.0])
    ema, expected = EMA([weight], most), 1.0
    for n in range(30):
        weight.fill_(float(n))
        ema.update(COUNTS)
        ema.update(SKIPPED)  # changes nothing, the count neither
        decay = min(most, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * n
    assert float(ema.shadow[0]) == pytest.approx(expected, rel=1e-6) and ema.updates == 30
    assert expected > 18.0  # decay 0.99 from the start would give 4


def test_swapping_shows_the_average_and_puts_the_weights_back_even_after_an_error():
    weight = torch.tensor([1.0, 2.0])
    ema = EMA([weight], 0.5)
    weight += 10.0
    with pytest.raises(RuntimeError), ema.swapped():
        assert weight.tolist() == [1.0, 2.0]
        raise RuntimeError
    assert weight.tolist() == [11.0, 12.0] and ema.shadow[0].tolist() == [1.0, 2.0]


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_a_decay_that_is_no_average_is_refused(decay):
    with pytest.raises(ConfigError, match="train.ema_decay=.*expected 0"):
        load([], [f"train.ema_decay={decay}"])


def test_the_average_survives_a_stop_bit_for_bit_and_is_saved_apart(tmp_path, monkeypatch):
    on = ("train.ema_decay=0.9",)
    _run(tmp_path / "whole", *on)
    monkeypatch.setenv("FAULT", "term@0:4:backward")
    with pytest.raises(Exception, match="stopped on request"):
        _run(tmp_path / "parts", *on)
    _run(tmp_path / "parts", *on)
    whole, parts = (
        checkpoint.read(checkpoint.checkpoints_of(tmp_path / n)[0]) for n in ("whole", "parts")
    )
    assert (whole.folder / "ema.safetensors").is_file()
    left, right = whole.training.ema, parts.training.ema
    assert left is not None and right is not None and left.updates == right.updates == 12
    moved = 0
    for name, tensor in left.parameters.items():
        assert torch.equal(tensor, right.parameters[name]), name
        moved += int(not torch.equal(tensor, whole.training.parameters[name]))
    assert moved > 5  # it is not simply the weights


def test_a_skipped_step_leaves_the_average_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("FAULT", "nan@0:3:forward")
    _run(tmp_path, "train.ema_decay=0.9")
    read = checkpoint.read(checkpoint.checkpoints_of(tmp_path)[0])
    assert read.training.ema is not None and read.training.ema.updates == 11
    assert all(t.isfinite().all() for t in read.training.ema.parameters.values())


def test_switching_the_average_on_later_is_another_setting_and_starts_from_there(tmp_path):
    _run(tmp_path)
    with pytest.raises(CheckpointError, match="train.ema_decay .saved 0.0, now 0.9"):
        _run(tmp_path, "train.ema_decay=0.9")
    on = ("train.ema_decay=0.9", "train.engine=plain", "train.max_steps=12")
    trainer = make_trainer(toy_config(f"run.dir={tmp_path}", *on), allow_mismatch=True)
    ema = trainer.engine.ema
    assert trainer.step == 12 and ema.updates == 0
    assert all(torch.equal(a, b) for a, b in zip(ema.shadow, ema.held, strict=True))


def test_evaluation_reads_the_average_where_asked(tmp_path):
    run = small_run()
    overrides = [*run.settings, f"run.dir={tmp_path}", "batch.global_pairs=8"]
    overrides += ["train.max_steps=3", "train.lr=0.01", "evaluate.bootstrap=5"]
    overrides += ["train.ema_decay=0.9", "evaluate.weights=ema", "evaluate.max_studies=16"]
    overrides += ["loss.category.freeze_epochs=0"]  # or the prototypes would not move
    assert train.main(overrides) == 0
    trained, average = (open_checkpoint(tmp_path, weights_of=w) for w in ("trained", "ema"))
    read = checkpoint.read(checkpoint.checkpoints_of(tmp_path)[0]).training
    assert read.ema is not None
    name = "image_head.second.weight"
    assert torch.equal(average.model.state_dict()[name], read.ema.parameters[f"model.{name}"])
    assert not torch.equal(average.model.state_dict()[name], trained.model.state_dict()[name])
    assert average.facts["weights"] == "ema"
    held = read.ema.parameters["losses.category.prototypes"]
    assert average.prototypes is not None and torch.equal(average.prototypes, held)


def test_asking_for_an_average_that_is_never_made_fails_before_training():
    with pytest.raises(ConfigError, match="evaluate.weights=ema needs train.ema_decay"):
        train.parse(["evaluate.weights=ema"])
