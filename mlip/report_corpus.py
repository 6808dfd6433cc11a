"""What the report says of the data: where every row went, and what the linker found in texts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from mlip.report_charts import BLUE, ORANGE, PALETTE, RULE, stacked_bar


def ledger_context(ledger: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Ledger.summary() as shares of the manifest's rows, first finished epoch."""
    if not ledger or not ledger.get("rows"):
        return None
    rows = int(ledger["rows"])
    excluded = sum(ledger.get("excluded", {}).values())
    quarantined = sum(ledger.get("quarantined_rows", {}).values())
    parts = [("Trained", rows - excluded - quarantined, BLUE)]
    for name, count in sorted(ledger.get("quarantined_rows", {}).items()):
        parts.append((f"Quarantined: {name.replace('_', ' ')}", count, ORANGE))
    greys = ("#9aa5b0", "#b7c0c8", "#ccd3d9", RULE)
    for i, (name, count) in enumerate(sorted(ledger.get("excluded", {}).items())):
        parts.append((f"Excluded: {name.replace('_', ' ')}", count, greys[min(i, 3)]))
    epochs = ledger.get("epochs", {})
    visited = sum(e.get("trained", 0) for e in epochs.values())
    return {
        "sentence": f"{rows:,} rows in the manifest = trained + quarantined for a reason + "
        f"excluded by a rule. {visited:,} visits over {len(epochs)} "
        f"epoch{'s' if len(epochs) != 1 else ''}.",
        "bar": stacked_bar(parts),
        "parts": [
            {"name": n, "count": c, "colour": colour, "share": c / rows} for n, c, colour in parts
        ],
    }


def knowledge_context(results: Mapping[str, Any]) -> dict[str, Any] | None:
    found = results.get("knowledge")
    if not found:
        return None
    most = max(
        (sum(t[s] for s in ("present", "absent", "uncertain")) for t in found["top"]), default=1
    )
    top = []
    for entry in found["top"]:
        counts = [("present", entry["present"], BLUE), ("absent", entry["absent"], "#b7c0c8")]
        counts.append(("uncertain", entry["uncertain"], PALETTE[5]))
        rest = most - sum(c for _, c, _ in counts)
        top.append({**entry, "bar": stacked_bar([*counts, ("", rest, "transparent")], width=300)})
    swatch = '<span class="swatch" style="background:{}"></span>{}&ensp;'
    return {
        "sentence": found["sentence"],
        "facts": found["facts"],
        "top": top,
        "legend": Markup(
            swatch.format(BLUE, "present")
            + swatch.format("#b7c0c8", "absent")
            + swatch.format(PALETTE[5], "uncertain")
        ),
    }
