"""Free text -> the text fields of a Batch, through the tokens and the linker of training."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from mlip.dataloading.reports.batch import compose_batch
from mlip.dataloading.reports.encoder import ReportEncoder
from mlip.settings.config import Config
from mlip.transfer.features import TextBank, encode_text_batch, join_texts

logger = logging.getLogger("mlip")
TEXTS_AT_ONCE = 256
MOST_TOLD = 5  # phrases that a line names by number
SHORTEST_SPELT = 4  # letters
LONGEST_QUOTED = 60  # characters: what is longer may be a report, which no message quotes


@dataclass(frozen=True)
class TextBatch:
    """The text half of a Batch; fields as there."""

    token_ids: Tensor
    token_mask: Tensor
    content_mask: Tensor
    entity_ids: Tensor
    entity_state: Tensor
    entity_mask: Tensor


class TextError(ValueError):
    """A text that cannot be asked; `place` is its number among those that were given, from 0."""

    def __init__(self, message: str, place: int) -> None:
        super().__init__(message)
        self.place = place


def named_phrase(text: str, place: int) -> str:
    """How an error calls a phrase: quoted where it is short, else by its number."""
    return f"the phrase {text!r}" if len(text) <= LONGEST_QUOTED else f"phrase {place + 1}"


def warn_of_unknown_words(
    tokenizer: Any, linker: Any, texts: Sequence[str], *, first: int = 0
) -> None:
    """A line in the log where the vocabulary does not know all of what is asked, and one where it
    has but the letters of a word that is no term's; they quote nothing.

    Such a score says less, or nothing, of the words that were meant.
    first  how many texts came before these, which the lines count
    """
    unknown, spelt = [], []
    encoded = tokenizer.encode_batch(list(texts))
    for place, (text, one) in enumerate(zip(texts, encoded, strict=True), start=first + 1):
        if count := sum(token == tokenizer.unk_id for token in one.ids):
            unknown.append(f"phrase {place} ({count} of {len(one.ids)} tokens)")
        if count := _spelt_words(text, one, linker):
            spelt.append(f"phrase {place} ({count} word{'s' if count > 1 else ''})")
    for found, what in (
        (
            unknown,
            "words that the checkpoint's vocabulary does not know, for which the model reads one "
            "and the same token",
        ),
        (
            spelt,
            "words that the model reads letter by letter, as its vocabulary has no part of them, "
            "and that its lexicon does not use: the reports that the vocabulary was made of held "
            "them seldom or never, so what the model finds for them means little",
        ),
    ):
        if found:
            more = f" and {len(found) - MOST_TOLD} more" if len(found) > MOST_TOLD else ""
            logger.warning("%s: %s%s", what, ", ".join(found[:MOST_TOLD]), more)


def _spelt_words(text: str, encoded: Any, linker: Any) -> int:
    """Words of which each token is a letter, and which no term or cue of the lexicon uses.

    Those of ASCII letters alone: a token of other scripts may be a letter in every word. Of fewer
    than SHORTEST_SPELT no word is counted: of 36 abbreviations of radiology up to 8 were.
    """
    letters: dict[int, list[tuple[int, int]]] = {}
    for word, offsets in zip(encoded.word_ids, encoded.offsets, strict=True):
        letters.setdefault(word, []).append(offsets)
    count = 0
    for spans in letters.values():
        word = text[spans[0][0] : spans[-1][1]]
        is_spelt = SHORTEST_SPELT <= len(spans) == len(word)
        if is_spelt and word.isascii() and word.isalpha():
            count += linker.known_words(word)[0] == 0
    return count


def make_text_batch(
    texts: Sequence[str], encoder: ReportEncoder, *, cut: bool = False, first: int = 0
) -> TextBatch:
    """Tokens and linked knowledge of the texts.

    cut    read a text as far as the model reads, as training does with reports
    first  how many texts came before these, which an error counts
    Raises:  TextError for a text longer than the model reads, unless cut.
    """
    reports = [encoder.encode(text) for text in texts]
    counts, room = [len(report.ids) for report in reports], encoder.max_tokens - 2
    if max(counts) > room and not cut:
        at = counts.index(max(counts))
        raise TextError(
            f"{named_phrase(texts[at], first + at)} has {counts[at]} tokens, the model reads "
            f"{room}: shorten it",
            first + at,
        )
    return TextBatch(**compose_batch(encoder, reports, np.full(len(reports), -1.0)).tensors())


def make_worded_batch(
    texts: Sequence[str], encoder: ReportEncoder, *, cut: bool, first: int = 0
) -> TextBatch:
    """make_text_batch of texts that each have a word.

    Raises:  TextError as make_text_batch, and for a text without one.
    """
    batch = make_text_batch(texts, encoder, cut=cut, first=first)
    empty = (~batch.content_mask.any(dim=1)).nonzero()
    if len(empty):
        place = int(empty[0])
        named = named_phrase(texts[place], first + place)
        named = f"report {first + place + 1}" if cut else named
        raise TextError(f"{named} is empty: expected words", first + place)
    return batch


def phrase_encoder(config: Config, tokenizer: Any, linker: Any, table: Any) -> ReportEncoder:
    """The encoder of training for texts that are met once."""
    return ReportEncoder(
        tokenizer,
        linker,
        table,
        max_tokens=config.data.max_tokens,
        max_entities=config.data.max_entities,
        max_cache_bytes=0,
    )


def encode_prompts(
    opened: Any, texts: Sequence[str], *, cut: bool = False, first: int = 0
) -> TextBank:
    """A TextBank of free texts; knowledge is linked from each text, negation included.

    cut    as of make_text_batch; texts are reports then, which no message quotes
    first  as of make_text_batch
    Raises:  TextError for a text that has no word the tokenizer can use, or is longer than the
             model reads.
    """
    encoder = phrase_encoder(opened.config, opened.tokenizer, opened.linker, opened.table)
    parts = []
    for start in range(0, len(texts), TEXTS_AT_ONCE):
        chunk, before = texts[start : start + TEXTS_AT_ONCE], first + start
        batch = make_worded_batch(chunk, encoder, cut=cut, first=before)
        parts.append(encode_text_batch(opened.model, batch))
    return join_texts(parts)


def encode_asked(opened: Any, phrases: Sequence[str], *, cut: bool = False) -> TextBank:
    """encode_prompts of what an evaluation asks, told where the vocabulary lacks its words."""
    warn_of_unknown_words(opened.tokenizer, opened.linker, phrases)
    return encode_prompts(opened, phrases, cut=cut)
