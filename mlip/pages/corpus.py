"""What the report says of the data: where every row went, and what the linker found in texts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from mlip.pages.charts import BLUE, GREY, ORANGE, RULE, stacked_bar


def ledger_context(ledger: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Ledger.summary() as shares of the manifest's rows, by the first epoch."""
    if not ledger or not ledger.get("rows"):
        return None
    rows = int(ledger["rows"])
    excluded = sum(ledger.get("excluded", {}).values())
    quarantined = sum(ledger.get("quarantined_rows", {}).values())
    epochs = ledger.get("epochs", {})
    first = epochs.get("0", {})
    reachable = rows - excluded - quarantined
    trained = first["trained"] if first.get("ahead") else reachable
    parts = [("Trained", trained, BLUE)]
    if trained < reachable:
        parts.append(("Not reached yet", reachable - trained, RULE))
    for name, count in sorted(ledger.get("quarantined_rows", {}).items()):
        parts.append((f"Quarantined: {name.replace('_', ' ')}", count, ORANGE))
    greys = (GREY, "#a3adb7", "#bcc4cb", RULE)
    for i, (name, count) in enumerate(sorted(ledger.get("excluded", {}).items())):
        parts.append((f"Excluded: {name.replace('_', ' ')}", count, greys[min(i, 3)]))
    visited = sum(e.get("trained", 0) for e in epochs.values())
    return {
        "sentence": f"{rows:,} rows in the manifest = trained + quarantined for a reason + "
        f"excluded by a rule{' + not reached yet' if trained < reachable else ''}. "
        f"{visited:,} visits over {len(epochs)} epoch{'s' if len(epochs) != 1 else ''}.",
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
        counts = [("present", entry["present"], BLUE), ("absent", entry["absent"], GREY)]
        counts.append(("uncertain", entry["uncertain"], ORANGE))
        rest = most - sum(c for _, c, _ in counts)
        top.append({**entry, "bar": stacked_bar([*counts, ("", rest, "transparent")], width=300)})
    lined_up, pairs = results.get("prototypes", {}), results.get("pairs", {})
    swatch = '<span class="swatch" style="background:{}"></span>{}&ensp;'
    return {
        "sentence": found["sentence"],
        "facts": found["facts"],
        "top": top,
        "prototypes": _prototype_rows(lined_up),
        "prototype_sentence": _prototype_sentence(lined_up),
        "pair_sentence": _pair_sentence(pairs),
        "legend": Markup(
            swatch.format(BLUE, "present")
            + swatch.format(GREY, "absent")
            + swatch.format(ORANGE, "uncertain")
        ),
    }


def _prototype_rows(lined_up: Mapping[str, Any]) -> list[dict[str, str]]:
    rows = []
    for view, found in lined_up.get("views", {}).items():
        row = {"view": view, "used": f"{found['prototypes_used']:,}"}
        for score in ("purity", "nmi"):
            row[score] = f"{found[score]['value']:.2f}"
            row[f"{score}_chance"] = f"{found[f'{score}_chance']:.2f}"
        rows.append(row)
    return rows


def _prototype_sentence(lined_up: Mapping[str, Any]) -> str:
    if "reason" in lined_up:
        return f"Prototypes against categories: {lined_up['reason']}."
    if not lined_up.get("views"):
        return ""
    categories = ", ".join(f"{name} {count:,}" for name, count in lined_up["categories"].items())
    reason = next(iter(lined_up["views"].values()))["purity"]["reason"]
    return (
        f"Each of {lined_up['reports']:,} reports with a present finding belongs to the category "
        f"most of them fall in ({categories}) and to the nearest of {lined_up['prototypes']:,} "
        "prototypes. Purity is the share of reports in the main category of their prototype; NMI "
        "is the normalised mutual information. Chance is the same with shuffled categories. No "
        f"interval: {reason}."
    )


def _pair_sentence(pairs: Mapping[str, Any]) -> str:
    if not pairs.get("pairs"):
        return ""

    def counted(found: Mapping[str, Any]) -> str:
        return (
            f"{found['pairs_in_groups']:,} of them in {found['groups']:,} groups, the largest of "
            f"{found['largest']:,}; {100 * found['left_out_of_batch']:.2g} % of the other pairs of "
            f"a batch are no negatives"
        )

    text = (
        f"False negatives: {pairs['pairs']:,} training pairs; equal text or the same study make "
        f"{counted(pairs['by_text_or_study'])}."
    )
    if pairs.get("by_concepts") is None:
        return (
            f"{text} Equal sets of present concepts are not joined (knowledge.pair_id_by_concepts)."
        )
    return f"{text} With equal sets of present concepts: {counted(pairs['by_concepts'])}."
