"""What the linker found in the evaluated reports, and which training pairs are no negatives."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from mlip.batch import ABSENT, PRESENT, UNCERTAIN
from mlip.dataloading.loader import pair_ids_by_concepts
from mlip.dataloading.manifest import Manifest
from mlip.knowledge.linker import FEW_KNOWN_WORDS
from mlip.knowledge.merging import LICENSED_SOURCES
from mlip.settings.config import Config
from mlip.transfer.alignment.prompts import phrase_encoder
from mlip.transfer.array import Array

MOST_SHOWN = 15


def knowledge_statistics(
    mentions: Array,
    reports: int,
    table: Any,
    linker: Any,
    texts: Iterable[str],
    most: int,
) -> dict[str, Any]:
    """Mentions [n, 3] (concept row, state, report) as counts, names and one sentence.

    texts    the reports, to count those whose words the lexicon hardly knows
    most     data.max_entities, to count the reports that may have had more
    A concept whose name is licensed is called by its id: the page may travel.
    """
    counts = np.zeros((len(table), 3), dtype=np.int64)
    np.add.at(counts, (mentions[:, 0], mentions[:, 1]), 1)
    total = counts.sum(axis=0)
    order = np.argsort(-counts.sum(axis=1), kind="stable")[:MOST_SHOWN]
    concepts = table.concepts
    top = [
        {
            "name": concepts[row].id
            if concepts[row].source in LICENSED_SOURCES
            else concepts[row].name,
            "present": int(counts[row, PRESENT]),
            "absent": int(counts[row, ABSENT]),
            "uncertain": int(counts[row, UNCERTAIN]),
        }
        for row in order.tolist()
        if counts[row].any()
    ]
    full = int((np.unique(mentions[:, 2], return_counts=True)[1] >= most).sum())
    known = [linker.known_words(text) for text in texts]
    few = sum(hits < FEW_KNOWN_WORDS * words for hits, words in known if words)
    used = int((counts.sum(axis=1) > 0).sum())
    per_report = total.sum() / reports if reports else 0.0
    facts = [
        ("concepts", f"{len(table):,}"),
        ("mentions present", f"{int(total[PRESENT]):,}"),
        ("mentions absent", f"{int(total[ABSENT]):,}"),
        ("mentions uncertain", f"{int(total[UNCERTAIN]):,}"),
        ("reports without a mention", f"{reports - len(np.unique(mentions[:, 2])):,}"),
        ("reports of few known words", f"{few:,}"),
        (f"reports that fill data.max_entities ({most})", f"{full:,}"),
        ("categories", f"{len(table.categories)}"),
    ]
    return {
        "sentence": f"{len(table):,} concepts in the table; {used:,} of them are mentioned in the "
        f"{reports:,} evaluated reports, {per_report:.1f} mentions a report. A finding that is "
        "denied is knowledge too, but never pulls an image towards it.",
        "facts": facts,
        "top": top,
    }


def pair_statistics(
    config: Config, manifest: Manifest, tokenizer: Any, linker: Any, table: Any
) -> dict[str, Any]:
    """How many training pairs are never each other's negatives, and why.

    Returns: {"pairs", "by_text_or_study", "by_concepts" (None where the option is off),
             "batch_pairs"}; each count {"groups", "pairs_in_groups", "largest",
             "left_out_of_batch": expected share of a batch's ordered pairs that leave the
             negatives, for batches drawn without replacement}
    """
    rows = manifest.rows("train")
    by_concepts = None
    if config.knowledge.pair_id_by_concepts and len(rows):
        encoder = phrase_encoder(config, tokenizer, linker, table)
        by_concepts = _groups(pair_ids_by_concepts(manifest, rows, encoder)[rows])
    return {
        "pairs": len(rows),
        "batch_pairs": config.batch.global_pairs,
        "by_text_or_study": _groups(manifest.pair_id[rows]),
        "by_concepts": by_concepts,
    }


def _groups(pair_id: Array) -> dict[str, Any]:
    sizes = np.unique(pair_id, return_counts=True)[1].astype(np.int64)
    shared, total = sizes[sizes > 1], len(pair_id)
    # drawn without replacement, two places of a batch hold any two rows alike often
    left_out = float((sizes * (sizes - 1)).sum() / (total * (total - 1))) if total > 1 else 0.0
    return {
        "groups": len(shared),
        "pairs_in_groups": int(shared.sum()),
        "largest": int(sizes.max(initial=0)),
        "left_out_of_batch": left_out,
    }
