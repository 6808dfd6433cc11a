"""How fast the linker starts and links, on one core, in processor time."""

from __future__ import annotations

import itertools
import time
from typing import Any

import numpy as np

from benchmarks.intervals import with_interval
from benchmarks.linker_reports import Report
from mlip.knowledge.concept_files import load_concepts
from mlip.knowledge.concepts import Concept, ConceptTable
from mlip.knowledge.linker import Linker

SPEED_PARTS = 48
_SYLLABLES = [a + b for a in "bcdfghklmnprstv" for b in "aeiou"][:60]


def speed(reports: list[Report], linker: Linker, repeats: int = 5) -> dict[str, Any]:
    """Reports a second of one core by processor time: the median of the repeats of each part."""
    parts = [p for p in np.array_split(np.arange(len(reports)), SPEED_PARTS) if len(p)]
    seconds = np.zeros((repeats, len(parts)))
    for repeat in range(repeats):
        for column, part in enumerate(parts):
            texts = [reports[i].text for i in part]
            start = time.process_time()
            for text in texts:
                linker.link(text)
            seconds[repeat, column] = time.process_time() - start
    sizes = np.array([len(p) for p in parts])
    rows = np.stack([sizes, np.median(seconds, axis=0)], axis=1)
    return {
        "reports": len(reports),
        "mean_characters": round(sum(len(r.text) for r in reports) / len(reports), 1),
        "best_per_s": round(len(reports) / seconds.sum(1).min()),
        "per_s": {
            key: round(value)
            for key, value in with_interval(rows, lambda n, s: n / max(s, 1e-9)).items()
        },
    }


def startup(repeats: int = 9) -> dict[str, float]:
    """Seconds of processor time to read the lexicon and build the automaton, nothing cached."""
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        Linker(load_concepts(None))
        seconds.append(time.process_time() - start)
    low, middle, high = np.percentile(seconds, [0, 50, 100])
    return {"value": round(middle, 3), "low": round(low, 3), "high": round(high, 3)}


def padded(table: ConceptTable, forms: int) -> ConceptTable:
    """The table with made-up terms of two to four words beside it, the size of a UMLS subset."""
    rng = np.random.default_rng(1)
    words = ["".join(p) for p in itertools.product(_SYLLABLES, repeat=3)]
    common = ["lung", "chest", "left", "right", "acute", "disease", "heart", "of", "the", "pleural"]
    sizes = rng.integers(1, 4, forms)
    picks = rng.integers(0, len(words), (forms, 3))
    extra = []
    for row in range(forms):
        chosen = [words[i] for i in picks[row, : sizes[row]]]
        chosen.insert(row % (len(chosen) + 1), common[row % len(common)])
        extra.append(Concept(id=f"x{row}", name=" ".join(chosen), category="made_up"))
    return ConceptTable([*table, *extra])
