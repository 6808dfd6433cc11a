"""A run's log that the installed trackers take, without a training; a script.

    python tests/training/tracked_run.py FOLDER START LAST END SETTING...

Steps START + 1 to LAST, val after every fourth; END is a RunLog.close's word, or "kill".
"""

from __future__ import annotations

import os
import signal
import sys
import time

from mlip.training.lifecycle import leave
from mlip.training.runlog import RunLog
from mlip.training.step import StepResult
from tests.training.toy_run import toy_config


def main(folder: str, start: str, last: str, end: str, *settings: str) -> None:
    config = toy_config(f"run.dir={folder}", *settings)
    log = RunLog(config, total_steps=8, start_step=int(start))
    print("words on the terminal", flush=True)
    for step in range(int(start) + 1, int(last) + 1):
        result = StepResult(
            total=1.0 / step,
            terms={"own": float("nan") if step == 2 else float(step)},
            grad_norm=1.0,
            is_skipped=False,
            stop_requested=False,
            scales={"logit": 14.0},
        )
        log.step(step, result, lr=1e-3, epoch=0.1, step_seconds=0.3, wait_seconds=0.0)
        if step % 4 == 0:
            terms = {"total": 1.0, "recall@10 image to text": 0.5}
            log.validated(step, terms, pairs=8, best_step=step)
    if end == "kill":
        time.sleep(3)  # W&B flushes its file every second
        os.kill(os.getpid(), signal.SIGKILL)
    log.close(end)
    leave(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
