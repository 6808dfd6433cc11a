"""A loss spike is flagged, run again, and told apart: batch or weights against the machine."""

from __future__ import annotations

import pytest

from mlip.settings.config import ConfigError, load
from mlip.training import randomness
from mlip.training.loop import Trainer
from mlip.training.spikes import DATA, HARDWARE, SpikeWatch, cause
from tests.faults.jobs import events
from tests.training.test_loop import _config, _log, _own_faults  # noqa: F401
from tests.training.toy_run import ToyLoader, ToyObjective


class _Sensitive(ToyObjective):
    """Its loss follows the size of the images and of the weights, as no contrastive loss does."""

    def forward(self, batch, **given):
        total, terms = super().forward(batch, **given)
        size = sum(p.square().sum() for p in self.model.parameters() if p.requires_grad) / 100
        return total * batch.image.abs().mean() + size, terms


def _train(folder, *more: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    config = _config(folder, "train.max_steps=24", "train.lr=0.001", *more)
    randomness.seed_everything(1)
    trainer = Trainer(
        config, _Sensitive(config, 0.3), ToyLoader(config), merge_states=lambda s: dict(s[0])
    )

    class _Never:
        is_set = False

        def of_any_rank(self) -> bool:
            return False

    trainer.fit(_Never())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("phase", "expected"), [("load", DATA), ("optimizer", DATA), ("forward", HARDWARE)]
)
def test_the_cause_of_a_spike_is_found(tmp_path, monkeypatch, phase, expected):
    _train(tmp_path / "whole", "train.spike_factor=3")
    assert not events(tmp_path / "whole", "spike")
    monkeypatch.setenv("FAULT", f"spike@0:16:{phase}")
    run = tmp_path / "run"
    _train(run, "train.spike_factor=3")
    assert len(events(run, "fault")) == 1
    spikes = events(run, "spike")
    assert spikes and {event["cause"] for event in spikes} == {expected}
    # a spoiled weight shows in the step after
    assert spikes[0]["step"] == (18 if phase == "optimizer" else 17)
    assert len(spikes[0]["manifest_rows"]) == 8
    losses = {
        n: [e["total"] for _, e in sorted(_log(tmp_path / n).items())] for n in ("whole", "run")
    }
    if phase == "forward":
        # dropout, the queue and the loss of the second pass are those of a run without a fault
        assert losses["run"] == losses["whole"]
    else:
        assert max(losses["run"]) > 3 * max(losses["whole"])


def test_a_run_that_does_not_watch_spends_nothing_and_says_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("FAULT", "spike@0:16:load")
    _train(tmp_path)
    assert events(tmp_path, "fault") and not events(tmp_path, "spike")


def test_a_spike_needs_eight_losses_before_it_and_does_not_move_the_median():
    watch = SpikeWatch(3.0)
    for _ in range(7):
        watch.note(1.0)
        assert watch.limit() == float("inf")
    watch.note(1.0)
    assert watch.limit() == 3.0
    for _ in range(100):
        watch.note(50.0)
    assert watch.limit() == 3.0


def test_the_median_is_of_the_last_fifty_and_no_mean():
    watch = SpikeWatch(3.0)
    for value in (1.0, 1.0, 1.0, 1.0, 1.0, 2.0, 2.0, 2.9):
        watch.note(value)
    assert watch.limit() == 3.0
    watch = SpikeWatch(3.0)
    for count, value, limit in ((50, 1.0, 3.0), (24, 2.0, 3.0), (2, 2.0, 6.0)):
        for _ in range(count):
            watch.note(value)
        assert watch.limit() == limit


def test_equal_to_rounding_is_data_and_a_flipped_bit_is_not():
    assert cause(100.0, 100.00001) == DATA and cause(100.0, 1.0) == HARDWARE
    # relative to the first, whatever its size and sign
    assert cause(0.01, 0.0105) == cause(100.0, 99.0) == HARDWARE
    assert cause(-100.0, -100.00001) == DATA


def test_a_factor_that_every_step_exceeds_is_refused():
    with pytest.raises(
        ConfigError, match="train.spike_factor=0.5: expected 0 .off. or more than 1"
    ):
        load([], ["train.spike_factor=0.5"])
