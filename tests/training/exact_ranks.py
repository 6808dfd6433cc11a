"""What one rank does in the proof: every case of a list, in one process, results on disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from mlip.ranks import distributed, process_group
from tests.training.exact_step import exact_engine, loss_and_gradients

Case = tuple[str, int, int, int]  # engine, ZeRO stage, passes a rank, pairs of the global batch


def name_of(case: Case) -> str:
    engine, stage, passes, pairs = case
    return f"{engine}-zero{stage}-passes{passes}-pairs{pairs}"


def run_cases(cases: Sequence[Case], folder: str) -> None:
    """Loss and gradients of each case; rank 0 writes <folder>/<case>.pt."""
    process_group.start(60.0)
    for case in cases:
        engine, stage, passes, pairs = case
        found = loss_and_gradients(
            exact_engine(pairs, engine=engine, stage=stage, passes=passes), pairs
        )
        if distributed.is_main():
            torch.save(found, Path(folder) / f"{name_of(case)}.pt")
    distributed.barrier()
