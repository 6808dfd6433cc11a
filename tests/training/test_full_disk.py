"""A disk that is full while a run goes on: lines wait, no step is lost; an error at the start.

The device /dev/full takes nothing, as a full disk does.
"""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from mlip.settings.config import ConfigError
from mlip.training import checkpoint, runlog
from mlip.training.lifecycle import record_event
from mlip.training.stop_request import StopRequest
from tests.training.toy_run import make_trainer, toy_config

FULL = Path("/dev/full")
pytestmark = pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")


def _trainer(folder: Path, **named):
    settings = (f"run.dir={folder}", "train.max_steps=12", "train.engine=plain")
    return make_trainer(toy_config(*settings, "train.checkpoint_steps=4"), **named)


def test_a_run_goes_on_where_its_log_its_events_and_its_ledger_find_no_room(
    tmp_path, monkeypatch, caplog
):
    trainer = _trainer(tmp_path, on_save=lambda state: FULL.write_text("ledger"))
    is_full = False

    def step(*args, **named):
        nonlocal is_full
        is_full = 4 < args[0] < 9
        if is_full:
            trainer.log._steps._drop()
            trainer.log._steps._descriptor = os.open(FULL, os.O_WRONLY)
        return plain(*args, **named)

    def record(*args, **named):
        if is_full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        record_event(*args, **named)

    plain = trainer.log.step
    monkeypatch.setattr(trainer.log, "step", step)
    monkeypatch.setattr(runlog, "record_event", record)
    with caplog.at_level("WARNING", "mlip"):
        trainer.fit(StopRequest())
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 13))
    assert checkpoint.checkpoints_of(tmp_path)[0].name == "step_00000012"
    said = [record.message for record in caplog.records]
    assert sum("log.jsonl cannot be written: No space left" in text for text in said) == 1
    assert sum("saved, but not what goes with it" in text for text in said) == 3


def test_what_could_not_be_written_beside_a_checkpoint_is_named(tmp_path, caplog):
    def keep(state):
        (tmp_path / "ledger.json").mkdir(exist_ok=True)
        (tmp_path / "part").write_text("{}")
        (tmp_path / "part").replace(tmp_path / "ledger.json")

    trainer = _trainer(tmp_path, on_save=keep)
    with caplog.at_level("WARNING", "mlip"):
        trainer.fit(StopRequest())
    told = f"saved, but not what goes with it ({tmp_path}/ledger.json): Is a directory"
    assert told in [record.message for record in caplog.records]


def test_a_folder_without_room_is_named_before_the_first_step(tmp_path, monkeypatch):
    (tmp_path / "config.yaml").write_text("of the run before")

    def write_half(path, text, **named):
        with path.open("w", **named) as file:
            file.write(text[: len(text) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", write_half)
    with pytest.raises(ConfigError, match=rf"run\.dir={tmp_path} cannot be written: No space"):
        _trainer(tmp_path)
    # a resume that finds no room leaves the settings that every command opens the run by
    assert (tmp_path / "config.yaml").read_text() == "of the run before"
    assert not list(tmp_path.glob(".config*"))
