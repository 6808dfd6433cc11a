"""Retrieval of one split: in pools by every score, among all rows and by class by the global one.

The metrics live in retrieval.py and large_retrieval.py; here the model meets the manifest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlip.dataloading.manifest import Manifest
from mlip.settings.config import Config
from mlip.transfer.alignment.encoded_split import EncodedSplit
from mlip.transfer.alignment.large_retrieval import class_precision, whole_retrieval
from mlip.transfer.alignment.retrieval import DIRECTIONS, evaluate_retrieval
from mlip.transfer.alignment.zero_shot_run import scores_by_head
from mlip.transfer.array import Array
from mlip.transfer.measures.predictions import KeepMarks


def retrieval_run(
    opened: Any,
    manifest: Manifest,
    split: EncodedSplit,
    *,
    oracle: Callable[[Array], Array] | None,
    keep: KeepMarks,
) -> dict[str, Any]:
    """evaluate_retrieval of the images that have a report, with "whole", "by_class" and, where
    generated studies tell the truth, "oracle" beside its scores.

    keep  gets what is right of each query, by its place in the banks
    """
    config, with_text = opened.config, split.with_text
    rows, settings = split.images.row_index[with_text], config.evaluate
    patients, pairs = manifest.patient_key[rows], split.pair_id[with_text]
    found = evaluate_retrieval(
        _PoolScores(opened.model, split, oracle),
        pairs,
        patients,
        pool=settings.retrieval_pool,
        bootstrap=settings.bootstrap,
        seed=config.run.seed,
        keep=lambda m, what, measure, at, marks: keep(m, what, measure, with_text[at], marks),
    )
    if "oracle" in found["scores"]:
        # not a score of the model: the ceiling to read the others by
        found["oracle"] = found["scores"].pop("oracle")
    at = torch.as_tensor(with_text)
    embeddings = split.images.features.embedding[at], split.reports.text.embedding[at]
    found["whole"] = whole_retrieval(
        *embeddings,
        pair_id=pairs,
        patient_ids=patients,
        bootstrap=settings.bootstrap,
        seed=config.run.seed,
    )
    found["by_class"] = _by_class(config, manifest, rows, embeddings, patients)
    return found


def _by_class(
    config: Config,
    manifest: Manifest,
    rows: Array,
    embeddings: tuple[Tensor, Tensor],
    patients: Array,
) -> dict[str, Any]:
    """Class precision of both directions among the rows that carry exactly one label."""
    if manifest.label_column is None:
        return {"reason": "data.columns.labels is not set"}
    labels = [manifest.labels(row) for row in rows.tolist()]
    one = np.flatnonzero([len(names) == 1 for names in labels])
    classes = np.array([labels[i][0] for i in one.tolist()], dtype=str)
    image, text = (e[torch.as_tensor(one)] for e in embeddings)
    both = ((image, text), (text, image))
    return {
        direction: class_precision(
            q,
            c,
            classes,
            classes,
            patients[one],
            bootstrap=config.evaluate.bootstrap,
            seed=config.run.seed,
        )
        for direction, (q, c) in zip(DIRECTIONS, both, strict=True)
    }


class _PoolScores:
    """Score matrices of a pool of rows that have a report, for evaluate_retrieval."""

    def __init__(
        self, model: Any, split: EncodedSplit, oracle: Callable[[Array], Array] | None
    ) -> None:
        self.model, self.split, self.oracle = model, split, oracle

    def __call__(self, members: Array) -> dict[str, Array]:
        rows, features = self.split.with_text[members], self.split.images.features
        at = torch.as_tensor(rows)
        found = scores_by_head(
            self.model, features.embedding[at], features.patches[at], self.split.reports.rows(rows)
        )
        return found if self.oracle is None else {**found, "oracle": self.oracle(members)}
