"""Bootstrap intervals of a figure over rows: reports, sentences, parts of a measurement."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

BOOTSTRAP = 1000


def share(hits: float, total: float) -> float:
    return hits / max(total, 1)


def with_interval(rows: np.ndarray, value: Callable[..., float], seed: int = 1) -> dict[str, Any]:
    """A figure over rows [reports, k] with its 95 % bootstrap interval over reports."""
    rng = np.random.default_rng(seed)
    draws = [value(*rows[rng.integers(0, len(rows), len(rows))].sum(0)) for _ in range(BOOTSTRAP)]
    low, high = np.percentile(draws, [2.5, 97.5])
    return {
        "value": round(float(value(*rows.sum(0))), 4),
        "low": round(float(low), 4),
        "high": round(float(high), 4),
    }
