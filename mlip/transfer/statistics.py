"""What the linker found in the evaluated reports, for the report page."""

from __future__ import annotations

from typing import Any

import numpy as np

from mlip.batch import ABSENT, PRESENT, UNCERTAIN
from mlip.transfer.interval import Array

MOST_SHOWN = 15


def knowledge_statistics(mentions: Array, reports: int, table: Any, linker: Any) -> dict[str, Any]:
    """Mentions [n, 2] (concept row, state) of the reports as counts, names and one sentence."""
    counts = np.zeros((len(table), 3), dtype=np.int64)
    np.add.at(counts, (mentions[:, 0], mentions[:, 1]), 1)
    total = counts.sum(axis=0)
    order = np.argsort(-counts.sum(axis=1), kind="stable")[:MOST_SHOWN]
    concepts = table.concepts
    top = [
        {
            "name": concepts[row].name,
            "present": int(counts[row, PRESENT]),
            "absent": int(counts[row, ABSENT]),
            "uncertain": int(counts[row, UNCERTAIN]),
        }
        for row in order.tolist()
        if counts[row].any()
    ]
    used = int((counts.sum(axis=1) > 0).sum())
    per_report = total.sum() / reports if reports else 0.0
    return {
        "sentence": f"{len(table):,} concepts in the table; {used:,} of them are mentioned in the "
        f"{reports:,} evaluated reports, {per_report:.1f} mentions a report. A finding that is "
        "denied is knowledge too, but never pulls an image towards it.",
        "facts": [
            ("concepts", f"{len(table):,}"),
            ("mentions present", f"{int(total[PRESENT]):,}"),
            ("mentions absent", f"{int(total[ABSENT]):,}"),
            ("mentions uncertain", f"{int(total[UNCERTAIN]):,}"),
            ("categories", f"{len(table.categories)}"),
            ("linker", type(linker).__name__ if linker is not None else "none"),
        ],
        "top": top,
    }
