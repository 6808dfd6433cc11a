"""What a person and a script see of a run: lines or a progress bar, log.jsonl, events, trackers.

Only rank 0 writes, but for events. Holds numbers, row numbers and reasons; never report text,
paths of images or identifiers.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import math
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mlip.ranks import distributed
from mlip.settings.config import Config, ConfigError, to_dict
from mlip.system.output_file import whole_file
from mlip.training.lifecycle import record_event
from mlip.training.line_file import LineFile
from mlip.training.step import StepResult
from mlip.training.trackers import Trackers

logger = logging.getLogger("mlip")

# short names for the line; log.jsonl has the full ones
_SHORT = {
    "global_contrastive": "global",
    "local_alignment": "local",
    "category": "categ",
    "matching": "match",
    "swapping": "swap",
    "divergence": "diverg",
}


def memory_gib() -> float:
    """Peak GPU memory of this rank, or its resident memory on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return psutil.Process().memory_info().rss / 2**30


class RunLog:
    """Writes each step to log.jsonl and every train.log_steps a line (on a terminal above a bar).

    Raises:  ConfigError where a tracker that the settings name cannot be opened (trackers.py)
    """

    def __init__(self, config: Config, *, total_steps: int, start_step: int) -> None:
        self.config = config
        self.folder = Path(config.run.dir)
        self.start_step = start_step
        self.log_steps = config.train.log_steps
        self.global_pairs = config.batch.global_pairs
        self.total_steps = total_steps
        self._is_main = distributed.is_main()
        self._steps = LineFile(self.folder / "log.jsonl")
        self._looks = LineFile(self.folder / "validation.jsonl")
        self._trackers: Trackers | None = None
        self._bar: Progress | None = None
        self._window_start, self._window_steps, self._window_wait = time.perf_counter(), 0, 0.0
        self._unwritten: set[str] = set()  # files that could not be written the last time
        if not self._is_main:
            return
        self._trackers = Trackers(config, start_step)
        self._steps.open()
        console = _console()
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=20),
                TimeRemainingColumn(),
                TextColumn("{task.description}"),
                console=console,
            )
            self._bar.add_task("", total=total_steps, completed=start_step)
            self._bar.start()

    def step(
        self,
        step: int,
        result: StepResult,
        *,
        lr: float,
        epoch: float,
        step_seconds: float,
        wait_seconds: float,
    ) -> None:
        """Step counts from 1: the number of steps done."""
        if not self._is_main:
            return
        entry = {
            "step": step,
            "epoch": round(epoch, 4),
            "total": _finite(result.total),
            "terms": {name: _finite(value) for name, value in result.terms.items()},
            "grad_norm": _finite(result.grad_norm),
            "lr": lr,
            "scales": result.scales,
            "pairs_per_s": round(self.global_pairs / max(step_seconds, 1e-9), 2),
            "data_wait_s": round(wait_seconds, 4),
            "memory_gib": round(memory_gib(), 3),
            "time": round(time.time(), 3),
        }
        if result.is_skipped:
            entry["is_skipped"] = True
        with self._told_if_full("log.jsonl"):
            self._steps.write(json.dumps(entry, allow_nan=False))
        if self._trackers is not None:
            self._trackers.put(step, _numbers(result, lr, entry["pairs_per_s"]))
        self._window_steps += 1
        self._window_wait += wait_seconds
        is_line = step % self.log_steps == 0 or step == self.total_steps
        if self._bar is not None:
            text = f"loss {result.total:.4f}"
            self._bar.update(self._bar.task_ids[0], completed=step, description=text)
        if is_line:
            self._say(step, result, lr)

    def _say(self, step: int, result: StepResult, lr: float) -> None:
        now = time.perf_counter()
        seconds = max(now - self._window_start, 1e-9)
        rate = self.global_pairs * self._window_steps / seconds
        wait = 100.0 * self._window_wait / seconds
        self._window_start, self._window_steps, self._window_wait = now, 0, 0.0
        terms = " ".join(f"{_SHORT.get(n, n)} {v:.3f}" for n, v in result.terms.items())
        shown = "/".join(f"{value:.1f}" for value in result.scales.values())
        text = (
            f"loss {result.total:.4f} ({terms})  scales {shown}  grad {result.grad_norm:.3g}  "
            f"lr {lr:.2e}  {rate:.0f} pairs/s  data {wait:.0f} %  {memory_gib():.2f} GiB"
        )
        line = f"step {step}/{self.total_steps}  {text}"
        if self._bar is not None:
            self._bar.console.print(line, highlight=False)  # above the bar
        else:
            print(line, flush=True)

    def validated(
        self,
        step: int,
        terms: Mapping[str, float],
        *,
        pairs: int,
        best_step: int | None,
        weights: str = "trained",
    ) -> None:
        """Scores on val after `step` steps: a line in validation.jsonl, and one said.

        terms    "total", losses before their weights and recalls, means over batches of `pairs`
        weights  "ema" where those scored are the average
        """
        if not self._is_main:
            return
        entry = {
            "step": step,
            **{name: _finite(value) for name, value in terms.items()},
            "pairs": pairs,
            "weights": weights,
            "best_step": best_step,
            "time": round(time.time(), 3),
        }
        with self._told_if_full("validation.jsonl"):
            self._looks.write(json.dumps(entry, allow_nan=False))
        if self._trackers is not None:
            numbers = {f"val/{name}": value for name, value in terms.items()}
            self._trackers.put(step, numbers, kind="val")
        parts = "  ".join(f"{name} {value:.4f}" for name, value in terms.items() if name != "total")
        best = "none is the best yet" if best_step is None else f"best at step {best_step}"
        best = "the best so far" if best_step == step else best
        self.say(
            f"val after step {step}{' (average)' if weights == 'ema' else ''}, batches of {pairs} "
            f"pairs: loss {terms['total']:.4f}  {parts} "
            f"({best})"
        )

    @contextlib.contextmanager
    def _told_if_full(self, name: str) -> Iterator[None]:
        """A disk that is full or gone costs no run; said once until lines are written again."""
        try:
            yield
            self._unwritten.discard(name)
        except OSError as error:
            if name not in self._unwritten:
                logger.warning("%s cannot be written: %s; training goes on", name, error.strerror)
            self._unwritten.add(name)

    def start(self, facts: Mapping[str, Any]) -> None:
        """config.yaml and meta.json: what it takes to run this again.

        Raises:  ConfigError where they cannot be written
        """
        if not self._is_main:
            return
        settings = to_dict(self.config)
        text = yaml.safe_dump(settings, sort_keys=False)
        meta = {"config": settings, "command": sys.argv[1:], **facts}
        try:
            # whole: a resume that is killed here, or finds the disk full, leaves what was there
            for name, content in (("config.yaml", text), ("meta.json", json.dumps(meta, indent=1))):
                with whole_file(self.folder / name) as partial:
                    partial.write_text(content, encoding="utf-8")
        except OSError as error:
            raise ConfigError(
                f"run.dir={self.folder} cannot be written: {error.strerror}; make room or choose "
                "another run.dir"
            ) from error
        self.event("started", step=self.start_step, total_steps=self.total_steps)
        logger.info(
            "step %d of %d; %d pairs a step on %d rank(s), engine %s, %s, %d thread(s) each, "
            "determinism %s",
            self.start_step,
            self.total_steps,
            self.global_pairs,
            facts["world_size"],
            facts["engine"],
            facts["precision"],
            facts["threads"],
            facts["determinism"],
        )

    def say(self, text: str) -> None:
        """A fact from rank 0."""
        if self._is_main:
            logger.info(text)

    def warn(self, text: str) -> None:
        """A warning from rank 0."""
        if self._is_main:
            logger.warning(text)

    def event(self, kind: str, **facts: Any) -> None:
        """One line in events.jsonl, from any rank."""
        with self._told_if_full("events.jsonl"):
            record_event(self.folder, kind, **facts)

    def event_of_all(self, kind: str, **facts: Any) -> None:
        """One line for what all ranks did together."""
        if self._is_main:
            self.event(kind, **facts)

    def close(self, ended: str = "trained") -> None:
        """ended  what trackers show: "trained", "failed", or "stopped" on request"""
        if self._bar is not None:
            self._bar.stop()
        for name, lines in (("log.jsonl", self._steps), ("validation.jsonl", self._looks)):
            with self._told_if_full(name):
                lines.close()
        if self._trackers is not None:
            self._trackers.close(ended)
        self._bar = self._trackers = None


def _finite(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None


def _numbers(result: StepResult, lr: float, rate: Any) -> dict[str, float]:
    """A step as trackers show it."""
    return {
        "total": result.total,
        "grad_norm": result.grad_norm,
        "lr": lr,
        "pairs_per_s": rate,
        **{f"terms/{name}": value for name, value in result.terms.items()},
        **{f"scales/{name}": value for name, value in result.scales.items()},
    }


@functools.cache
def _console() -> Console:
    return Console()


def setup_logging() -> None:
    """Messages of the "mlip" logger: on rank 0 from INFO on, on other ranks from WARNING on."""
    logger.handlers.clear()
    logger.propagate = False
    logger.setLevel(logging.INFO if distributed.is_main() else logging.WARNING)
    if _console().is_terminal:
        # the bar's own console: another one would write into the bar
        logger.addHandler(RichHandler(console=_console(), show_time=False, show_path=False))
        return
    handler = logging.StreamHandler(sys.stderr)
    prefix = "" if distributed.is_main() else f"rank {distributed.rank()}: "
    handler.setFormatter(logging.Formatter(f"{prefix}%(message)s"))
    logger.addHandler(handler)
