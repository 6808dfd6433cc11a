"""How one optimiser step happens: in plain torch, or under DeepSpeed ZeRO 0 to 3.

The only file that imports deepspeed, and only when it is asked for. Both engines give the same
numbers: parameters are float32 (precision bf16 is autocast inside the model, so the masters are the
parameters), gradients are averaged over ranks, a parameter without a gradient counts as a zero
gradient, and a step with a non-finite loss or gradient on any rank is skipped by all.
"""

from __future__ import annotations

import abc
import contextlib
import importlib.util
import os
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn as nn
from torch import Tensor

from mlip import distributed
from mlip.batch import Batch
from mlip.config import Config, ConfigError
from mlip.training.deepspeed_json import deepspeed_settings
from mlip.training.grad_cache import set_recompute_context
from mlip.training.schedule import peak_lr, undecayed_names

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class StepResult:
    """What one step did, as plain numbers; equal on all ranks but for ``total`` and ``terms``."""

    total: float
    terms: dict[str, float]
    grad_norm: float  # before clipping; not finite where the step was skipped
    is_skipped: bool
    stop_requested: bool  # some rank asked for a stop


@dataclass(frozen=True)
class TrainingState:
    """Parameters and AdamW moments by parameter name, whole and in float32, and buffers."""

    parameters: dict[str, Tensor]
    moments: dict[str, dict[str, Tensor]]  # "exp_avg", "exp_avg_sq" -> name -> tensor
    buffers: dict[str, Tensor]
    optimizer_steps: int  # AdamW's own count: skipped steps are not in it


def build_optimizer(objective: nn.Module, config: Config) -> torch.optim.AdamW:
    """AdamW over the trainable parameters, in two groups: decayed and not."""
    undecayed = undecayed_names(objective)
    trainable = [(n, p) for n, p in objective.named_parameters() if p.requires_grad]
    groups = [
        {
            "params": [p for n, p in trainable if n not in undecayed],
            "weight_decay": config.train.weight_decay,
        },
        {"params": [p for n, p in trainable if n in undecayed], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=peak_lr(config),
        betas=config.train.betas,
        fused=True,  # one pass over memory; 200 small tensors cost milliseconds without
    )


def _seed_moments(optimizer: torch.optim.Optimizer, parameter: Tensor, steps: int) -> None:
    """AdamW's state for a parameter before its first step here, with the step count given."""
    optimizer.state[parameter] = {
        "step": torch.tensor(float(steps), device=parameter.device),
        **{key: torch.zeros_like(parameter) for key in MOMENTS},
    }


class Engine(abc.ABC):
    """One optimiser step at a time; the loop owns the step count and the learning rate."""

    name: str

    def __init__(self, objective: nn.Module, config: Config) -> None:
        self.objective = objective
        self.config = config
        self.device = next(objective.parameters()).device
        self.parameters = {n: p for n, p in objective.named_parameters() if p.requires_grad}

    def train_step(
        self, batch: Batch, *, step: int, progress: float, lr: float, stop: bool = False
    ) -> StepResult:
        """Forward, backward and update; ``stop`` is this rank's wish, the result's is anyone's."""
        self.objective.train()
        total, terms = self._forward(batch.to(self.device), step, progress)
        flags = torch.stack([(~torch.isfinite(total.detach())).float(), total.new_tensor(stop)])
        flags = distributed.max_over_ranks(flags)
        # One rank's NaN must stop all: times NaN every gradient of every rank is NaN and the
        # update is skipped the way a NaN gradient is. Times 1.0 is exact.
        self._backward(total * torch.where(flags[0] > 0, torch.nan, 1.0))
        grad_norm = self._update(lr)
        names = sorted(terms)
        values = torch.stack([total.detach().float(), *(terms[n].detach().float() for n in names)])
        numbers = values.tolist()
        return StepResult(
            total=numbers[0],
            terms=dict(zip(names, numbers[1:], strict=True)),
            grad_norm=grad_norm if grad_norm is not None else float("nan"),
            is_skipped=grad_norm is None,
            stop_requested=bool(flags[1] > 0),
        )

    @abc.abstractmethod
    def _forward(
        self, batch: Batch, step: int, progress: float
    ) -> tuple[Tensor, dict[str, Tensor]]: ...

    @abc.abstractmethod
    def _backward(self, total: Tensor) -> None: ...

    @abc.abstractmethod
    def _update(self, lr: float) -> float | None:
        """Clip, step, clamp the scales; the gradient norm, or None where it is not finite."""

    @abc.abstractmethod
    def state(self) -> TrainingState:
        """The whole state on every rank (a collective call)."""

    @abc.abstractmethod
    def load(self, state: TrainingState) -> None: ...

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
        for name, buffer in own.items():
            buffer.copy_(state.buffers[name])

    def _check_names(self, state: TrainingState) -> None:
        different = {n for n, _ in self.objective.named_parameters()} ^ state.parameters.keys()
        if different:
            raise ValueError(
                f"parameters of the model and of the checkpoint differ: {sorted(different)[:5]}"
            )


class PlainEngine(Engine):
    """Data-parallel training in plain torch: whole parameters and optimiser on every rank."""

    name = "plain"

    def __init__(self, objective: nn.Module, config: Config) -> None:
        super().__init__(objective, config)
        self.optimizer = build_optimizer(objective, config)
        distributed.broadcast_(p.data for p in objective.parameters())

    def _forward(self, batch: Batch, step: int, progress: float) -> tuple[Tensor, dict]:
        return self.objective(batch, step=step, progress=progress)

    def _backward(self, total: Tensor) -> None:
        total.backward()

    def _update(self, lr: float) -> float | None:
        for parameter in self.parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        distributed.average_([p.grad for p in self.parameters.values() if p.grad is not None])
        norm = torch.nn.utils.clip_grad_norm_(
            self.parameters.values(), self.config.train.clip_norm or float("inf")
        )
        grad_norm = float(norm)
        is_finite = grad_norm < float("inf")  # False for NaN too
        if is_finite:
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
            self.objective.model.scales.clamp_()  # type: ignore[union-attr,operator]
        self.optimizer.zero_grad(set_to_none=True)
        return grad_norm if is_finite else None

    def state(self) -> TrainingState:
        moments: dict[str, dict[str, Tensor]] = {key: {} for key in MOMENTS}
        steps = 0
        for name, parameter in self.parameters.items():
            held = self.optimizer.state.get(parameter, {})
            steps = int(held["step"]) if held else 0
            for key in MOMENTS:
                moments[key][name] = held[key] if held else torch.zeros_like(parameter)
        return TrainingState(
            parameters={n: p.detach() for n, p in self.objective.named_parameters()},
            moments=moments,
            buffers=self._buffers(),
            optimizer_steps=steps,
        )

    @torch.no_grad()
    def load(self, state: TrainingState) -> None:
        self._check_names(state)
        self._load_buffers(state)
        for name, parameter in self.objective.named_parameters():
            parameter.copy_(state.parameters[name])
            if state.optimizer_steps and parameter.requires_grad:
                _seed_moments(self.optimizer, parameter, state.optimizer_steps)
                for key in MOMENTS:
                    self.optimizer.state[parameter][key].copy_(state.moments[key][name])


class DeepSpeedEngine(Engine):
    """The same step under DeepSpeed: ZeRO partitions the moments, gradients and parameters.

    DeepSpeed runs in float32 throughout (bf16 is autocast in the model), which gives every stage
    the same numerics and makes the parameters their own masters.
    """

    name = "deepspeed"

    def __init__(self, objective: nn.Module, config: Config, settings: dict[str, Any]) -> None:
        super().__init__(objective, config)
        self.stage = config.train.zero_stage
        if self.device.type == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        distributed.start_alone()
        import deepspeed
        import deepspeed.ops
        from deepspeed.utils import logger

        self._deepspeed = deepspeed
        logger.setLevel("WARNING")
        # a C++ extension for inference that would be compiled for half a minute at the start
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(verbose=False)
        distributed.broadcast_(p.data for p in objective.parameters())
        # its own broadcast views parameters as bytes, which fails for a scalar (0.19.8)
        with mock.patch.object(deepspeed.DeepSpeedEngine, "_broadcast_model"):
            self.engine, self.zero, _, _ = deepspeed.initialize(
                model=objective, optimizer=build_optimizer(objective, config), config=settings
            )
        set_recompute_context(self._keep_gathered if self.stage == 3 else contextlib.nullcontext)
        # the torch optimiser that holds the moments: inside ZeRO's from stage 1 on
        self.optimizer = self.zero if self.stage == 0 else self.zero.optimizer

    def _keep_gathered(self) -> Any:
        """Stage 3 during a recomputation: its forward hooks must not release the parameters.

        The backward pass that asked for the recomputation has gathered its module's already and
        goes on with them right after; the module's own backward hook releases them.
        """
        coordinator = self.zero.parameter_offload.get_param_coordinator()
        return mock.patch.object(coordinator, "release_sub_module")

    def _forward(self, batch: Batch, step: int, progress: float) -> tuple[Tensor, dict]:
        return self.engine(batch, step=step, progress=progress)

    def _backward(self, total: Tensor) -> None:
        self.engine.backward(total)

    def _update(self, lr: float) -> float | None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if self.stage == 0:
            # without ZeRO, DeepSpeed would apply a NaN gradient
            norm = torch.nn.utils.get_total_norm(
                [p.grad for p in self.parameters.values() if p.grad is not None]
            )
            if not norm < float("inf"):
                self.zero.zero_grad(set_to_none=True)
                return None
            self.engine.step()
        else:
            self.engine.step()
            if self.zero.overflow:
                return None
            norm = self.engine.get_global_grad_norm()
        self._clamp_scales()
        return float(norm)

    @torch.no_grad()
    def _clamp_scales(self) -> None:
        """Scales.clamp_ on what the rank holds: the parameter and its part of the master."""
        scales: Any = self.objective.model.scales  # type: ignore[union-attr]
        for name, (least, most) in scales.BOUNDS.items():
            parameter = scales.stored[name]
            if not parameter.requires_grad:
                continue
            parameter.data.clamp_(least, most)
            if self.stage == 3:
                parameter.ds_tensor.data.clamp_(least, most)
                self.zero.get_local_fp32_param(parameter).clamp_(least, most)
            elif self.stage > 0 and parameter._hp_mapping is not None:
                parameter._hp_mapping.get_hp_fragment().clamp_(least, most)

    def _partitions(self) -> list[Tensor]:
        """The flat float32 tensors that the optimiser really updates on this rank."""
        if self.stage == 3:
            return self.zero.fp32_partitioned_groups_flat
        if self.stage == 0:
            return list(self.parameters.values())
        return self.zero.single_partition_of_fp32_groups

    def state(self) -> TrainingState:
        from deepspeed.utils import safe_get_full_optimizer_state

        if self.stage in (1, 2):
            # DeepSpeed links after the first group's first step, when the second has no state yet
            self.zero._hp_optimizer_states_linked = False
            self.zero._lazy_init_hp_params_optimizer_state()
        held = self.optimizer.state.get(self._partitions()[0], {})
        steps = int(held["step"]) if held else 0
        moments: dict[str, dict[str, Tensor]] = {key: {} for key in MOMENTS}
        for name, parameter in self.parameters.items():
            shape = parameter.ds_shape if self.stage == 3 else parameter.shape
            for key in MOMENTS:
                if not steps:
                    full = torch.zeros(shape)
                elif self.stage == 0:
                    full = self.optimizer.state[parameter][key]
                else:
                    full = safe_get_full_optimizer_state(parameter, key)
                moments[key][name] = full.view(shape)
        with self._whole_parameters():
            parameters = {n: p.detach().clone() for n, p in self.objective.named_parameters()}
        return TrainingState(
            parameters=parameters,
            moments=moments,
            buffers=self._buffers(),
            optimizer_steps=steps,
        )

    def _whole_parameters(self) -> Any:
        if self.stage < 3:
            return contextlib.nullcontext()
        return self._deepspeed.zero.GatheredParameters(list(self.objective.parameters()))

    @torch.no_grad()
    def load(self, state: TrainingState) -> None:
        self._check_names(state)
        self._load_buffers(state)
        if state.optimizer_steps:
            for partition in self._partitions():
                _seed_moments(self.optimizer, partition, state.optimizer_steps)
            if self.stage in (1, 2):
                self.zero._lazy_init_hp_params_optimizer_state()
        for name, parameter in self.objective.named_parameters():
            self._set(parameter, state.parameters[name], None)
            if state.optimizer_steps and parameter.requires_grad:
                for key in MOMENTS:
                    self._set(parameter, state.moments[key][name], key)

    def _set(self, parameter: Any, value: Tensor, key: str | None) -> None:
        """Overwrite a parameter and its master (key None) or one of its moments."""
        value = value.to(self.device)
        if self.stage == 0:
            (parameter if key is None else self.optimizer.state[parameter][key]).copy_(value)
            return
        if self.stage < 3:
            if key is None:
                parameter.data.copy_(value)
            if parameter.requires_grad:
                parameter.set_full_hp_param(value, key)
            return
        # DeepSpeed's set_full_hp_param fails where a parameter does not divide by the world size:
        # the last rank's part is padded
        size = parameter.ds_tensor.numel()
        part = value.new_zeros(size * distributed.world_size())
        part[: value.numel()] = value.flatten()
        part = part[size * distributed.rank() :][:size]
        if parameter.requires_grad:
            self.zero.set_local_hp_param(part, parameter, key)
        if key is None:
            parameter.ds_tensor.data.copy_(part)
            if parameter.data.numel() == value.numel():  # small ones stay whole on every rank
                parameter.data.copy_(value.view(parameter.ds_shape))


def build_engine(
    objective: nn.Module, config: Config, user_json: dict[str, Any] | None = None
) -> Engine:
    """The engine that train.engine asks for; auto = DeepSpeed under a launcher where installed.

    Raises:  ConfigError where the settings need DeepSpeed and it is not installed, or where a
             user's DeepSpeed JSON contradicts the config.
    """
    train = config.train
    is_installed = importlib.util.find_spec("deepspeed") is not None
    wants = train.engine == "deepspeed" or train.offload or user_json is not None
    if not is_installed:
        if wants or (train.zero_stage >= 2 and distributed.world_size() > 1):
            raise ConfigError(
                f"train.engine={train.engine}, train.zero_stage={train.zero_stage}, "
                f"train.offload={train.offload} need DeepSpeed, which is not installed: "
                "pip install deepspeed, or set train.engine=plain train.zero_stage=0"
            )
    elif train.engine != "plain" and (wants or "RANK" in os.environ):
        return DeepSpeedEngine(objective, config, deepspeed_settings(config, user_json))
    return PlainEngine(objective, config)
