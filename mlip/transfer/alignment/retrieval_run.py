"""Retrieval of one split: in pools by every score, among all rows and by class by the global one.

The metrics live in retrieval.py and large_retrieval.py; here the model meets the manifest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlip.config import Config
from mlip.dataloading.manifest import Manifest
from mlip.transfer.alignment.large_retrieval import class_precision, whole_retrieval
from mlip.transfer.alignment.retrieval import DIRECTIONS, evaluate_retrieval
from mlip.transfer.alignment.zero_shot import combine
from mlip.transfer.alignment.zero_shot_run import logit_scales
from mlip.transfer.array import Array
from mlip.transfer.features import ImageBank, TextBank, global_scores, local_scores
from mlip.transfer.measures.predictions import KeepMarks


def retrieval_run(
    model: Any,
    config: Config,
    manifest: Manifest,
    images: ImageBank,
    reports: TextBank,
    with_text: Array,
    pair_id: Array,
    *,
    device: torch.device,
    oracle: Callable[[Array], Array] | None,
    keep: KeepMarks,
) -> dict[str, Any]:
    """evaluate_retrieval of the images that have a report, with "whole", "by_class" and, where
    generated studies tell the truth, "oracle" beside its scores.

    with_text  places of these images in the banks
    pair_id    of every image of the banks
    keep       gets what is right of each query, by its place in the banks
    """
    rows, settings = images.row_index[with_text], config.evaluate
    patients, pairs = manifest.patient_key[rows], pair_id[with_text]
    found = evaluate_retrieval(
        _PoolScores(model, images, reports, with_text, device, oracle),
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
    embeddings = images.features.embedding[at], reports.text.embedding[at]
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
        self,
        model: Any,
        images: ImageBank,
        reports: TextBank,
        with_text: Array,
        device: torch.device,
        oracle: Callable[[Array], Array] | None,
    ) -> None:
        self.model, self.images, self.reports = model, images, reports
        self.with_text, self.device, self.oracle = with_text, device, oracle

    def __call__(self, members: Array) -> dict[str, Array]:
        rows = self.with_text[members]
        texts = self.reports.rows(rows)
        at = torch.as_tensor(rows)
        by_global = global_scores(self.images.features.embedding[at], texts)
        by_local = local_scores(
            self.model, self.images.features.patches[at], texts, device=self.device
        )
        known = {} if self.oracle is None else {"oracle": self.oracle(members)}
        return {
            "global": by_global,
            "local": by_local,
            "combined": combine(by_global, by_local, *logit_scales(self.model)),
            **known,
        }
