"""A report as tokens and linked mentions, by sentence, kept by manifest row.

Batches of them are put together in batch.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlip.batch import STATES
from mlip.dataloading.reports.text import clean_report, sentence_spans
from mlip.dataloading.reports.tokenizer import ReportTokenizer

MAX_CACHE_BYTES = 256 * 1024 * 1024
_OBJECT_BYTES = 500  # of a kept report beside its numbers: four objects, its place by row


@dataclass(frozen=True)
class EncodedReport:
    """One report, tokenised and linked once; sentences are then only put together."""

    ids: NDArray[np.int32]  # [T] all sentences' tokens, no special tokens
    ends: NDArray[np.int32]  # [S] where each sentence's tokens end
    mentions: NDArray[np.int32]  # [M, 4] sentence, first token in it, concept row, state

    @property
    def nbytes(self) -> int:
        return self.ids.nbytes + self.ends.nbytes + self.mentions.nbytes + _OBJECT_BYTES


class ReportEncoder:
    """Text -> tokens and linked mentions, cached by manifest row (batches: batch.py).

    max_cache_bytes bounds the memory; beyond it reports are encoded at each visit.
    """

    def __init__(
        self,
        tokenizer: ReportTokenizer,
        linker: Any,
        table: Any,
        *,
        max_tokens: int,
        max_entities: int,
        max_cache_bytes: int = MAX_CACHE_BYTES,
    ) -> None:
        self.tokenizer, self.linker, self.table = tokenizer, linker, table
        self.max_tokens, self.max_entities = max_tokens, max_entities
        self._cache: dict[int, EncodedReport] = {}
        self._room = max_cache_bytes

    def encode(self, text: str) -> EncodedReport:
        """Tokens by sentence and mentions by sentence of one report."""
        text = clean_report(text)
        spans = sentence_spans(text)
        encodings = self.tokenizer.encode_batch([text[a:b] for a, b in spans]) if spans else []
        ids = [np.array(e.ids, dtype=np.int32) for e in encodings]
        mentions = []
        for mention in self.linker.link(text) if self.linker is not None and spans else ():
            sentence = next((i for i, (a, b) in enumerate(spans) if a <= mention.start < b), None)
            if sentence is None:
                continue
            inside = mention.start - spans[sentence][0]
            offsets = encodings[sentence].offsets
            token = next((j for j, (_, end) in enumerate(offsets) if end > inside), len(offsets))
            mentions.append(
                (sentence, token, self.table.index[mention.concept_id], STATES.index(mention.state))
            )
        return EncodedReport(
            ids=np.concatenate(ids) if ids else np.zeros(0, np.int32),
            ends=np.cumsum([len(i) for i in ids], dtype=np.int32),
            mentions=np.array(mentions, np.int32) if mentions else np.zeros((0, 4), np.int32),
        )

    def of_row(self, row: int, text_of: Callable[[int], str]) -> EncodedReport:
        """encode(text_of(row)), once per row."""
        report = self._cache.get(row)
        if report is None:
            report = self.encode(text_of(row))
            if self._room >= report.nbytes:
                self._room -= report.nbytes
                self._cache[row] = report
        return report
