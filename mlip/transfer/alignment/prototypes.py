"""How the category level's prototypes line up with the categories of concepts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlip.batch import PRESENT
from mlip.knowledge.categories import category_index, prototype_alignment, report_category
from mlip.transfer.array import Array
from mlip.transfer.measures.interval import Estimate
from mlip.unit_length import unit_length

_SHUFFLES = 20
# pages put "no interval" before it
NO_INTERVAL = "a report drawn twice agrees with itself, so all resamples lie above the value"


def prototype_statistics(
    prototypes: Tensor | None,
    views: Mapping[str, tuple[Tensor, Array]],
    mentions: Array,
    reports: int,
    table: Any,
    seed: int,
) -> dict[str, Any]:
    """Purity and normalised mutual information of nearest prototype and report category.

    A report's category is the one most of its present concepts but anatomy fall in; reports without
    any are left out. Many prototypes on few reports line up by chance alone: `chance` is the mean
    over shuffled categories. There is no interval: in a bootstrap the same report stands twice in
    its prototype, and with four reports a prototype all resamples lie above the value.

    Shapes:  prototypes [C, D]; views name -> (vectors [N, D], usable [N] bool); mentions [n, 3]
             (concept row, state, report); reports = N
    Returns: {"prototypes", "reports", "categories": {name: reports}, "views": {name: {"purity",
             "nmi": Estimate, "purity_chance", "nmi_chance", "prototypes_used"}}} or {"reason"}
    Source:  purity and mutual information as in knowledge.categories; chance ours
    """
    if prototypes is None:
        return {
            "reason": "the checkpoint holds no prototypes (loss.category.weight is 0, or export)"
        }
    is_finding = torch.tensor([c.semantic_type != "anatomy" for c in table])
    index = category_index(table)
    present: list[list[int]] = [[] for _ in range(reports)]
    for row, state, report in mentions.tolist():
        if state == PRESENT:
            present[report].append(row)
    category = np.array([report_category(sorted(set(p)), index, is_finding) for p in present])
    found, count = np.unique(category[category >= 0], return_counts=True)
    names = {table.categories[c]: int(n) for c, n in zip(found, count, strict=True)}
    result: dict[str, Any] = {
        "prototypes": len(prototypes),
        "reports": int((category >= 0).sum()),
        "categories": dict(sorted(names.items(), key=lambda item: -item[1])),
        "views": {},
    }
    centres = unit_length(prototypes.detach().float().cpu())
    for name, (vectors, usable) in views.items():
        kept = np.flatnonzero((category >= 0) & usable)
        if len(kept) == 0:
            continue
        nearest = (unit_length(vectors[torch.as_tensor(kept)]) @ centres.T).argmax(dim=1).numpy()
        result["views"][name] = _lined_up(nearest, category[kept], seed)
    return result


def _lined_up(nearest: Array, category: Array, seed: int) -> dict[str, Any]:
    def both(labels: Array) -> tuple[float, float]:
        found = prototype_alignment(torch.as_tensor(nearest), torch.as_tensor(labels))
        return found["purity"], found["nmi"]

    def alone(value: float) -> Estimate:
        return {"value": value, "low": None, "high": None, "n": len(nearest), "reason": NO_INTERVAL}

    purity, nmi = both(category)
    generator = np.random.default_rng(seed)
    chance = np.mean([both(generator.permutation(category)) for _ in range(_SHUFFLES)], axis=0)
    return {
        "purity": alone(purity),
        "nmi": alone(nmi),
        "purity_chance": float(chance[0]),
        "nmi_chance": float(chance[1]),
        "prototypes_used": len(np.unique(nearest)),
    }
