"""What each of 2 ranks does: the toy run, its steps read at once and when the next is under way,
to its end, to a stop, and to an error behind a step that is not finite; and a stop of one rank
while the run is set up."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

from mlip.ranks import distributed, process_group
from mlip.training import faults
from mlip.training.lifecycle import Preempted
from mlip.training.stop_request import StopRequest
from tests.training.toy_run import make_trainer, toy_config

NAN = "nan@1:3:forward"  # of one rank alone, in the fourth step
STOP = "term@1:6:load"  # before the seventh
ERROR = "nan@1:4:forward,error@0:5:load,error@1:5:load"


def run_all(folder: str) -> None:
    """Into folder/at-once, /stopped and /error, the latter two late; raises at another end."""
    stop = StopRequest()
    process_group.start(60.0)
    for name, is_late, fault, end in (
        ("at-once", False, NAN, None),
        ("error", True, ERROR, RuntimeError),
        ("stopped", True, f"{NAN},{STOP}", Preempted),
    ):
        place = Path(folder) / name
        place.mkdir(exist_ok=True)
        distributed.barrier()
        os.environ["FAULT"] = fault
        faults._fired.clear()
        config = toy_config(f"run.dir={place}", "train.max_steps=12", "train.engine=plain")
        trainer = make_trainer(config, dropout=0.2)
        trainer.reader.reads_late = is_late
        ended: type[BaseException] | None = None
        try:
            trainer.fit(stop)
        except (Preempted, RuntimeError) as error:
            ended = type(error)
        assert ended is end, (name, ended)
    distributed.barrier()
    place = Path(folder) / "set-up"
    place.mkdir(exist_ok=True)
    distributed.barrier()
    config = toy_config(f"run.dir={place}", "train.max_steps=12", "train.engine=plain")
    trainer, stop = make_trainer(config, dropout=0.2), StopRequest()
    if distributed.rank() == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    with contextlib.suppress(Preempted):
        trainer.fit(stop)
        raise AssertionError("a rank did not hear of the stop of rank 1")
    distributed.barrier()
