"""The images and reports of an evaluation's rows, encoded once, with what its tasks need beside."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from mlip.dataloading.manifest import Manifest
from mlip.dataloading.progress import Progress
from mlip.transfer.array import Array
from mlip.transfer.feature_store import FeatureStore
from mlip.transfer.features import ImageBank, TextBank, encoded, require_finite, row_loader


@dataclass(frozen=True)
class EncodedSplit:
    """Row i of every field is image i of the banks."""

    images: ImageBank
    reports: TextBank
    has_text: Array  # [N] bool
    # not the loader's, which knowledge.pair_id_by_concepts widens for training
    pair_id: Array  # [N] int64
    mentions: Array  # [n, 3]: concept row, state, place of its report in the bank
    unreadable: dict[str, int]  # rows whose image is not there, or too dark, counted by reason

    @cached_property
    def with_text(self) -> Array:
        """[R] places in the banks of the images that have a report."""
        return np.flatnonzero(self.has_text)


@torch.no_grad()
def encode_split(opened: Any, manifest: Manifest, rows: Array) -> EncodedSplit:
    """The rows of evaluate.split by the model; films too dark for `mlip prepare` are left out.

    Raises:  ValueError where features hold NaN or infinite values, or find no room.
    """
    config = opened.config
    loader = row_loader(opened, manifest, config.evaluate.split, rows)
    store = FeatureStore(
        len(rows), max_tokens=config.data.max_tokens, max_entities=config.data.max_entities
    )
    has_text: list[Array] = []
    mentions: list[Array] = []
    seen = 0
    told = Progress("images and reports encoded")
    for batch, image, text in encoded(opened.model, loader, config.data):
        require_finite(image, text)
        store.add(image, text)
        has_text.append(batch.content_mask.any(dim=1).numpy())
        chosen = batch.entity_mask
        report = chosen.nonzero()[:, 0] + seen
        mentions.append(
            np.stack([batch.entity_ids[chosen], batch.entity_state[chosen], report], axis=1)
        )
        seen += len(batch)
        told(seen, len(rows))
    images, reports = store.banks()
    return EncodedSplit(
        *(images, reports, np.concatenate(has_text)),
        pair_id=manifest.pair_id[images.row_index],
        mentions=np.concatenate(mentions),
        unreadable=dict(Counter(loader.ledger.bad.values())),
    )
