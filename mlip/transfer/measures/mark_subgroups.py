"""Retrieval and pointing by group of patients: means of what each image's own marks say.

A query belongs to the group of its image; what it is asked among (all candidates, all pixels) stays
the same for every group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from mlip.transfer.array import Array
from mlip.transfer.measures.interval import Measured, measured_mean, patient_resamples
from mlip.transfer.measures.predictions import Series
from mlip.transfer.measures.subgroups import (
    FEWEST_PATIENTS,
    Grouping,
    Measures,
    enough,
    subgroup_scores,
)


def mark_subgroups(
    marks: Sequence[tuple[str, str, Series]],
    groupings: Sequence[Grouping],
    rows: Array,
    patients: Array,
    *,
    bootstrap: int,
    seed: int,
) -> list[dict[str, Any]]:
    """subgroup_scores of marks: (class, score, marks of some of the images) each.

    A class (a direction, a finding) counts where enough patients of a group were asked about it.
    Shapes:  rows, patients [images], those that the groupings are of
    """
    if not groupings or not marks:
        return []
    order = np.argsort(rows)
    at = [order[np.searchsorted(rows, s.rows, sorter=order)] for _, _, s in marks]
    asked = np.unique(np.concatenate(at))
    places = [np.searchsorted(asked, place) for place in at]
    of = patients[asked]
    weights = patient_resamples(of, bootstrap, seed)

    def measure(inside: Array) -> Measures:
        found: dict[str, dict[str, Measured]] = {}
        counts: dict[str, tuple[int, int]] = {}
        for (name, score, series), place in zip(marks, places, strict=True):
            own = inside[place]
            counts[name] = (int(own.sum()), int(own.sum()))
            classes = found.setdefault(name, {})
            if enough(of[place[own]]):
                classes[score] = measured_mean(series.scores[own], weights[:, place[own]])
        return Measures(found, counts)

    return subgroup_scores([_among(g, asked, of) for g in groupings], of, measure)


def _among(grouping: Grouping, places: Array, patients: Array) -> Grouping:
    """The grouping of some of its images; what is too small a group among them is not shown.

    Shapes:  places [asked] of the grouping's images; patients [asked]
    """
    members, stated = grouping.members[:, places], grouping.stated[places]
    counts = np.array([len(np.unique(patients[inside])) for inside in members], dtype=np.int64)
    large = counts >= FEWEST_PATIENTS
    rest = stated & ~members[large].any(axis=0)
    # which of the groups that were small before are asked about, nothing tells
    before = grouping.small["groups"] if (stated & ~members.any(axis=0)).any() else 0
    small = {
        "groups": before + int(((counts > 0) & ~large).sum()),
        "images": int(rest.sum()),
        "patients": len(np.unique(patients[rest])),
    }
    names = tuple(n for n, is_large in zip(grouping.names, large, strict=True) if is_large)
    return replace(grouping, names=names, members=members[large], stated=stated, small=small)
