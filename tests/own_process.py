"""For tests that call train.main in this process: import the fixture, and it runs around each."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from mlip.training import faults


@pytest.fixture(autouse=True)
def leave_the_process_as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A run owns its process: faults, ranks, random numbers (conftest.py: signals, logging)."""
    monkeypatch.setattr(faults, "_fired", set())
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with torch.random.fork_rng():
        yield
