"""The numbers of steps: waited for, logged, and watched for a spike and for what is not finite."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass

from torch import Tensor

from mlip.ranks import distributed
from mlip.settings.config import Config
from mlip.training import checkpoint
from mlip.training.lifecycle import NumericError
from mlip.training.runlog import RunLog
from mlip.training.step import StepResult, StepUnderWay

LAST_STEP_S = 1.0  # how long a step under way is waited for when an error ends the run


@dataclass(frozen=True)
class StartedStep:
    """A step whose numbers have not been read yet, and what the log says beside them."""

    step: int  # steps done with it
    numbers: StepUnderWay
    row_index: Tensor
    lr: float
    epoch: float
    begin: float  # when its batch was asked for
    wait_seconds: float


@dataclass
class SkippedSteps:
    """How many steps were skipped, and how many of them since the last one that was not."""

    in_all: int = 0
    in_a_row: int = 0


class StepReader:
    """Reads the numbers of each step: at once, or late, when the next one has been started.

    A GPU is given the next step before the numbers of one are read, so that it never waits for the
    host; on a CPU there is nothing to gain, and a line comes when its step is done.
    """

    def __init__(
        self, config: Config, log: RunLog, skipped: SkippedSteps, *, reads_late: bool
    ) -> None:
        self.config, self.log, self.skipped, self.reads_late = config, log, skipped, reads_late
        self.stop_requested = False  # by any rank, in a step whose numbers have been read
        self._under_way: StartedStep | None = None
        self._read_at = 0.0

    def started(self, step: StartedStep) -> None:
        """Takes a step that was started; reads it, or the one before it.

        Raises:  NumericError after train.max_nan_steps skipped steps in a row
        """
        before, self._under_way = self._under_way, step
        if not self.reads_late:
            self.read_all()
        elif before is not None:
            self._read(before)

    def read_all(self) -> None:
        """Reads the step under way, if there is one: after this none is."""
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            self._read(under_way)

    def _read(self, under_way: StartedStep) -> None:
        """Wait for the numbers of a step, log and watch them.

        Raises:  NumericError after train.max_nan_steps skipped steps in a row
        """
        result = self._log(under_way)
        self.stop_requested |= result.stop_requested
        self._watch(result, under_way)

    def _log(self, under_way: StartedStep) -> StepResult:
        """The step's line in the log."""
        result = under_way.numbers.result()
        now = time.perf_counter()
        # a step that was started before the one before it was read has taken the time since then
        step_seconds, self._read_at = now - max(under_way.begin, self._read_at), now
        self.log.step(
            under_way.step,
            result,
            lr=under_way.lr,
            epoch=under_way.epoch,
            step_seconds=step_seconds,
            wait_seconds=under_way.wait_seconds,
        )
        return result

    def tell_last(self) -> None:
        """After an error: the line of a step that was done and not read yet, which may explain it.

        No other rank is asked, and a GPU that does not come to an end is not waited for.
        """
        under_way, self._under_way = self._under_way, None
        if under_way is None:
            return
        with contextlib.suppress(RuntimeError):  # a lost GPU; the error at hand says more
            deadline = time.monotonic() + LAST_STEP_S
            while not under_way.numbers.is_done and time.monotonic() < deadline:
                time.sleep(0.01)
            if not under_way.numbers.is_done:
                return
            result = self._log(under_way)
            if result.is_skipped:
                rows, terms = under_way.row_index.tolist(), result.bad_terms()
                # with several ranks each tells its own rows
                kind = "skipped_here" if distributed.is_distributed() else "skipped"
                self.log.event(kind, step=under_way.step, terms=terms, manifest_rows=rows)

    def _watch(self, result: StepResult, under_way: StartedStep) -> None:
        """Count and report a spike or a skipped step; all ranks take the same branch."""
        step, own_rows = under_way.step, under_way.row_index
        if result.spike is not None:
            parts = distributed.gather_objects(own_rows.tolist())
            rows = [row for part in parts for row in part]
            self.log.event_of_all("spike", step=step, cause=result.spike, manifest_rows=rows)
            self.log.warn(
                f"step {step}: the loss is over {self.config.train.spike_factor} times the "
                f"recent ones; run again on the same batch, the cause is: {result.spike}"
            )
        if not result.is_skipped:
            self.skipped.in_a_row = 0
            return
        self.skipped.in_all += 1
        self.skipped.in_a_row += 1
        reports = distributed.gather_objects((own_rows.tolist(), result.bad_terms()))
        rows = [row for report in reports for row in report[0]]
        terms = sorted({term for report in reports for term in report[1]})
        what = f"loss terms {', '.join(terms)}" if terms else "a gradient"
        text = (
            f"step {step}: {what} not finite; the step was skipped on all ranks "
            f"({self.skipped.in_a_row} in a row)"
        )
        self.log.event_of_all("skipped", step=step, terms=terms, manifest_rows=rows)
        self.log.warn(f"{text}; its {len(rows)} manifest rows are in events.jsonl")
        if self.skipped.in_a_row >= self.config.train.max_nan_steps:
            kept = checkpoint.checkpoints_of(self.config.run.dir)
            raise NumericError(
                f"{text}, train.max_nan_steps={self.config.train.max_nan_steps}; last good "
                f"checkpoint: {kept[0] if kept else 'none yet'}"
            )
