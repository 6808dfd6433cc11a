"""Scores by group of patients: by sex, age, view, site, or any other column of the manifest.

A mean over all test rows hides for whom a model fails, and a model that reads the view or the ward
off an image can look good in the mean while it is no better than chance within either
(Seyyed-Kalantari et al. 2021; Zech et al. 2018). So each group's scores stand beside those of all
other rows, with an interval over patients of their difference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from mlip.dataloading.datasets.report_columns import said
from mlip.dataloading.manifest import Manifest, ManifestError, read_more
from mlip.dataloading.progress import Progress
from mlip.dataloading.tables.csv_text import shown
from mlip.dataloading.tables.table import column_names
from mlip.dataloading.view_position import projection
from mlip.settings.config import Config
from mlip.settings.transfer import BY_PROJECTION
from mlip.transfer.array import Array
from mlip.transfer.measures.interval import Estimate, Measured, estimate, not_available
from mlip.transfer.measures.means import less, over_findings
from mlip.transfer.truth.annotations import MOST_NAME_CHARACTERS

# fewer could be told who they are by somebody who knows them, and say little of others
FEWEST_PATIENTS = 10
FEWEST_OF_EACH = 5  # patients with a finding, and without it: a rate of fewer is a coin's
TOO_FEW = (
    f"fewer than {FEWEST_OF_EACH} patients with or without it, or val or the training draw lacks it"
)
_IDENTIFIERS = ("image", "report", "patient_id", "study_id", "image_id", "sha256")


@dataclass(frozen=True)
class Grouping:
    """The rows of an evaluation by what a column says of them.

    Shapes:  members [groups, rows] bool; stated [rows] bool, rows whose cell says something
    """

    column: str
    names: tuple[str, ...]
    members: Array
    stated: Array
    small: dict[str, int]  # groups of fewer than FEWEST_PATIENTS: how many, their images, patients


@dataclass(frozen=True)
class Measures:
    """What one set of rows scores: of each finding, and of all rows at once.

    A score that the rows cannot give is not in it.
    """

    classes: dict[str, dict[str, Measured]] = field(default_factory=dict)
    counts: dict[str, tuple[int, int]] = field(default_factory=dict)  # finding: rows, with it
    whole: dict[str, Measured] = field(default_factory=dict)


Measure = Callable[[Array], Measures]  # [rows] bool: those that are in


def read_groupings(config: Config, manifest: Manifest, rows: Array) -> list[Grouping]:
    """The groups of evaluate.subgroups among these manifest rows.

    Raises:  ManifestError for a column that is not there, that holds reports, paths or identifiers,
             or, where it is cut into ranges, a cell that is no number. Cells are not told.
    """
    wanted = config.evaluate.subgroups
    if not wanted:
        return []
    for field_name in _IDENTIFIERS:
        if (column := getattr(config.data.columns, field_name)) in wanted:
            raise ManifestError(
                f"evaluate.subgroups: {column!r} is the column of data.columns.{field_name}: "
                "expected one that groups patients, as sex, age or view"
            )
    path = Path(manifest.path)
    try:
        columns = read_more(manifest, {name: name for name in wanted}, wanted)
    except ManifestError:
        there = column_names(path)
        missing = [name for name in wanted if name not in there]
        if not missing:
            raise
        raise ManifestError(
            f"evaluate.subgroups: {path} has no column {', '.join(map(repr, missing))}; it has: "
            f"{shown(there)}. `mlip prepare` writes sex, age and view, earlier versions view "
            f"alone (--overwrite makes a set again); evaluate.subgroups.{missing[0]}=null takes "
            "one out"
        ) from None
    patients = manifest.patient_key[rows]
    return [
        _grouping(name, edges, columns[name].take(rows).to_pylist(), patients, rows, manifest.path)
        for name, edges in wanted.items()
    ]


def _grouping(
    column: str, edges: Any, cells: list[Any], patients: Array, rows: Array, path: str
) -> Grouping:
    texts = [_one_line(said(cell)) for cell in cells]
    if edges == BY_PROJECTION:
        texts, edges = [projection(text) for text in texts], ()
    stated = np.array([text != "" for text in texts], dtype=bool)
    if len(edges):
        values = _numbers(column, texts, rows, path)
        place = np.searchsorted(np.asarray(edges, dtype=np.float64), values, side="right")
        order = _ranges(edges)
    else:
        order = sorted({text for text in texts if text})
        if any(len(text) > MOST_NAME_CHARACTERS for text in order):
            raise ManifestError(
                f"{path}: column {column!r} (evaluate.subgroups) holds texts of more than "
                f"{MOST_NAME_CHARACTERS} characters: expected names of groups"
            )
        number = {text: k for k, text in enumerate(order)}
        place = np.array([number.get(text, -1) for text in texts], dtype=np.int64)
    patient = np.unique(patients, return_inverse=True)[1]
    in_group = np.unique(np.stack([place[stated], patient[stated]]), axis=1)[0]  # of each patient
    counts = np.bincount(in_group, minlength=len(order))
    images = np.bincount(place[stated], minlength=len(order))
    large = np.flatnonzero(counts >= FEWEST_PATIENTS)
    few = (counts > 0) & (counts < FEWEST_PATIENTS)
    small = {
        "groups": int(few.sum()),
        "images": int(images[few].sum()),
        "patients": int(counts[few].sum()),
    }
    members = stated & (place == large[:, None])
    return Grouping(column, tuple(order[k] for k in large), members, stated, small)


def _one_line(text: str) -> str:
    """A cell as a name that a page and a terminal show as it is."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _numbers(column: str, texts: Sequence[str], rows: Array, path: str) -> Array:
    values = np.zeros(len(texts))
    for i, text in enumerate(texts):
        try:
            values[i] = float(text or 0.0)
        except ValueError:
            values[i] = np.nan
        if not np.isfinite(values[i]):
            raise ManifestError(
                f"{path}: data row {int(rows[i]) + 1}: column {column!r} holds no number, which "
                f"evaluate.subgroups.{column} cuts into ranges: expected years or the like, blank "
                "where it is not known; [] makes a group of each value"
            )
    return values


def _ranges(edges: Sequence[float]) -> list[str]:
    # all digits of a date such as 20200131
    cuts = [f"{edge:.15g}" for edge in edges]
    inner = [f"{low} to below {high}" for low, high in pairwise(cuts)]
    return [f"below {cuts[0]}", *inner, f"{cuts[-1]} or more"]


def subgroup_scores(
    groupings: Sequence[Grouping], patients: Array, measure: Measure
) -> list[dict[str, Any]]:
    """Each group's scores and how they differ from those of all other rows of its column.

    measure  rows [n] bool -> what they score; its resamples are of the same draws of patients
             whatever the rows, so that differences are paired
    Returns: [{"column", "not_stated": images, "small_groups", "groups": [{"name", "images",
             "patients", "macro": {score: Estimate}, "difference": {score: Estimate}, "classes":
             [{"class", "n", "positives", score: Estimate, ..., "difference": {...}}]}]}]
             "macro" holds means over findings (with "classes", how many) and scores of all rows;
             a difference of means is over the findings that both sides can score
    """
    known: dict[bytes, Measures] = {}
    told, total = Progress("groups scored"), sum(len(grouping.names) for grouping in groupings)
    done = 0

    def of(rows: Array) -> Measures:
        key = rows.tobytes()  # with two groups the others of one are the other
        if key not in known:
            told(done, total)
            known[key] = measure(rows)
        return known[key]

    def next_group(rows: Array) -> Measures:
        nonlocal done
        found = of(rows)
        done += 1
        return found

    def others(rows: Array) -> tuple[Measures, str]:
        """Nothing of so few patients that the difference would tell what they score."""
        if len(np.unique(patients[rows])) >= FEWEST_PATIENTS:
            return of(rows), TOO_FEW
        few = f"fewer than {FEWEST_PATIENTS} patients in all other rows"
        return Measures(), few if rows.any() else "no other rows"

    return [
        {
            "column": grouping.column,
            "not_stated": int((~grouping.stated).sum()),
            "small_groups": grouping.small,
            "groups": [
                {
                    "name": name,
                    "images": int(inside.sum()),
                    "patients": len(np.unique(patients[inside])),
                    **_beside(next_group(inside), *others(rest)),
                }
                for name, inside in zip(grouping.names, grouping.members, strict=True)
                for rest in (grouping.stated & ~inside,)
            ],
        }
        for grouping in groupings
    ]


def _beside(own: Measures, others: Measures, reason: str) -> dict[str, Any]:
    """A group's scores and their differences; reason: why there is no difference."""
    sides = (*own.classes.values(), *others.classes.values())
    keys = list(dict.fromkeys(key for found in sides for key in found))
    macro: dict[str, Any] = {
        key: over_findings([found.get(key) for found in own.classes.values()], TOO_FEW)
        for key in keys
    }
    difference: dict[str, Any] = {
        key: over_findings(
            [
                less(found.get(key), others.classes.get(name, {}).get(key))
                for name, found in own.classes.items()
            ],
            reason,
        )
        for key in keys
    }
    for key in dict.fromkeys([*own.whole, *others.whole]):
        macro[key] = _told(own.whole.get(key))
        difference[key] = _told(less(own.whole.get(key), others.whole.get(key)), reason)
    classes = []
    for name, (n, positives) in own.counts.items():
        found, beside = own.classes.get(name, {}), others.classes.get(name, {})
        classes.append(
            {
                "class": name,
                "n": n,
                "positives": positives,
                **{key: _told(found.get(key)) for key in keys},
                "difference": {
                    key: _told(less(found.get(key), beside.get(key)), reason) for key in keys
                },
            }
        )
    return {"macro": macro, "difference": difference, "classes": classes}


def _told(measured: Measured | None, reason: str = TOO_FEW) -> Estimate:
    return not_available(reason) if measured is None else estimate(*measured)


def has_both(truth: Array, patients: Array) -> bool:
    """Whether FEWEST_OF_EACH patients carry a finding in some row and as many do not in some.

    Rows of one patient are not independent: five rows of one would be one patient's word.
    Shapes:  truth [n] bool, patients [n]
    """
    return enough(patients[truth]) and enough(patients[~truth])


def enough(patients: Array) -> bool:
    """Whether these rows are of FEWEST_OF_EACH patients or more.  Shapes: patients [n]"""
    return len(np.unique(patients)) >= FEWEST_OF_EACH
