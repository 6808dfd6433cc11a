"""Reports as tokens and mentions, alone and as a batch takes them."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np

from mlip.dataloading.reports.batch import compose_batch
from mlip.dataloading.reports.encoder import ReportEncoder
from mlip.dataloading.reports.tokenizer import ReportTokenizer

TEXT = "A small left effusion. No pneumothorax. Possible nodule, 1.5 cm."


def make_encoder(
    tokenizer: ReportTokenizer, linker: Any, concepts: Any, **kw: int
) -> ReportEncoder:
    return ReportEncoder(
        tokenizer, linker, concepts, **({"max_tokens": 64, "max_entities": 8} | kw)
    )


def composed(encoder: ReportEncoder, text: str, draw: float = -1.0) -> tuple[list, list]:
    """(token ids, entities) that a batch takes from one report."""
    made = compose_batch(encoder, [encoder.encode(text)], np.array([draw]))
    return made.token_ids[0].tolist(), made.entities[0, made.entity_mask[0]].tolist()


def test_encoding_equals_tokens_of_the_whole_report(
    tokenizer: ReportTokenizer, linker: Any, concepts: Any
) -> None:
    encoder = make_encoder(tokenizer, linker, concepts)
    ids, entities = composed(encoder, TEXT)
    whole = tokenizer.encode_batch([TEXT])[0].ids
    assert ids == [tokenizer.cls_id, *whole, tokenizer.sep_id]
    # effusion present, pneumothorax absent, nodule uncertain
    assert entities == [[0, 0], [1, 1], [2, 2]]


def test_dropping_a_sentence_drops_its_tokens_and_its_mentions(
    tokenizer: ReportTokenizer, linker: Any, concepts: Any
) -> None:
    encoder = make_encoder(tokenizer, linker, concepts)
    draw = 4.5 / 7  # the fifth of seven subsets: the first and the third sentence
    shorter = composed(encoder, "A small left effusion. Possible nodule, 1.5 cm.")
    assert composed(encoder, TEXT, draw) == shorter
    assert shorter[1] == [[0, 0], [2, 2]]


def test_the_token_limit_cuts_text_and_the_mentions_behind_it(
    tokenizer: ReportTokenizer, linker: Any, concepts: Any
) -> None:
    full = make_encoder(tokenizer, linker, concepts)
    ids, _ = composed(full, TEXT)
    first = len(tokenizer.encode_batch(["A small left"])[0].ids)
    for limit in range(3, len(ids) + 3):
        encoder = make_encoder(tokenizer, linker, concepts, max_tokens=limit)
        cut, entities = composed(encoder, TEXT)
        room = min(limit, len(ids)) - 2
        assert cut == [*ids[: room + 1], tokenizer.sep_id]
        assert ([0, 0] in entities) == (room > first)


def test_mentions_are_unique_and_at_most_max_entities(
    tokenizer: ReportTokenizer, linker: Any, concepts: Any
) -> None:
    text = "Effusion. Effusion again. No effusion. Tube. Nodule."
    encoder = make_encoder(tokenizer, linker, concepts, max_entities=3)
    assert composed(encoder, text)[1] == [[0, 0], [0, 1], [3, 0]]


def test_a_text_without_content_gives_start_and_end_only(
    tokenizer: ReportTokenizer, linker: Any, concepts: Any
) -> None:
    encoder = make_encoder(tokenizer, linker, concepts)
    assert composed(encoder, "___") == ([tokenizer.cls_id, tokenizer.sep_id], [])


def test_a_report_is_encoded_once_and_the_cache_keeps_to_its_bytes(
    tokenizer: ReportTokenizer, linker: Any, concepts: Any
) -> None:
    calls: list[int] = []

    def text_of(row: int) -> str:
        calls.append(row)
        return TEXT

    encoder = make_encoder(tokenizer, linker, concepts)
    for row in (4, 4, 9, 4):
        encoder.of_row(row, text_of)
    assert calls == [4, 9]
    small = make_encoder(tokenizer, linker, concepts, max_cache_bytes=1000)
    for row in (0, 1, 2, 3, 0, 3):
        small.of_row(row, text_of)
    assert calls[2:] == [0, 1, 2, 3, 3]


def test_what_a_kept_report_counts_is_what_it_takes(
    tokenizer: ReportTokenizer, linker: Any, concepts: Any
) -> None:
    """By tracemalloc. At 400 bytes beside its numbers the cache of 256 MiB took 400 MiB."""
    encoder = make_encoder(tokenizer, linker, concepts)

    def keep(rows: range) -> int:
        before = tracemalloc.get_traced_memory()[0]
        for row in rows:
            encoder.of_row(row, lambda row: TEXT)
        return tracemalloc.get_traced_memory()[0] - before

    # both ends lie between two growths of the table of rows
    keep(range(1500))
    tracemalloc.start()
    taken = keep(range(1500, 2500))
    tracemalloc.stop()
    counted = 1000 * encoder.of_row(0, lambda row: TEXT).nbytes
    assert 0.9 * counted < taken < 1.1 * counted
