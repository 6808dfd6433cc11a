"""One optimiser step: what every engine promises.

All engines give the same numbers: parameters are float32 (precision bf16 is autocast inside the
model, so the masters are the parameters), gradients are averaged over ranks, a parameter without a
gradient counts as a zero gradient, and a step with a non-finite loss or gradient on any rank is
skipped by all. A skipped step leaves parameters, moments, average and buffers as they were: the
batch statistics of one bad image would otherwise stay not finite, and no state could be saved.
The device decides that by itself, so that the host can hand it the next step without having read
the numbers of this one.
"""

from __future__ import annotations

import abc
import math
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from mlip.batch import Batch
from mlip.host_read import HostRead
from mlip.ranks import distributed
from mlip.settings.config import Config
from mlip.training import presence
from mlip.training.checkpoint_content import require_shapes
from mlip.training.ema import EMA, EMAState
from mlip.training.faults import fire
from mlip.training.muon import matrix_names
from mlip.training.optimizer import MOMENTS, seed_moments
from mlip.training.spikes import SpikeWatch, cause


@dataclass(frozen=True)
class StepResult:
    """What one step did, as plain numbers; equal on all ranks but for ``total`` and ``terms``."""

    total: float
    terms: dict[str, float]
    grad_norm: float  # before clipping; not finite where the step was skipped
    is_skipped: bool
    stop_requested: bool  # some rank asked for a stop
    scales: dict[str, float]  # that this step used
    spike: str | None = None  # cause of a loss far above the recent ones (spikes.py)

    def bad_terms(self) -> list[str]:
        """Names of the loss terms that are not finite on this rank."""
        bad = [name for name, value in self.terms.items() if not math.isfinite(value)]
        return bad or ([] if math.isfinite(self.total) else ["total"])


@dataclass(frozen=True)
class TrainingState:
    """Parameters and the optimiser's moments by name, whole and in float32, and buffers."""

    parameters: dict[str, Tensor]
    # "exp_avg", "exp_avg_sq" -> name -> tensor; a matrix that Muon moves has the first only
    moments: dict[str, dict[str, Tensor]]
    buffers: dict[str, Tensor]
    optimizer_steps: int  # the optimiser's own count: skipped steps are not in it
    ema: EMAState | None = None  # where train.ema_decay is set


class StepUnderWay:
    """A step that the device has been given; its numbers are on their way to the host."""

    def __init__(
        self,
        read: HostRead,
        terms: list[str],
        scales: dict[str, float] | list[str],
        spike: str | None,
    ) -> None:
        """terms, scales: names of what `read` brings; or the scales, where they were read before"""
        self._read, self._terms, self._scales, self._spike = read, terms, scales, spike
        self._result: StepResult | None = None

    @property
    def is_done(self) -> bool:
        """Whether `result` would not wait."""
        return self._result is not None or self._read.is_there

    def result(self) -> StepResult:
        """What the step did; waits for the device until it has done it."""
        if self._result is None:
            is_skipped, grad_norm, total, wish, *numbers = self._read.numbers()
            scales = self._scales
            if not isinstance(scales, dict):
                scales = dict(zip(scales, numbers[len(self._terms) :], strict=True))
            self._result = StepResult(
                total=total,
                terms=dict(zip(self._terms, numbers, strict=False)),
                grad_norm=float("nan") if is_skipped else grad_norm,
                is_skipped=is_skipped > 0,
                stop_requested=wish > 0,
                scales=scales,
                spike=self._spike,
            )
        return self._result


class Engine(abc.ABC):
    """One optimiser step at a time; the loop owns the step count and the learning rate."""

    name: str
    optimizer: Any  # of torch, which holds the moments
    ema: EMA | None = None

    def __init__(self, objective: nn.Module, config: Config) -> None:
        self.objective = objective
        self.config = config
        factor = config.train.spike_factor
        self.spikes = SpikeWatch(factor) if factor > 0.0 else None
        self.device = next(objective.parameters()).device
        self.call: Any = objective  # with the engine's hooks around it, where it has some
        self._modules = list(objective.modules())  # walking the tree takes the host milliseconds
        self.parameters = {n: p for n, p in objective.named_parameters() if p.requires_grad}
        matrices = matrix_names(objective) if config.train.optimizer == "muon" else set()
        # which moments the optimiser keeps of a parameter
        self.moments = {n: MOMENTS[:1] if n in matrices else MOMENTS for n in self.parameters}
        self._kept: list[tuple[Tensor, Tensor]] | None = None  # a buffer, and it before the step
        self._under_way: StepUnderWay | None = None  # the newest

    def start_step(
        self, batch: Batch, *, step: int, progress: float, lr: float, stop: bool = False
    ) -> StepUnderWay:
        """Forward, backward and update; on a GPU they are queued, and nothing of them is read.

        stop  this rank's wish; the result's is any rank's
        """
        if not all(module.training for module in self._modules):
            self.objective.train()
        folder = self.config.run.dir
        batch = batch.to(self.device)
        self._keep_buffers()
        before = self._generators() if self.spikes is not None else None
        presence.at(step, "forward")
        spoil = fire("forward", step, folder)
        total, terms = self._forward(batch, step, progress)
        if spoil is not None:
            total = total * spoil
        limit = self._spike_limit(self.spikes) if self.spikes is not None else float("inf")
        value = total.detach()
        # filled on the device: a number copied from the host would wait for the forward pass
        wish = torch.full_like(value, float(stop))
        flags = [(~torch.isfinite(value)).float(), wish, (value > limit).float()]
        flags.append(value.nan_to_num())  # the same on all ranks, or one of them computed wrongly
        fire("allreduce", step, folder)
        agreed = distributed.max_over_ranks(torch.stack(flags))
        spike = None
        if before is not None and bool(agreed[2] > 0) and not bool(agreed[0] > 0):
            self._restore_generators(before)
            self._restore_buffers()
            again, terms = self._forward(batch, step, progress)
            spike = cause(float(agreed[3]), float(again.detach()))
            total = again
        # One rank's NaN must stop all: times NaN every gradient of every rank is NaN and the
        # update is skipped the way a NaN gradient is. Times 1.0 is exact.
        factor = torch.where(agreed[0] > 0, torch.nan, 1.0)
        presence.at(step, "backward")
        if (spoil := fire("backward", step, folder)) is not None:
            factor = factor * spoil  # gradients of this rank only
        self._backward(total * factor)
        names, scales = sorted(terms), self._scale_values()
        values = [total.detach(), agreed[1], *(terms[n].detach() for n in names), *scales.values()]
        told = torch.stack([value.float() for value in values])  # before the scales move
        known = list(scales) or self.scales()
        presence.at(step, "optimizer")
        grad_norm = self._update(lr)
        is_skipped = ~torch.isfinite(grad_norm)
        self._restore_buffers(is_skipped)
        if self.ema is not None:
            self.ema.update(is_skipped)
        outcome = torch.stack([is_skipped.float(), grad_norm.float()])
        read = HostRead(torch.cat([outcome, told]))
        if (spoil := fire("optimizer", step, folder)) is not None:
            self._spoil_a_weight(spoil)
        self._under_way = StepUnderWay(read, names, known, spike)
        return self._under_way

    def _spike_limit(self, spikes: SpikeWatch) -> float:
        """What counts as a spike after the step before, whose loss is read for it."""
        if self._under_way is not None:
            before = self._under_way.result()
            if not before.is_skipped:
                spikes.note(before.total)
            self._under_way = None
        return spikes.limit()

    @torch.no_grad()
    def _keep_buffers(self) -> None:
        if self._kept is None:  # every buffer is changed in place: the list stays true
            fixed = fixed_buffers(self.objective)
            changed = [b for name, b in self._buffers().items() if name not in fixed]
            self._kept = [(b, torch.empty_like(b)) for b in changed]
        for buffer, kept in self._kept:
            kept.copy_(buffer)

    @torch.no_grad()
    def _restore_buffers(self, where: Tensor | None = None) -> None:
        """Buffers as they were before the step; where `where` (bool []) is given, if it is true."""
        for buffer, kept in self._kept or ():
            buffer.copy_(kept if where is None else torch.where(where, kept, buffer))

    def _generators(self) -> tuple[Tensor, Tensor | None]:
        cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
        return torch.get_rng_state(), cuda

    def _restore_generators(self, before: tuple[Tensor, Tensor | None]) -> None:
        generator, cuda = before
        torch.set_rng_state(generator)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda)

    @torch.no_grad()
    def _spoil_a_weight(self, factor: float) -> None:
        """For fault injection: one entry of the largest parameter, where this rank holds it."""
        largest = max(self.parameters.values(), key=lambda p: getattr(p, "ds_numel", p.numel()))
        # under ZeRO-3 the rank's part and, where it is gathered, the whole
        for held in (largest.data, getattr(largest, "ds_tensor", None)):
            if held is not None and held.numel():
                held.view(-1)[held.view(-1).abs().argmax()] *= factor

    def _forward(self, batch: Batch, step: int, progress: float) -> tuple[Tensor, dict]:
        return self.call(batch, step=step, progress=progress)

    @abc.abstractmethod
    def _backward(self, total: Tensor) -> None: ...

    @abc.abstractmethod
    def _update(self, lr: float) -> Tensor:
        """Clip, step, clamp the scales; the gradient norm before clipping, [] on the device.

        Where it is not finite, parameters and moments are as they were.
        """

    @abc.abstractmethod
    def state(self, *, everywhere: bool = True) -> TrainingState:
        """The whole state, on rank 0 alone unless `everywhere`; a collective call.

        May share memory with the parameters: use it before the next step.
        """

    @abc.abstractmethod
    def averaged(self) -> AbstractContextManager[None]:
        """The average (`ema`) in the weights' place, and then all as before, to the bit; a
        collective call."""

    @abc.abstractmethod
    def _held(self) -> list[Tensor]:
        """The float32 tensors that the optimiser updates in place on this rank."""

    def _share_out(self) -> None:
        """Rank 0's parameters and buffers on every rank.

        Nodes with other processors do not round alike what they compute for themselves: vectors
        of concepts, starts of prototypes.
        """
        distributed.broadcast_(p.data for p in self.objective.parameters())
        distributed.broadcast_(self.objective.buffers())

    @torch.no_grad()
    def load(self, state: TrainingState) -> None:
        """Go on from a state; a collective call.  Raises:  ValueError for one of another model"""
        self._check_names(state)
        self._load_buffers(state)
        if state.optimizer_steps:
            self._seed_moments(state.optimizer_steps)
        if state.ema is not None:
            self._load_ema(state)
        for name, parameter in self.objective.named_parameters():
            self._set(parameter, state.parameters[name], None)
            if state.optimizer_steps and parameter.requires_grad:
                for key in self.moments[name]:
                    self._set(parameter, state.moments[key][name], key)
        if state.ema is None:
            self._load_ema(state)

    def _seed_moments(self, steps: int) -> None:
        """The optimiser's state before its first step here, with the step count given."""
        for parameter, keys in zip(self._held(), self.moments.values(), strict=True):
            seed_moments(self.optimizer, parameter, steps, keys)

    def _start_ema(self) -> None:
        decay = self.config.train.ema_decay
        if decay > 0.0:
            self.ema = EMA(self._held(), decay)

    def _load_ema(self, state: TrainingState) -> None:
        """Between two loads of parameters: the average, then (by the caller) the weights."""
        if self.ema is None:
            return
        if state.ema is None:
            self.ema.restart()  # switched on at a resume: the average starts from here
            return
        for name, parameter in self.parameters.items():
            self._set(parameter, state.ema.parameters[name], None)
        self.ema.restart(state.ema.updates)

    @abc.abstractmethod
    def _set(self, parameter: Any, value: Tensor, key: str | None) -> None:
        """Overwrite a parameter, and its master where there is one, or (by key) a moment of it."""

    @torch.no_grad()
    def _scale_values(self) -> dict[str, Tensor]:
        """The logit scales where the rank holds them whole, each [] on the device; else none."""
        scales: Any = self.objective.model.scales  # type: ignore[union-attr]
        return {"logit": scales.logit_scale(), "logit_local": scales.logit_scale_local()}

    def scales(self) -> dict[str, float]:
        """The logit scales, for the log; waits for all that the GPU has to do."""
        return {name: float(value) for name, value in self._scale_values().items()}

    def _buffers(self) -> dict[str, Tensor]:
        names = {n for n, _ in self.objective.named_buffers()}
        return {n: t for n, t in self.objective.state_dict().items() if n in names}

    def _load_buffers(self, state: TrainingState) -> None:
        own = self._buffers()
        if own.keys() != state.buffers.keys():
            raise ValueError(
                f"buffers of the model and of the checkpoint differ: "
                f"{sorted(own.keys() ^ state.buffers.keys())}"
            )
        require_shapes({n: b.shape for n, b in own.items()}, state.buffers)
        for name, buffer in own.items():
            saved = state.buffers[name]
            if saved.dtype != buffer.dtype:
                raise ValueError(f"{name}: expected {buffer.dtype}, got {saved.dtype}")
            buffer.copy_(saved)

    def _check_names(self, state: TrainingState) -> None:
        own = dict(self.objective.named_parameters())
        different = own.keys() ^ state.parameters.keys()
        if different:
            raise ValueError(
                f"parameters of the model and of the checkpoint differ: {sorted(different)[:5]}"
            )
        lacking = [
            name
            for name, keys in self.moments.items()
            if state.optimizer_steps and any(name not in state.moments[key] for key in keys)
        ]
        if lacking:
            raise ValueError(
                f"the checkpoint lacks moments that train.optimizer={self.config.train.optimizer} "
                f"needs, of {sorted(lacking)[:3]} and {max(0, len(lacking) - 3)} more; it was "
                "trained with another train.optimizer: set that one"
            )
        # ZeRO-3 keeps a part in the parameter's place, and would take any number of values
        shapes = {n: getattr(p, "ds_shape", p.shape) for n, p in own.items()}
        require_shapes(shapes, state.parameters)
        for key, moments in state.moments.items() if state.optimizer_steps else ():
            require_shapes({n: shapes[n] for n, k in self.moments.items() if key in k}, moments)
        if self.ema is not None and state.ema is not None:
            require_shapes({n: shapes[n] for n in self.parameters}, state.ema.parameters)


def fixed_buffers(objective: nn.Module) -> set[str]:
    """Names of the buffers that no step changes, as modules list them in FIXED_BUFFERS."""
    return {
        f"{prefix}.{name}".lstrip(".")
        for prefix, module in objective.named_modules()
        for name in getattr(module, "FIXED_BUFFERS", ())
    }
