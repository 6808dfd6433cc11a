"""What the labels of the evaluated images say: present, absent, or not said."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mlip.dataloading.manifest import Manifest
from mlip.transfer.array import Array
from mlip.transfer.truth.annotations import NEGATIVE, UNCERTAIN, UNSAID, Annotations


def label_names(manifest: Manifest, rows: Array) -> list[str]:
    return sorted({name for row in rows.tolist() for name in manifest.labels(row)})


def label_matrix(
    annotations: Annotations, rows: Array, findings: Sequence[str], *, blank_is_negative: bool
) -> Array:
    """1 present, 0 absent, -1 not said or uncertain, [rows, findings].

    What the columns of negative and uncertain labels say holds. Of the other findings a row with a
    label tells that they are absent, unless transfer.blank=ignore; a row without any tells nothing.
    Where every finding was looked for (blank_is_negative) they are absent in both.
    """
    if annotations.manifest.label_column is None:
        states = np.full((len(rows), len(findings)), UNSAID, dtype=np.int8)
    else:
        states = annotations.states(rows, findings)
    tells = annotations.transfer.blank != "ignore"
    has_label = np.array(
        [tells and bool(annotations.manifest.labels(row)) for row in rows.tolist()], bool
    )
    matrix = np.where(states == UNCERTAIN, np.int8(UNSAID), states)
    unsaid = states == UNSAID
    matrix[unsaid & (has_label | blank_is_negative)[:, None]] = NEGATIVE
    return matrix
