"""The training loop: resume, step, look at val, save; knows nothing of chests.

Everything it needs of the data is in DataSource, so that it runs on any loader of Batch. What a
step's numbers say is read, logged and watched by step_reader.py; before a save, all are read.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch.nn as nn

from mlip.batch import Batch
from mlip.precision import precision_on, why_not_as_asked
from mlip.ranks import distributed
from mlip.settings.config import Config, ConfigError, to_dict
from mlip.training import checkpoint, grad_cache, presence, randomness
from mlip.training.allocator import keep_freed_memory
from mlip.training.checkpoint_content import require_same_identity
from mlip.training.determinism import levels
from mlip.training.engine import build_engine
from mlip.training.faults import fire
from mlip.training.lifecycle import CheckpointError, Preempted
from mlip.training.runlog import RunLog
from mlip.training.schedule import learning_rate, total_steps
from mlip.training.step import Engine
from mlip.training.step_reader import SkippedSteps, StartedStep, StepReader
from mlip.training.stop_request import StopRequest
from mlip.training.validation import Validation


class DataSource(Protocol):
    """What the loop wants of a loader; mlip.dataloading.loader.Loader is one."""

    wait_seconds: float

    @property
    def num_rows(self) -> int: ...

    def __iter__(self) -> Iterator[Batch]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class Trainer:
    """One run from its first or its resumed step to its last.

    merge_states  all ranks' loader states as one that any number of ranks can load
    on_save       called on rank 0 with that state after each save
    validation    scores each checkpoint on val, where train.monitor is set
    Raises:  ConfigError (engine, trackers), CheckpointError (resume, last save)
    """

    def __init__(
        self,
        config: Config,
        objective: nn.Module,
        loader: DataSource,
        *,
        merge_states: Callable[[list[Mapping[str, Any]]], dict[str, Any]],
        on_save: Callable[[Mapping[str, Any]], None] | None = None,
        validation: Validation | None = None,
        facts: Mapping[str, Any] | None = None,
        deepspeed_json: dict[str, Any] | None = None,
        allow_mismatch: bool = False,
    ) -> None:
        self.config, self.loader = config, loader
        self.merge_states, self.on_save = merge_states, on_save
        self.validation = validation
        if distributed.is_main():
            checkpoint.remove_leftovers(config.run.dir)
        saved = checkpoint.load_newest(config, allow_mismatch=allow_mismatch)
        threads = randomness.set_threads(config, saved.state.get("threads") if saved else None)
        keep_freed_memory()
        self.engine: Engine = build_engine(objective, config, deepspeed_json)
        self.steps = total_steps(config, loader.num_rows)
        self.step = 0  # steps done
        self.skipped = SkippedSteps()
        randomness.seed_rank(config.run.seed)
        self.facts = {**(facts or {}), "determinism": levels(config, objective)}
        if saved is not None:
            try:
                self._resume(saved, allow_mismatch)
            except (KeyError, IndexError, TypeError, AttributeError, OverflowError) as error:
                raise CheckpointError(
                    f"{saved.folder}: its state.json is not one of this version: {error!r}; name "
                    "another run.dir, or remove this checkpoint for the one before it"
                ) from error
        self.facts |= {
            "engine": self.engine.name,
            "precision": precision_on(config.train.precision, self.engine.device),
            "threads": threads,
            "world_size": distributed.world_size(),
        }
        self.log = RunLog(config, total_steps=self.steps, start_step=self.step)
        self.reader = StepReader(
            config, self.log, self.skipped, reads_late=self.engine.device.type == "cuda"
        )
        self.log.start(self.facts)
        self._say_precision(saved)

    def _say_precision(self, saved: checkpoint.Checkpoint | None) -> None:
        """What train.precision came to here, where that is not what it says or was."""
        told = why_not_as_asked(self.config.train.precision, self.engine.device)
        if told:
            (self.log.say if self.config.train.precision == "auto" else self.log.warn)(told)
        before = saved.state.get("precision") if saved is not None else None
        if before not in (None, self.facts["precision"]):
            self.log.warn(
                f"begun in {before}, goes on in {self.facts['precision']}: this device is of "
                "another kind than the one that began"
            )

    def _resume(self, saved: checkpoint.Checkpoint, allow_mismatch: bool) -> None:
        state = saved.state
        require_same_identity(saved.folder, state, self.facts, allow_mismatch=allow_mismatch)
        try:
            self.engine.load(saved.training)
            self.loader.load_state_dict(state["loader"])
        except ValueError as error:
            raise ConfigError(f"{saved.folder}: {error}") from error
        randomness.restore(state["rng"], seed=self.config.run.seed, step=saved.step)
        self.step = saved.step
        self.skipped = SkippedSteps(state["skipped_steps"], state["skipped_in_a_row"])
        if self.validation is not None:
            self.validation.load_state_dict(state.get("validation"))
        distributed.log_once(f"resumed at step {saved.step} from {saved.folder}")
        if state["world_size"] != distributed.world_size():
            agree = "agree to rounding, not to the bit"
            if "D3" not in self.facts["determinism"]:
                agree = "do not agree: what the model draws (dropout) is drawn by rank"
            distributed.log_once(
                f"{state['world_size']} ranks before, {distributed.world_size()} now: the samples "
                f"keep their order, losses {agree}"
            )

    def fit(self, stop: StopRequest) -> None:
        """Train to the last step and save.

        Raises:  Preempted once a stop that any rank was asked for is saved, or before the first
                 step, with nothing to save; NumericError after train.max_nan_steps skipped steps in
                 a row; CheckpointError if the last save fails
        """
        every = self.config.train.checkpoint_steps
        presence.start(self.config.run.dir)
        ended = "failed"
        try:
            # while the run was set up: a first step may compile for minutes
            if stop.of_any_rank() and self.step < self.steps:
                self.log.event_of_all("stopped", step=self.step)
                raise Preempted(
                    f"stopped on request before step {self.step + 1} of {self.steps}; nothing was "
                    "trained since the start: the same command goes on from there"
                )
            # where a stop was asked for none has looked yet, nor where val was not watched before
            is_new = self.validation is not None and self.validation.is_new
            if is_new or self.step % every == 0:
                self._look_at_val()
            batches = iter(self.loader)
            while self.step < self.steps and not (self.validation and self.validation.is_over):
                self._one_step(batches, stop)
                is_due = self.step % every == 0
                if self.reader.stop_requested or is_due or self.step == self.steps:
                    self.reader.read_all()  # those of all steps that a save would hold
                if self.reader.stop_requested and self.step < self.steps:
                    self.save()
                    self.log.event_of_all("stopped", step=self.step)
                    raise Preempted(
                        f"stopped on request after step {self.step} of {self.steps}; saved: the "
                        "same command goes on from there"
                    )
                if is_due or self.step == self.steps:
                    self._look_at_val()
                if is_due and self.step < self.steps:
                    self._save_or_go_on()
            self.save()
            self.log.event_of_all("trained", step=self.step, skipped_steps=self.skipped.in_all)
            presence.stop()  # not after an error: what explains it asks for the places of ranks
            ended = "trained"
        except Preempted:
            ended = "stopped"
            presence.stop()
            raise
        except Exception:
            self.reader.tell_last()
            raise
        finally:
            self.log.close(ended)

    def _look_at_val(self) -> None:
        """Once a step; never before the first one."""
        if self.validation is not None and self.validation.last_look != self.step:
            self.validation.look(self.engine, self.step, self.log)

    def _one_step(self, batches: Iterator[Batch], stop: StopRequest) -> None:
        """Start a step and read the numbers of one: of this, or on a GPU of the one before."""
        config, step = self.config, self.step
        presence.at(step, "load")
        spoil = fire("load", step, config.run.dir)
        begin = time.perf_counter()
        batch = next(batches)
        if spoil is not None:
            batch = dataclasses.replace(batch, image=batch.image * spoil)
        epoch = step * config.batch.global_pairs / self.loader.num_rows
        lr = learning_rate(step, self.steps, config)
        # the third step here: the first two warm up allocators and kernels
        is_measured = config.batch.is_cached and step == self.log.start_step + 2
        if is_measured:
            self.reader.read_all()  # so that the time is of this step alone
            grad_cache.cost.start()
        began = time.perf_counter()
        numbers = self.engine.start_step(batch, step=step, progress=epoch, lr=lr, stop=stop.is_set)
        self.step += 1
        if is_measured:
            numbers.result()
            self._tell_cache_cost(time.perf_counter() - began)
        self.reader.started(
            StartedStep(
                step=self.step,
                numbers=numbers,
                row_index=batch.row_index,
                lr=lr,
                epoch=epoch,
                begin=begin,
                wait_seconds=self.loader.wait_seconds,
            )
        )

    def _tell_cache_cost(self, step_seconds: float) -> None:
        """What the gradient cache costs, measured on this rank: the second forward passes."""
        seconds, passes = grad_cache.cost.stop()
        share = seconds / max(step_seconds, 1e-9)
        self.log.event_of_all("cache_cost", step=self.step, passes=passes, share=round(share, 4))
        self.log.say(
            f"gradient cache: {passes} passes computed again, {100 * share:.0f} % of step "
            f"{self.step} (batch.micro_images={self.config.batch.micro_images}, "
            f"batch.micro_texts={self.config.batch.micro_texts})"
        )

    def _save_or_go_on(self) -> None:
        """A save between: a full disk costs an interval of safety, not the run."""
        try:
            self.save()
        except CheckpointError as error:
            if self.validation is not None:
                self.validation.forget()
            self.log.warn(f"not saved: {error}; training goes on")
            self.log.event_of_all("not_saved", step=self.step, reason=str(error))

    def save(self) -> Path:
        """Write a checkpoint of this moment; a collective call."""
        presence.at(self.step, "save")
        parts: Sequence[Any] = distributed.gather_objects(
            (self.loader.state_dict(), randomness.capture())
        )
        loader = self.merge_states([part[0] for part in parts])
        state = {
            "format": checkpoint.FORMAT,
            "step": self.step,
            "pairs_seen": self.step * self.config.batch.global_pairs,
            "skipped_steps": self.skipped.in_all,
            "skipped_in_a_row": self.skipped.in_a_row,
            "loader": loader,
            "rng": [part[1] for part in parts],
            "config": to_dict(self.config),
            **({"validation": self.validation.state_dict()} if self.validation else {}),
            **self.facts,
        }
        path = checkpoint.save(
            self.config.run.dir,
            self.engine.state(everywhere=False),
            state,
            keep=self.config.train.keep_checkpoints,
        )
        if self.on_save is not None and distributed.is_main():
            try:
                self.on_save(loader)
            except OSError as error:  # the other ranks know nothing of it and go on
                named = error.filename2 or error.filename  # of a renaming the second is its aim
                of = f" ({named})" if named else ""  # a write to an open file tells none
                self.log.warn(f"saved, but not what goes with it{of}: {error.strerror}")
        return path
