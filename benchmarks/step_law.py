"""How a step's time and memory grow with the batch: a + b B + c B^2, fitted to measured rows.

Relative residuals are what is least squared: else the largest batch alone would decide. Plain and
cached steps are fitted apart, since a cached step runs the towers' forward pass twice.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Row = dict[str, Any]
_COLUMNS = {"step_ms": "ms", "peak_gib": "GiB"}
_LEAST_ROWS = 4  # three coefficients and one row to contradict them


def fit(pairs: list[int], values: list[float]) -> tuple[list[float], float]:
    """([a, b, c], largest relative residual)."""
    size, value = np.array(pairs, dtype=float), np.array(values, dtype=float)
    design = np.stack([np.ones_like(size), size, size**2], axis=1)
    made, *_ = np.linalg.lstsq(design / value[:, None], np.ones_like(value), rcond=None)
    return made.tolist(), float(np.abs(design @ made / value - 1.0).max())


def laws(rows: list[Row]) -> list[Row]:
    """One row for time and for memory, of plain and of cached steps, where there are enough."""
    made: list[Row] = []
    for is_cached in (False, True):
        kept = {
            row["pairs"]: row
            for row in rows
            if row.get("kind") in ("batch", "scaling")
            and row["status"] == "ok"
            and (row["micro"] > 0) == is_cached
        }
        for column, unit in _COLUMNS.items():
            known = {pairs: row[column] for pairs, row in kept.items() if column in row}
            if len(known) < _LEAST_ROWS:
                continue
            coefficients, worst = fit(list(known), list(known.values()))
            made.append(
                {
                    "kind": "law",
                    "of": column,
                    "unit": unit,
                    "is_cached": is_cached,
                    "sizes": sorted(known),
                    "coefficients": coefficients,
                    "largest_residual": worst,
                }
            )
    return made


def as_text(law: Row) -> str:
    """The law as one reads it: 12 + 0.61 B + 2.1e-05 B^2 ms, within 3 %."""
    a, b, c = law["coefficients"]
    worst = 100 * law["largest_residual"]
    return f"{a:.3g} {b:+.3g} B {c:+.3g} B^2 {law['unit']}, within {worst:.0f} %"
