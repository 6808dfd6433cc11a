"""For tests that call train.main in this process: import the fixture, and it runs around each."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch

from mlip.training import faults


@pytest.fixture(autouse=True)
def leave_the_process_as_it_was(
    monkeypatch: pytest.MonkeyPatch, own_signals: None
) -> Iterator[None]:
    """A run owns its process: signals, threads, logging, random numbers."""
    threads, logger = torch.get_num_threads(), logging.getLogger("mlip")
    handlers, level, propagate = logger.handlers[:], logger.level, logger.propagate
    monkeypatch.setattr(faults, "_fired", set())
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with torch.random.fork_rng():
        yield
    torch.set_num_threads(threads)
    logger.handlers[:], logger.propagate = handlers, propagate
    logger.setLevel(level)
