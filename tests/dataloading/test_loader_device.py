"""The loader's thread on a machine with several GPUs: all it does is on its rank's own.

Oracle: the order of entering and leaving the device, which stand-ins note.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from mlip.dataloading import loader as loader_module
from mlip.settings.config import Config


def test_a_batch_is_made_and_pinned_on_the_rank_s_own_gpu(
    corpus: Callable[..., Config], build: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread begins on GPU 0: a stream that DALI's images are copied on would be left for it, and
    every rank would hold a context there."""
    done: list[Any] = []

    @contextlib.contextmanager
    def on(device: int) -> Iterator[None]:
        done.append(("enter", device))
        yield
        done.append(("leave", device))

    loader = build(corpus())
    load = loader.pipeline.load
    monkeypatch.setattr(torch.cuda, "device", on)
    monkeypatch.setattr(loader.pipeline, "load", lambda plan: done.append("load") or load(plan))
    monkeypatch.setattr(loader_module, "pinned", lambda batch: done.append("pin") or batch)
    loader.make(0)
    assert done == ["load"] or torch.cuda.is_available()
    done.clear()
    monkeypatch.setattr(loader, "_gpu", 3)
    batch, images, plan = loader.make(0)
    assert done == [("enter", 3), "load", "pin", ("leave", 3)]
    assert len(batch) == len(images.kept) == len(plan)
