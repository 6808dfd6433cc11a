"""A batch of reports against its oracle, one report at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mlip.dataloading.report_batch import compose_batch
from mlip.dataloading.reports import EncodedReport, ReportEncoder
from tests.dataloading.report_oracle import compose, kept_sentences


def random_report(rng: np.random.Generator) -> EncodedReport:
    """Any number of sentences, empty ones among them, and mentions that repeat themselves."""
    count = int(rng.choice([0, 1, 2, 3, 7, 47, 48, 49, 60]))
    lengths = rng.integers(0, 9, count)
    total = int(rng.integers(0, 12)) if count else 0
    mentions = np.zeros((total, 4), np.int32)
    if total:
        mentions[:, 0] = np.sort(rng.integers(0, count, total))
        mentions[:, 1] = rng.integers(0, 10, total)
        mentions[:, 2:] = rng.integers(0, [5, 3], (total, 2))
    ids = rng.integers(5, 90, int(lengths.sum())).astype(np.int32)
    return EncodedReport(ids, np.cumsum(lengths, dtype=np.int32), mentions)


@pytest.mark.parametrize("limits", [(64, 8), (20, 2), (3, 1), (2000, 100)])
def test_a_batch_is_its_reports_composed_one_by_one(tokenizer: Any, limits: tuple) -> None:
    rng = np.random.default_rng(limits[0])
    encoder = ReportEncoder(tokenizer, None, None, max_tokens=limits[0], max_entities=limits[1])
    for count in [0, 1, *rng.integers(1, 12, 60).tolist()]:
        reports = [random_report(rng) for _ in range(count)]
        draws = np.where(rng.random(count) < 0.4, -1.0, rng.random(count))
        made = compose_batch(encoder, reports, draws)
        pieces = [
            compose(encoder, report, kept_sentences(float(draw), len(report.ends)))
            for report, draw in zip(reports, draws, strict=True)
        ]
        assert made.token_ids.shape == (count, max((len(p.ids) for p in pieces), default=2))
        most = max((len(p.entities) for p in pieces), default=0)
        assert made.entities.shape == (count, max(1, most), 2)
        for i, piece in enumerate(pieces):
            length, found = len(piece.ids), len(piece.entities)
            assert made.token_ids[i, :length].tolist() == piece.ids.tolist()
            assert (made.token_ids[i, length:] == tokenizer.pad_id).all()
            assert np.flatnonzero(made.token_mask[i]).tolist() == list(range(length))
            assert np.flatnonzero(made.content_mask[i]).tolist() == list(range(1, length - 1))
            assert made.entities[i, :found].tolist() == piece.entities.tolist()
            assert (made.entities[i, found:] == 0).all()
            assert np.flatnonzero(made.entity_mask[i]).tolist() == list(range(found))


def test_draws_at_the_ends_of_their_range_keep_what_kept_sentences_keeps(tokenizer: Any) -> None:
    encoder = ReportEncoder(tokenizer, None, None, max_tokens=500, max_entities=1)
    draws = np.array([2.0**-54, 1 - 2.0**-53, 0.5, 1 / 3, -1.0])
    for sentences in (1, 2, 31, 32, 47, 48, 49, 80):
        report = EncodedReport(
            np.arange(5, 5 + sentences, dtype=np.int32),
            np.arange(1, sentences + 1, dtype=np.int32),
            np.zeros((0, 4), np.int32),
        )
        made = compose_batch(encoder, [report] * len(draws), draws)
        for i, draw in enumerate(draws.tolist()):
            keep = kept_sentences(draw, sentences)
            expected = report.ids if keep is None else report.ids[keep]
            assert made.token_ids[i, made.content_mask[i]].tolist() == expected.tolist()
