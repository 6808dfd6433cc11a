"""What each of 2 ranks does: the toy run, its steps read at once and when the next is under way."""

from __future__ import annotations

import os
from pathlib import Path

from mlip import distributed
from mlip.training import faults
from mlip.training.lifecycle import Preempted, StopRequest
from tests.training.toy_run import make_trainer, toy_config

NAN = "nan@1:3:forward"  # of one rank alone, in the fourth step
STOP = "term@1:6:load"  # before the seventh


def run_both(folder: str) -> None:
    """Into folder/at-once and folder/late; raises where the stop is not the end of the second."""
    stop = StopRequest()
    distributed.start(60.0)
    for name, is_late in (("at-once", False), ("late", True)):
        place = Path(folder) / name
        place.mkdir(exist_ok=True)
        distributed.barrier()
        os.environ["FAULT"] = f"{NAN},{STOP}" if is_late else NAN
        faults._fired.clear()
        config = toy_config(f"run.dir={place}", "train.max_steps=12", "train.engine=plain")
        trainer = make_trainer(config, dropout=0.2)
        trainer.reads_late = is_late
        was_stopped = False
        try:
            trainer.fit(stop)
        except Preempted:
            was_stopped = True
        assert was_stopped == is_late, name
    distributed.barrier()
