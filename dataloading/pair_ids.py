"""Which rows are one pair for a loss: those of the same study, and those of the same words."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mlip.dataloading.text_hash import HashArray, keyed, mix, says_none

IntArray = NDArray[np.int64]


def pair_ids(
    patient_key: HashArray,
    study: pa.ChunkedArray | None,
    text_hash: HashArray,
    has_text: NDArray[np.bool_],
    fingerprint: str,
) -> IntArray:
    """First row of each connected component of "same study" and "same words".

    A study belongs to a patient: two hospitals may both have a study "1".
    """
    # a million rows: half as wide indices and no array longer than it is needed are 80 MiB less
    rows = np.arange(len(patient_key), dtype=np.int32)
    groups: list[Any] = []
    if study is not None:
        here = ~says_none(study)
        groups.append(
            (rows[here], mix(keyed(pc.fill_null(study, ""), fingerprint), patient_key)[here])
        )
    groups.append((rows[has_text], text_hash[has_text]))
    return connect(len(rows), groups)


def connect(count: int, groups: list[tuple[IntArray, HashArray]]) -> IntArray:
    """Smallest member of each row's component, rows with equal keys of a group being linked.

    Returns: [count] int64
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    left, right = [], []
    for rows, keys in groups:
        others = _first_of_equals(rows, keys)
        links = rows != others
        left.append(rows[links].astype(np.int32))
        right.append(others[links].astype(np.int32))
    a, b = np.concatenate(left), np.concatenate(right)
    if len(a) == 0:
        return np.arange(count, dtype=np.int64)
    graph = coo_array((np.ones(len(a), dtype=np.int8), (a, b)), shape=(count, count))
    _, label = connected_components(graph, directed=False)
    _, first = np.unique(label, return_index=True)
    return first[label].astype(np.int64)


def _first_of_equals(rows: NDArray[Any], keys: HashArray) -> NDArray[Any]:
    """For each row the first one with an equal key; rows ascend."""
    order = np.argsort(keys, kind="stable")
    in_order = keys[order]
    begins = np.concatenate([[True], in_order[1:] != in_order[:-1]])[: len(keys)]
    del in_order
    firsts = np.maximum.accumulate(np.where(begins, np.arange(len(keys)), 0))
    others = np.empty_like(rows)
    others[order] = rows[order[firsts]]
    return others
