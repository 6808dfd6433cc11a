"""A batch of reports against its oracle, one report at a time, and sentence dropout."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mlip.dataloading.reports.batch import compose_batch, draw_sentences
from mlip.dataloading.reports.encoder import EncodedReport, ReportEncoder
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


def kept(draws: np.ndarray, sentences: int) -> np.ndarray:
    """[B, sentences] bool: which sentences of a report a batch keeps by each draw."""
    ids = np.arange(sentences, dtype=np.int32)
    report = EncodedReport(ids, ids + 1, np.zeros((0, 4), np.int32))
    special: Any = SimpleNamespace(pad_id=-1, cls_id=-1, sep_id=-1)
    encoder = ReportEncoder(special, None, None, max_tokens=500, max_entities=1)
    token_ids = compose_batch(encoder, [report] * len(draws), draws).token_ids
    return (token_ids[:, :, None] == ids).any(axis=1)


def test_subsets_are_uniform_over_the_non_empty_ones() -> None:
    # 7 subsets of 3 sentences, 70,000 draws: chi-square, 99.9 % point for 6 degrees is 22.5
    draws = draw_sentences(3, np.zeros(70_000, np.int64), np.arange(70_000), 1.0)[:, 1]
    counts = np.bincount(kept(draws, 3) @ [1, 2, 4], minlength=8)
    assert counts[0] == 0
    assert ((counts[1:] - 10_000.0) ** 2 / 10_000.0).sum() < 22.5


def test_dropout_strikes_with_its_probability_and_depends_on_nothing_but_the_key() -> None:
    index = np.arange(20_000)
    epoch = index // 9_000
    draws = draw_sentences(5, epoch, index, 0.3)
    share = (draws[:, 1] >= 0).mean()
    assert abs(share - 0.3) < 4 * np.sqrt(0.3 * 0.7 / 20_000)
    part = draw_sentences(5, epoch[8_990:9_010], index[8_990:9_010], 0.3)
    assert (part == draws[8_990:9_010]).all()
    assert (draw_sentences(5, epoch, index, 0.0)[:, 1] == -1).all()


@pytest.mark.parametrize("sentences", [0, 1])
def test_a_single_sentence_is_never_dropped(sentences: int) -> None:
    assert kept(np.array([0.3]), sentences).all()
    assert kept(np.array([-1.0]), 5).all()


def test_many_sentences_give_a_non_empty_subset() -> None:
    chosen = kept(np.array([1e-9, 0.5, 1 - 1e-9]), 120)
    assert chosen[:, :48].any(axis=1).all() and chosen[:, 48:].all()
