"""One fit: epochs of AdamW, val watched after each, the best epoch's weights put back.

Knows no task: a task hands over its losses of an epoch and how val is scored.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

from mlip.dataloading.progress import Progress
from mlip.settings.transfer import Transfer
from mlip.transfer.array import Array
from mlip.transfer.fits.encoder import Encoder


class TransferError(ValueError):
    """A fit whose numbers broke."""

    exit_code = 5


@dataclass(frozen=True)
class Record:
    """How a fit went; test has no part in it."""

    best_epoch: int
    epochs: int
    steps: int
    train_loss: tuple[float, ...]
    val_loss: tuple[float, ...]
    val_score: tuple[float | None, ...]

    def as_dict(self) -> dict[str, Any]:
        def shown(values: Iterable[float | None]) -> list[float | None]:
            return [None if v is None else round(v, 6) for v in values]

        return {
            "best_epoch": self.best_epoch,
            "epochs": self.epochs,
            "steps": self.steps,
            "train_loss": shown(self.train_loss),
            "val_loss": shown(self.val_loss),
            "val_score": shown(self.val_score),
        }


def shuffled_batches(
    rows: Array, size: int, seed: int, epoch: int, fewest: int
) -> Iterator[tuple[int, Array]]:
    """(pass over the rows, batch), in an order that (seed, pass) decides.

    fewest  an epoch goes over the rows again, in a new order, until it has had that many batches:
            a draw of 20 images would else look at all of val after every second step
    """
    of_pass = math.ceil(len(rows) / size)
    passes = max(1, math.ceil(fewest / of_pass))
    told, steps = Progress(f"steps of epoch {epoch}"), 0
    for number in range((epoch - 1) * passes + 1, epoch * passes + 1):
        order = np.random.default_rng((seed, number)).permutation(len(rows))
        for start in range(0, len(rows), size):
            yield number, rows[order[start : start + size]]
            steps += 1
            told(steps, of_pass * passes)


def batches(rows: Array, size: int) -> Iterator[Array]:
    """The rows in their order; says how far it is."""
    told = Progress("images predicted")
    for start in range(0, len(rows), size):
        yield rows[start : start + size]
        told(min(start + size, len(rows)), len(rows))


def fit(
    head: nn.Module,
    encoder: Encoder | None,
    transfer: Transfer,
    losses: Callable[[int], Iterator[Tensor]],
    validate: Callable[[], tuple[float, float | None]],
) -> Record:
    """Train until val has not improved for transfer.patience epochs; the best epoch is kept.

    encoder   trained as well unless it is frozen, or None
    losses    epoch -> the loss of each batch, to step on
    validate  -> (val loss, val score or None); transfer.monitor says which one counts
    Raises:   TransferError on a loss that is not finite.
    """
    modules, groups = [head], [{"params": list(head.parameters()), "lr": transfer.lr}]
    if encoder is not None and not encoder.is_frozen:
        modules.append(encoder)
        tuned = [p for p in encoder.parameters() if p.requires_grad]
        if tuned:
            groups.append({"params": tuned, "lr": transfer.encoder_lr or transfer.lr})
    optimiser = torch.optim.AdamW(groups, weight_decay=transfer.weight_decay)
    best, best_epoch, state = math.inf, 0, _snapshot(modules)
    history: list[tuple[float, float, float | None]] = []
    most_steps = transfer.max_steps or math.inf
    steps = epoch = 0
    for epoch in range(1, transfer.epochs + 1):
        for module in modules:
            module.train()
        loss, count = _train(optimiser, losses(epoch), epoch, most_steps - steps)
        steps += count
        for module in modules:
            module.eval()
        with torch.no_grad():
            val_loss, val_score = validate()
        if not math.isfinite(val_loss):
            raise TransferError(f"the val loss of epoch {epoch} is {val_loss}: lower transfer.lr")
        history.append((loss, val_loss, val_score))
        watched = val_loss
        if transfer.monitor == "score" and val_score is not None:
            watched = -val_score
        if watched < best:
            best, best_epoch, state = watched, epoch, _snapshot(modules)
        if steps >= most_steps or epoch - best_epoch >= transfer.patience:
            break
    for module, kept in zip(modules, state, strict=True):
        module.load_state_dict(kept)
        module.eval()
    train, val, score = zip(*history, strict=True)
    return Record(best_epoch, epoch, steps, train, val, score)


def _train(
    optimiser: torch.optim.Optimizer, losses: Iterator[Tensor], epoch: int, most: float
) -> tuple[float, int]:
    """(mean loss of an epoch, its steps: `most` at most)"""
    total, count = 0.0, 0
    for loss in losses:
        if not bool(torch.isfinite(loss)):
            raise TransferError(
                f"the loss of epoch {epoch}, step {count + 1} is {loss.item()}: lower "
                "transfer.lr, or check that the checkpoint's features are finite"
            )
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        total, count = total + float(loss.detach()), count + 1
        if count >= most:
            break
    return total / max(1, count), count


def _snapshot(modules: list[nn.Module]) -> list[dict[str, Any]]:
    return [copy.deepcopy(module.state_dict()) for module in modules]
