"""Whether towers multiply in bfloat16: by train.precision, and by what the device can."""

from __future__ import annotations

import platform
from functools import lru_cache

import torch

_X86 = ("x86_64", "amd64")


@lru_cache
def multiplies_bf16(device: torch.device) -> bool:
    """Whether the device has products of bfloat16: NVIDIA GPUs from 8.0 on, processors made for it.

    Of x86 those with AVX512-BF16 or AMX. With AVX512 alone torch says that it can and widens every
    number first: a product of 1,024 x 1,024 matrices took 4.6 times as long as in float32 on an
    Intel Xeon (Ice Lake), and 84 times on an AMD EPYC with AVX2, number by number.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        # a torch without this library multiplies it number by number on any processor
        if not torch.backends.mkldnn.is_available():
            return False
        if platform.machine().lower() in _X86:
            return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return True


def takes_bf16(precision: str, device: torch.device, *, is_training: bool) -> bool:
    """Whether a pass is one of bfloat16.

    precision  "auto": where the device multiplies it. "bf16": in training wherever asked for; but
               a trained model is used in float32 where that is what the device is made for.
    """
    if precision == "bf16" and is_training:
        return True
    return precision != "fp32" and multiplies_bf16(device)


def precision_on(precision: str, device: torch.device, *, is_training: bool = True) -> str:
    """What a training, or the use of a trained model, takes on this device: "bf16" or "fp32"."""
    return "bf16" if takes_bf16(precision, device, is_training=is_training) else "fp32"


def why_not_as_asked(precision: str, device: torch.device) -> str:
    """What is to be said at the start of a training; "" where all is as asked for."""
    if precision == "fp32" or multiplies_bf16(device):
        return ""
    what = "processor" if device.type == "cpu" else "GPU"
    if precision == "auto":
        return f"train.precision=auto takes fp32: this {what} has no products of bfloat16"
    return (
        f"train.precision=bf16: this {what} has no products of bfloat16, which can take many times "
        "as long as float32; set train.precision=auto"
    )
