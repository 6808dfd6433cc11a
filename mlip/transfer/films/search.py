"""What an archive of embeddings is asked: phrases, findings, films, or rows of its own.

A phrase is its embedding, a film its image's. A finding is the mean of the sentences that state it
minus the mean of those that deny it: its product with an image is the zero-shot score of the global
head, so the archive is ranked as `mlip classify --head global` would rank it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mlip.batch import ImageFeatures
from mlip.settings.evaluate import Evaluate
from mlip.transfer.alignment.zero_shot import prompt_texts
from mlip.transfer.alignment.zero_shot_run import scores_by_head
from mlip.transfer.array import Array
from mlip.transfer.features import ImageBank, TextBank
from mlip.transfer.films.archive import Archive, ArchiveError, Hits
from mlip.transfer.films.classify import (
    Question,
    QuestionError,
    ask_names,
    ask_wordings,
    encode_question,
)
from mlip.transfer.films.own_inputs import encode_images, encode_texts, heat_maps
from mlip.transfer.films.row_table import begins_as_formula
from mlip.transfer.fingerprint import made_with


@dataclass(frozen=True)
class Query:
    """One question to an archive.

    name     as asked; of a film its number among the films, as file names may name a patient
    vector   [D] float32
    texts    its sentences, which are asked of patches too (None: a film's or a row's)
    weights  [sentences], of each in the score: sum = 1, or 0 where some deny
    row      the archive's row that asks, which is no answer
    """

    kind: str
    name: str
    vector: Array
    texts: TextBank | None = None
    weights: Array | None = None
    row: int | None = None

    def __str__(self) -> str:
        return self.name if self.kind in ("phrase", "finding") else f"{self.kind} {self.name}"


def require_same_model(archive: Archive, opened: Any) -> None:
    """Raises:  ArchiveError where other weights, or another preparation, made the archive"""
    made = {"weights": archive.weights, "preprocessing": archive.preprocessing}
    if others := [name for name, own in made_with(opened).items() if made[name] != own]:
        raise ArchiveError(
            f"{archive.folder}: was made with other {' and '.join(others)} than this model's: "
            "its numbers mean nothing to this model; embed again, or name the model that made it"
        )


def ask(
    archive: Archive,
    opened: Any,
    settings: Evaluate,
    *,
    phrases: Sequence[str] = (),
    findings: Sequence[str] = (),
    wordings: str | Path | None = None,
    images: Sequence[str | Path] = (),
    rows: Sequence[int] = (),
) -> list[Query]:
    """Queries of every kind, in this order; `opened` may be None where rows alone ask.

    Raises:  QuestionError, ValueError, ImageFileError or ArchiveError of what cannot be asked
    """
    own = None if wordings is None else ask_wordings(Path(wordings))
    for text in [*phrases, *findings, *(p.finding for p in (own.prompts if own else ()))]:
        _require_cell(text)
    queries = [
        *ask_phrases(phrases, opened),
        *(ask_findings(ask_names(findings, opened, settings), opened) if findings else []),
        *(ask_findings(own, opened) if own is not None else []),
        *ask_images(images, opened),
        *ask_rows(rows, archive),
    ]
    names = [(query.kind, query.name) for query in queries]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise QuestionError(f"{twice[0][0]} {twice[0][1]!r} is asked twice: leave one out")
    return queries


def _require_cell(text: str) -> None:
    """Raises:  QuestionError for words that are no cell of the table of answers"""
    if text.splitlines() not in ([], [text]):
        raise QuestionError(f"{text!r}: expected words in one line")
    if begins_as_formula(text):
        raise QuestionError(
            f"{text!r}: a spreadsheet would run it as a formula in the table of answers: begin it "
            "with a letter"
        )


def ask_phrases(phrases: Sequence[str], opened: Any) -> list[Query]:
    """Raises:  ValueError as encode_texts"""
    queries = []
    for place, phrase in enumerate(phrases):
        texts = encode_texts(opened, [phrase], first=place)
        queries.append(_by_sentences("phrase", phrase, texts, np.ones(1)))
    return queries


def ask_findings(question: Question, opened: Any) -> list[Query]:
    """Raises:  ValueError as encode_texts"""
    texts, queries, start = encode_question(opened, question), [], 0
    for p in question.prompts:
        sentences = prompt_texts([p])
        stated = len(p.positive)
        weights = np.full(len(sentences), -1.0 / (len(sentences) - stated))
        weights[:stated] = 1.0 / stated
        own = texts.rows(np.arange(start, start + len(sentences)))
        queries.append(_by_sentences("finding", p.finding, own, weights))
        start += len(sentences)
    return queries


def _by_sentences(kind: str, name: str, texts: TextBank, weights: Array) -> Query:
    vector = weights @ texts.text.embedding.double().numpy()
    return Query(kind, name, vector.astype(np.float32), texts, weights)


def ask_images(paths: Iterable[str | Path], opened: Any) -> list[Query]:
    """Raises:  ImageFileError, ValueError as own_inputs.encode_images"""
    paths = list(paths)
    if not paths:
        return []
    embedding = encode_images(opened, paths).embedding.numpy()
    return [Query("film", str(n), vector) for n, vector in enumerate(embedding, start=1)]


def ask_rows(rows: Sequence[int], archive: Archive) -> list[Query]:
    """Raises:  ArchiveError for a row that the archive does not hold"""
    if not rows:
        return []
    return [
        Query("row", str(row), vector, row=row)
        for row, vector in zip(rows, archive.images_of(rows), strict=True)
    ]


def not_answers(queries: Sequence[Query], groups: Array | None) -> list[Array]:
    """Rows that each query may not find: the row that asks; by `groups` its patient's others too.

    groups  [rows of the manifest], a patient's number each
    """
    left_out = []
    for query in queries:
        if query.row is None:
            left_out.append(np.zeros(0, np.int64))
        elif groups is None:
            left_out.append(np.array([query.row], np.int64))
        else:
            left_out.append(np.flatnonzero(groups == groups[query.row]))
    return left_out


class Reranked:
    """Hits scored again by both heads, as their images come: `add` banks, then `hits`.

    Scores of phrases and findings become the sum of the two losses' logits (zero_shot.combine);
    queries without sentences stay as they are. A row whose image does not come has NaN and is last.
    """

    def __init__(self, opened: Any, queries: Sequence[Query], hits: Sequence[Hits]) -> None:
        self._opened, self._queries, self._before = opened, queries, hits
        self._scores: list[dict[int, float]] = [{} for _ in queries]

    @property
    def rows(self) -> Array:
        """[N] int64, whose images are needed."""
        own = [h.row_index for q, h in zip(self._queries, self._before, strict=True) if q.texts]
        return np.unique(np.concatenate([np.zeros(0, np.int64), *own]))

    def add(self, bank: ImageBank) -> None:
        for query, hits, scores in zip(self._queries, self._before, self._scores, strict=True):
            here = np.flatnonzero(np.isin(bank.row_index, hits.row_index))
            if query.texts is None or query.weights is None or len(here) == 0:
                continue
            at = torch.from_numpy(here)
            features = bank.features
            named = scores_by_head(
                self._opened.model, features.embedding[at], features.patches[at], query.texts
            )
            both = named["combined"] @ query.weights
            scores |= dict(zip(bank.row_index[here].tolist(), both.tolist(), strict=True))

    def hits(self, most: int) -> list[Hits]:
        """The `most` best of each query by the new scores."""
        found = []
        for query, before, scores in zip(self._queries, self._before, self._scores, strict=True):
            values = before.scores
            if query.texts is not None:
                values = np.array([scores.get(row, np.nan) for row in before.row_index.tolist()])
            order = np.lexsort((before.row_index, np.nan_to_num(-values, nan=np.inf)))[:most]
            found.append(Hits(before.row_index[order], values[order]))
        return found


def heat_of(opened: Any, query: Query, features: ImageFeatures) -> Array | None:
    """Where the patches are like the query's stating sentences, [N, rows, columns] (mean cosine).

    None for a query without sentences.
    """
    if query.texts is None or query.weights is None:
        return None
    stating = query.texts.rows(query.weights > 0)
    return heat_maps(opened, features, stating).mean(axis=1)


def rows_found(hits: Sequence[Hits]) -> Array:
    """[N] int64, every row once, ascending."""
    return np.unique(np.concatenate([np.zeros(0, np.int64), *(h.row_index for h in hits)]))


def answers_of(
    queries: Sequence[Query], hits: Sequence[Hits]
) -> Iterable[tuple[str, str, int, int, float]]:
    """(kind, query, rank from 1, row_index, score) of every answer."""
    for query, own in zip(queries, hits, strict=True):
        pairs = zip(own.row_index.tolist(), own.scores.tolist(), strict=True)
        for rank, (row, score) in enumerate(pairs, start=1):
            yield query.kind, query.name, rank, row, score
