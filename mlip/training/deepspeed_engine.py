"""The engine that DeepSpeed runs, ZeRO 0 to 3, and which DeepSpeed it is written for.

The only file that imports deepspeed, and only when it is asked for.
"""

from __future__ import annotations

import contextlib
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from importlib import metadata
from typing import Any
from unittest import mock

import torch
import torch.nn as nn
from torch import Tensor

from mlip.ranks import distributed, process_group
from mlip.settings.config import Config, ConfigError
from mlip.training.deepspeed_json import refusal
from mlip.training.ema import EMAState
from mlip.training.optimizer import MOMENTS, build_optimizer, seed_moments
from mlip.training.step import Engine, TrainingState

# From the first to before the second, as setup.py asks for: gathers, moments and the reduction of
# one backward pass are reached through parts of DeepSpeed that it moves between minor versions.
# Before 0.19.8 ZeRO takes a float32 gradient that is not finite for one of a norm of about 1.
DEEPSPEED_VERSIONS = ((0, 19, 8), (0, 20))
NEEDED = "deepspeed>={},<{}".format(*(".".join(map(str, v)) for v in DEEPSPEED_VERSIONS))
# what ZeRO-1 and -2 ask the device by: whether a norm is finite, and to mark one that is not
QUESTIONS = ("is_invalid_grad_norm", "mask_nan_or_inf_with_val_inplace")


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
        process_group.start_alone()
        # of an mpirun that has started torchrun; DeepSpeed asserts that it equals LOCAL_RANK
        os.environ.pop("OMPI_COMM_WORLD_LOCAL_RANK", None)
        import deepspeed
        import deepspeed.ops
        import pydantic
        from deepspeed.runtime.zero import stage_1_and_2
        from deepspeed.utils import logger

        self._deepspeed, self._stages_1_and_2 = deepspeed, stage_1_and_2
        # where masters are on the CPU, the host has to have the norm
        self.steps_unread = (
            self.stage in (1, 2)
            and not config.train.offload
            and all(hasattr(stage_1_and_2, name) for name in QUESTIONS)
        )
        logger.setLevel("WARNING")
        # DeepSpeed calls collectives by names that torch renames; nothing a user could act on
        warnings.filterwarnings(
            "ignore", message="`torch.distributed.*is deprecated", category=FutureWarning
        )
        # a C++ extension for inference that would be compiled for half a minute at the start
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(verbose=False)
        self._share_out()
        if self.stage > 0:
            # ZeRO flattens parameters and views them as bytes: no channels_last weights
            for parameter in objective.parameters():
                parameter.data = parameter.data.contiguous()
        # its own broadcast views parameters as bytes, which fails for a scalar (0.19.8)
        with mock.patch.object(deepspeed.DeepSpeedEngine, "_broadcast_model"):
            try:
                self.engine, self.zero, _, _ = deepspeed.initialize(
                    model=objective, optimizer=build_optimizer(objective, config), config=settings
                )
            except pydantic.ValidationError as error:
                raise refusal(error, settings) from None
        self.call = self.engine
        # the torch optimiser that holds the moments: inside ZeRO's from stage 1 on
        self.optimizer = self.zero if self.stage == 0 else self.zero.optimizer
        self._start_ema()

    def _backward(self, total: Tensor) -> None:
        self.engine.backward(total)

    def _update(self, lr: float) -> Tensor:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if self.steps_unread:
            return self._stepped_unread()
        # filled on the device: DeepSpeed has read the norm, or its overflow, already
        return torch.full((), self._stepped(), device=self.device)

    def _stepped_unread(self) -> Tensor:
        """DeepSpeed's step of stages 1 and 2, and the gradient norm, which nobody waits for.

        DeepSpeed asks the device whether the norm is finite, and leaves the step out where it is
        not. Here the torch optimiser inside is told on the device, and leaves itself out: the
        partitions that are gathered afterwards are those of before.
        """
        norms: list[Tensor] = []

        def is_invalid(norm: Tensor) -> bool:
            norms.append(norm)
            self.optimizer.found_inf = (~torch.isfinite(norm)).float()
            return False

        def mask(norm: Tensor, device: object = None, val: float = -1.0) -> None:
            norm.masked_fill_(~torch.isfinite(norm), val)  # theirs copies the number from the host

        with mock.patch.multiple(
            self._stages_1_and_2,
            is_invalid_grad_norm=is_invalid,
            mask_nan_or_inf_with_val_inplace=mask,
        ):
            self.engine.step()
        if not norms:
            raise RuntimeError(
                f"DeepSpeed {metadata.version('deepspeed')} no longer asks whether a gradient norm "
                "is finite where it did: no bad step would be skipped; set train.engine=plain"
            )
        self._clamp_scales()
        return norms[0]

    def _stepped(self) -> float:
        """DeepSpeed's step; the gradient norm, NaN where DeepSpeed or we skipped it."""
        if self.stage == 0:
            # without ZeRO, DeepSpeed would apply a NaN gradient
            norm = torch.nn.utils.get_total_norm(
                [p.grad for p in self.parameters.values() if p.grad is not None]
            )
            if not norm < float("inf"):
                self.zero.zero_grad(set_to_none=True)
                return float("nan")
            self.engine.step()
        else:
            self.engine.step()
            if self.zero.overflow:
                return float("nan")
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
                held = self.zero.get_local_fp32_param(parameter)  # a copy where offloaded
                self.zero.set_local_hp_param(held.clamp(least, most), parameter)
            elif self.stage > 0 and parameter._hp_mapping is not None:
                parameter._hp_mapping.get_hp_fragment().clamp_(least, most)

    def _scale_values(self) -> dict[str, Tensor]:
        # after a skipped step nothing is gathered, after any other small parameters are
        stored = self.objective.model.scales.parameters()  # type: ignore[union-attr]
        is_whole = self.stage < 3 or all(parameter.numel() > 0 for parameter in stored)
        return super()._scale_values() if is_whole else {}

    def scales(self) -> dict[str, float]:
        if self._scale_values():
            return super().scales()
        stored = list(self.objective.model.scales.parameters())  # type: ignore[union-attr]
        with self._deepspeed.zero.GatheredParameters(stored):
            return super().scales()

    def _held(self) -> list[Tensor]:
        """Flat parts of the masters from stage 1 on."""
        if self.stage == 3:
            return self.zero.fp32_partitioned_groups_flat
        if self.stage == 0:
            return list(self.parameters.values())
        return self.zero.single_partition_of_fp32_groups

    def state(self, *, everywhere: bool = True) -> TrainingState:
        from deepspeed.utils import safe_get_full_optimizer_state

        if self.stage in (1, 2):
            # DeepSpeed links after the first group's first step, when the second has no state yet
            self._link_moments()
        held = self.optimizer.state.get(self._held()[0], {})
        steps = int(held["step"]) if held else 0
        keeps = everywhere or distributed.is_main()
        moments: dict[str, dict[str, Tensor]] = {key: {} for key in MOMENTS}
        for name, parameter in self.parameters.items():
            shape = getattr(parameter, "ds_shape", parameter.shape)
            for key in self.moments[name]:
                if not steps:
                    full = torch.zeros(shape)
                elif self.stage == 0:
                    full = self.optimizer.state[parameter][key]
                else:
                    full = safe_get_full_optimizer_state(parameter, key)
                if keeps:
                    moments[key][name] = full.view(shape).cpu()
        parameters: dict[str, Tensor] = {}
        with self._whole_parameters():
            if keeps:
                for name, parameter in self.objective.named_parameters():
                    parameters[name] = parameter.detach().cpu().clone()
        return TrainingState(
            parameters=parameters,
            moments=moments,
            buffers=self._buffers(),
            optimizer_steps=steps,
            ema=self._gather_ema(keeps),
        )

    def _gather_ema(self, keeps: bool) -> EMAState | None:
        """The average, whole and by name, where `keeps`; a collective call."""
        from deepspeed.utils import safe_get_full_fp32_param

        if self.ema is None:
            return None
        gathered: dict[str, Tensor] = {}
        with self.ema.swapped():
            for name, parameter in self.parameters.items():
                shape = getattr(parameter, "ds_shape", parameter.shape)
                full = parameter if self.stage == 0 else safe_get_full_fp32_param(parameter)
                if keeps:
                    gathered[name] = full.detach().view(shape).cpu().clone()
        return EMAState(gathered, self.ema.updates)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """By way of the host, twice 4 bytes a parameter there: a rank holds parts of the average,
        and needs whole weights."""
        assert self.ema is not None
        if self.stage == 0:
            with self.ema.swapped():
                yield
            return
        average = self._gather_ema(True)
        assert average is not None
        with self._whole_parameters():
            own = {name: p.detach().cpu().clone() for name, p in self.parameters.items()}
        self._put(average.parameters)
        try:
            yield
        finally:
            self._put(own)

    @torch.no_grad()
    def _put(self, weights: Mapping[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            self._set(parameter, weights[name], None)

    def _whole_parameters(self) -> Any:
        if self.stage < 3:
            return contextlib.nullcontext()
        return self._deepspeed.zero.GatheredParameters(list(self.objective.parameters()))

    def _seed_moments(self, steps: int) -> None:
        if self.stage == 0:
            return super()._seed_moments(steps)
        for partition in self._held():
            seed_moments(self.optimizer, partition, steps)
        if self.stage < 3:
            self._link_moments()

    def _link_moments(self) -> None:
        """Stages 1 and 2: parameters to the moments that there are now."""
        self.zero._hp_optimizer_states_linked = False
        self.zero._lazy_init_hp_params_optimizer_state()

    def _set(self, parameter: Any, value: Tensor, key: str | None) -> None:
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


def require_version() -> None:
    """Raises:  ConfigError for a DeepSpeed outside of DEEPSPEED_VERSIONS, naming both."""
    found = metadata.version("deepspeed")
    least, below = DEEPSPEED_VERSIONS
    if not least <= tuple(map(int, re.findall(r"\d+", found)[:3])) < below:
        wanted = NEEDED.removeprefix("deepspeed")
        raise ConfigError(
            f"DeepSpeed {found} is installed, ZeRO and the gradient cache need DeepSpeed {wanted}: "
            f"pip install '{NEEDED}', or set train.engine=plain train.zero_stage=0"
        )
