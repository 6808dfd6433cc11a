"""Watching val while a run trains: a score at every checkpoint, the best one kept, an early end.

Held-out pairs are read as training reads them, without augmentation, in batches of one size, and
scored in evaluation mode by what the objective gives for them (mlip/losses/held_out.py), with the
weights that evaluate.weights names. Nothing of it reaches the training: no gradient, no random
number, no buffer.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch

from mlip.batch import Batch
from mlip.ranks import distributed
from mlip.settings.config import Config
from mlip.training import presence
from mlip.training.runlog import RunLog
from mlip.training.step import Engine

_RECALL = "recall@"
# scores of equal ones can be compared
_OF_A_KIND = ("monitor", "weights", "batches", "pairs")


class HeldOut(Protocol):
    """What is wanted of a loader of val; mlip.dataloading.loader.Loader is one."""

    def __iter__(self) -> Iterator[Batch]: ...

    def rewind(self) -> None: ...

    def close(self) -> None: ...


class Validation:
    """The scores of one run on val, and which of its checkpoints is the best.

    held_out  an endless loader over val, in batches of `pairs` over all ranks
    """

    def __init__(self, config: Config, held_out: HeldOut, *, batches: int, pairs: int) -> None:
        self.monitor, self.patience = config.train.monitor, config.train.patience
        self.weights = config.evaluate.weights  # those that evaluation and export will take
        self.held_out, self.batches, self.pairs = held_out, batches, pairs
        self.best_step: int | None = None
        self.best = math.nan
        self.looks_since = 0  # checkpoints since the best one
        self.last_look = 0  # its step
        self.is_new = True  # nothing of it is known from a checkpoint
        self._before: dict[str, Any] = self.state_dict()

    @property
    def is_over(self) -> bool:
        """Whether train.patience checkpoints in a row were no better."""
        return 0 < self.patience <= self.looks_since

    def look(self, engine: Engine, step: int, log: RunLog) -> None:
        """Score the weights, or their average, after `step` steps and say so; a collective call."""
        presence.at(step, "validate")
        self._before = self.state_dict()
        self.last_look = step
        # nodes with other processors round otherwise: all go on with what rank 0 found
        with engine.averaged() if self.weights == "ema" else contextlib.nullcontext():
            terms = distributed.broadcast_object(self._scores(engine))
        recalls = [value for name, value in terms.items() if name.startswith(_RECALL)]
        score = terms["total"] if self.monitor == "loss" else sum(recalls) / len(recalls)
        is_best = math.isfinite(score) and (
            self.best_step is None
            or (score < self.best if self.monitor == "loss" else score > self.best)
        )
        if is_best:
            self.best_step, self.best, self.looks_since = step, score, 0
        else:
            self.looks_since += 1
        log.validated(step, terms, pairs=self.pairs, best_step=self.best_step, weights=self.weights)
        if self.is_over:
            best = f"the best is that of step {self.best_step}"
            if self.best_step is None:
                best = "no score was a number, none is the best"
            log.say(
                f"no better {self.monitor} on val at {self.looks_since} checkpoints in a row "
                f"(train.patience={self.patience}): the training ends here; {best}"
            )

    @torch.no_grad()
    def _scores(self, engine: Engine) -> dict[str, float]:
        """Means over the batches: "total", the losses before their weights, the recalls."""
        engine.objective.eval()
        sums: dict[str, float] = {}
        batches = iter(self.held_out)
        try:
            for number in range(self.batches):
                batch = next(batches).to(engine.device)
                total, terms = engine.call(batch, step=number, progress=0.0, held_out=True)
                for name, value in {"total": total, **terms}.items():
                    sums[name] = sums.get(name, 0.0) + float(value)
        finally:
            self.held_out.rewind()  # what was prepared ahead is let go
            engine.objective.train()
        return {name: value / self.batches for name, value in sums.items()}

    def forget(self) -> None:
        """The last look's checkpoint could not be saved: it cannot be the best one."""
        is_lost = self.best_step != self._before["best_step"]
        if is_lost:
            self.load_state_dict(self._before)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps, ready for JSON."""
        return {
            "monitor": self.monitor,
            "weights": self.weights,
            "batches": self.batches,
            "pairs": self.pairs,
            "best_step": self.best_step,
            "best": None if self.best_step is None else self.best,
            "looks_since": self.looks_since,
            "last_look": self.last_look,
        }

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Go on as saved; from nothing where the run was not watched, or for another score.

        Scores of other pairs or among another number of them are no better and no worse: with
        train.monitor_pairs, the number of ranks or evaluate.weights they change.
        Raises:  KeyError or TypeError where it is no state_dict
        """
        if not state:
            return
        state = {"weights": "trained", **state}  # of a version that scored no others
        best, mine = state["best_step"], self.state_dict()
        if any(state.get(key) != mine[key] for key in _OF_A_KIND):
            if best is not None:
                saved, now = ({k: x.get(k) for k in _OF_A_KIND} for x in (state, mine))
                distributed.log_once(
                    f"what val showed cannot be compared with what it will show (saved {saved}; "
                    f"now {now}): the best is looked for anew, and step {best} is not kept for it",
                    logging.WARNING,
                )
            return
        self.is_new = False
        try:
            self.best_step = None if best is None else int(best)
            self.best = math.nan if best is None else float(state["best"])
            self.looks_since = int(state["looks_since"])
            self.last_look = int(state["last_look"])
        except ValueError as error:  # a text in a number's place
            raise TypeError(f"validation: {error}") from error

    def close(self) -> None:
        self.held_out.close()
