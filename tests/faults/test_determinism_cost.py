"""What run.deterministic costs a step on a CPU, where a run repeats to the bit without it too.

Oracle: the same step of the demo's model without torch's switch, in turn with it in one process, by
processor time, which what else the machine does changes little and for both alike. As a script it
measures, in a process of its own, as a run has one: one thread, freed memory kept.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks.step_batch import made_batch
from mlip.knowledge.concept_files import load_concepts
from mlip.knowledge.vectors import knowledge_vectors
from mlip.model import MLIPModel
from mlip.objective import Objective
from mlip.settings.config import load
from mlip.training.allocator import keep_freed_memory
from mlip.training.determinism import require_deterministic
from mlip.training.engine import build_engine

ROOT = Path(__file__).resolve().parents[2]
ROUNDS, MOST = 40, 0.05
VOCABULARY = 2000


def cost() -> float:
    """By how much of itself a step grows: of the quickest quarter of ROUNDS each way."""
    keep_freed_memory()
    # a second thread waits for work by spinning, which counts as processor time
    torch.set_num_threads(1)
    config = load([str(ROOT / "configs" / "demo.yaml")], ["run.deterministic=true"])
    table = load_concepts()
    torch.manual_seed(0)
    vectors = knowledge_vectors(table, config.knowledge)
    model = MLIPModel(config, vocab_size=VOCABULARY, concept_vectors=vectors)
    engine = build_engine(Objective(config, model), config)
    batch = made_batch(config, 32, vocab_size=VOCABULARY, concepts=len(table))
    took: dict[bool, list[float]] = {False: [], True: []}
    for number in range(ROUNDS + 1):
        for switched in (number % 2 == 0, number % 2 == 1):
            torch.use_deterministic_algorithms(False)
            if switched:
                require_deterministic(config)
            begin = time.process_time()
            engine.start_step(batch, step=number, progress=0.5, lr=1e-4).result()
            took[switched].append(time.process_time() - begin)
    # the first ones warm up; a core's other hyperthread can only slow a step down
    quick = {key: statistics.mean(sorted(times[1:])[: ROUNDS // 4]) for key, times in took.items()}
    return quick[True] / quick[False] - 1.0


@pytest.mark.long
def test_the_switch_costs_a_step_of_the_demo_at_most_a_twentieth(
    record_property: Callable[[str, object], None],
) -> None:
    measured = subprocess.run(
        [sys.executable, __file__],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    grown = float(measured.stdout.split()[-1])
    record_property("cost", grown)
    assert grown <= MOST


if __name__ == "__main__":
    print(cost())
