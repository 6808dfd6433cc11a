"""What compose_batch makes of each report, written one report and one sentence at a time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mlip.dataloading.reports.batch import MAX_SUBSET_BITS
from mlip.dataloading.reports.encoder import EncodedReport, ReportEncoder


@dataclass(frozen=True)
class Pieces:
    """What a batch takes from one report."""

    ids: NDArray[np.int32]  # [T] with [CLS] and [SEP]
    entities: NDArray[np.int32]  # [K, 2] concept row and state, each pair once, in text order


def compose(
    encoder: ReportEncoder, report: EncodedReport, keep: NDArray[np.bool_] | None = None
) -> Pieces:
    """Token ids and entities of the kept sentences, cut to the limits.

    A mention whose first token is cut off leaves with it.
    """
    room = encoder.max_tokens - 2
    start = 0
    parts: list[NDArray[np.int32]] = []
    begins: dict[int, tuple[int, int]] = {}
    used = 0
    for sentence, end in enumerate(report.ends.tolist()):
        if (keep is None or keep[sentence]) and used < room:
            part = report.ids[start : min(end, start + room - used)]
            begins[sentence] = (used, len(part))
            parts.append(part)
            used += len(part)
        start = end
    ids = np.empty(used + 2, dtype=np.int32)
    ids[0], ids[-1] = encoder.tokenizer.cls_id, encoder.tokenizer.sep_id
    if parts:
        np.concatenate(parts, out=ids[1:-1])
    pairs: dict[tuple[int, int], None] = {}
    for sentence, token, concept, state in report.mentions.tolist():
        if sentence in begins and token < begins[sentence][1]:
            pairs[concept, state] = None
    entities = np.array(list(pairs)[: encoder.max_entities], dtype=np.int32).reshape(-1, 2)
    return Pieces(ids, entities)


def kept_sentences(draw: float, sentences: int) -> NDArray[np.bool_] | None:
    """A uniformly chosen non-empty subset of the sentences; None = all of them.

    Sentences beyond the 48th are always kept: they are past the token limit in practice.
    """
    if draw < 0.0 or sentences < 2:
        return None
    bits = min(sentences, MAX_SUBSET_BITS)
    subset = 1 + int(draw * ((1 << bits) - 1))
    keep = np.ones(sentences, dtype=bool)
    keep[:bits] = [(subset >> i) & 1 for i in range(bits)]
    return keep
