"""Shared by all tests: offline, one thread, and memory that was never written shows as NaN."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import signal

# before any library reads them
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mlip.system.machine import usable_cores, usable_memory

_MEMORY_A_PROCESS = 3 << 30  # bytes; 1.9 GiB was the most that one of two took
_STOP = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
ROOT = Path(__file__).resolve().parent.parent
SHARED_DATA = ROOT.parent / "shared" / "data"


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)
    # it notes torch's functions when imported: before a fixture below replaces two of them
    with contextlib.suppress(ImportError):
        importlib.import_module("torch._dynamo")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Processes of `make test`: one a core, of those that the memory is enough for."""
    return max(1, min(usable_cores(), usable_memory() // _MEMORY_A_PROCESS))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, Any, Any]:
    """A run owns its process, also one that a fixture makes for a whole file: signals, threads and
    logging are for the next test what they were."""
    signals, threads = {n: signal.getsignal(n) for n in _STOP}, torch.get_num_threads()
    logger = logging.getLogger("mlip")
    handlers, level, propagate = logger.handlers[:], logger.level, logger.propagate
    try:
        return (yield)
    finally:
        for number, handler in signals.items():
            signal.signal(number, handler)
        torch.set_num_threads(threads)
        logger.handlers[:], logger.propagate = handlers, propagate
        logger.setLevel(level)


@pytest.fixture(autouse=True)
def _poison_unwritten_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch.empty, empty_like and a tensor's new_empty give NaN when called from mlip.kernels.

    A kernel that leaves part of its output unwritten then fails instead of passing by luck.
    """
    plain_empty, plain_empty_like = torch.empty, torch.empty_like
    plain_new_empty = torch.Tensor.new_empty

    def from_kernels() -> bool:
        return sys._getframe(2).f_globals.get("__name__", "").startswith("mlip.kernels")

    def poison(made: torch.Tensor) -> torch.Tensor:
        return made.fill_(torch.nan) if made.is_floating_point() else made

    def empty(*args: Any, **kwargs: Any) -> torch.Tensor:
        made = plain_empty(*args, **kwargs)
        return poison(made) if from_kernels() else made

    def empty_like(*args: Any, **kwargs: Any) -> torch.Tensor:
        made = plain_empty_like(*args, **kwargs)
        return poison(made) if from_kernels() else made

    def new_empty(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        made = plain_new_empty(self, *args, **kwargs)
        return poison(made) if from_kernels() else made

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch, "empty_like", empty_like)
    yield


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real X-rays and reports beside the checkout; skips where it is absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip("no folder ../shared/data beside this checkout: real X-rays are absent")
    return SHARED_DATA
