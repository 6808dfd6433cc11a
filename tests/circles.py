"""Finds what only Python's collector of circles would free, and when it comes nobody knows.

A circle of references keeps its tensors until the collector comes. What has outlived two of its
young passes waits for a full one: until a quarter as many new objects live as old ones, and those
of torch and transformers alone are 600,000.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor  # of torch.compile: without memory

ROUNDS = 3  # what a thread or a library of an earlier test leaves is not there in each of them


def tensors_in_circles(call: Callable[[], Any]) -> list[str]:
    """Shapes of the tensors that every run of `call` leaves in circles, but for its first.

    A first run makes what stays for good (caches, states) and may leave a circle of its own.
    """
    call()
    left: list[str] = []
    for _ in range(ROUNDS):
        left = _left_by(call)
        if not left:
            break
    return left


def _left_by(call: Callable[[], Any]) -> list[str]:
    gc.collect()
    gc.disable()
    try:
        call()
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        return [
            f"{type(found).__name__} {list(found.shape)}"
            for found in gc.garbage
            if issubclass(type(found), torch.Tensor) and type(found) is not FakeTensor
        ]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
        gc.collect()
