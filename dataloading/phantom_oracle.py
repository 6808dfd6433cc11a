"""What retrieval could reach at best: a score by a reader who knows the truth of every image.

Reports are not unique (two studies may both show a small left effusion), so even this reader
misses: its recall is the ceiling that evaluation prints beside a model's.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlip.dataloading.phantom_reports import Group, Instance, group_findings
from mlip.dataloading.phantom_types import CONCEPT_IDS, Claim, PhantomStudy

_CONTRADICTION = 1000.0  # outweighs any sum of information: one report says some ten things


def oracle_scores(studies: Sequence[PhantomStudy]) -> NDArray[np.float64]:
    """How well report j fits what is true of image i.

    The sum of the information -ln P(claim) of what report j says, P being the share of the given
    images for which it holds; minus a large penalty for each claim that is false of image i and
    for each finding of image i that report j leaves out (reports name every present finding).

    Shapes:  N studies -> [N, N], rows images, columns reports; the diagonal has no penalty
    """
    return _scores(
        [group_findings(study.findings) for study in studies],
        [study.anatomy for study in studies],
        [study.claims for study in studies],
    )


def oracle_scores_of(folder: Path | str, image_ids: Sequence[str]) -> NDArray[np.float64]:
    """oracle_scores of the studies of a written data set, in the order of `image_ids`.

    Raises:  ValueError naming the first image_id that the folder's truth.jsonl does not hold.
    """
    rows: dict[str, dict[str, Any]] = {}
    with (Path(folder) / "truth.jsonl").open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            rows[row["image_id"]] = row
    for image_id in image_ids:
        if image_id not in rows:
            raise ValueError(f"{folder}/truth.jsonl: expected a line for image {image_id}")
    chosen = [rows[image_id] for image_id in image_ids]
    return _scores(
        [group_findings([Instance(**_kept(f)) for f in row["findings"]]) for row in chosen],
        [row["anatomy"] for row in chosen],
        [tuple(Claim(**claim) for claim in row["claims"]) for row in chosen],
    )


def _kept(finding: dict[str, Any]) -> dict[str, Any]:
    return {field.name: finding[field.name] for field in dataclasses.fields(Instance)}


def _scores(
    grouped: Sequence[Sequence[Group]],
    anatomy: Sequence[dict[str, str]],
    claims: Sequence[Sequence[Claim]],
) -> NDArray[np.float64]:
    groups = [{group.concept_id: group for group in study} for study in grouped]
    said = sorted({claim for report in claims for claim in report}, key=repr)
    holds = np.array(
        [[_holds(c, g, a) for c in said] for g, a in zip(groups, anatomy, strict=True)], float
    )
    number = {claim: k for k, claim in enumerate(said)}
    says = np.zeros((len(claims), len(said)))
    for j, report in enumerate(claims):
        says[j, [number[claim] for claim in report]] = 1.0
    information = -np.log(np.maximum(holds.mean(axis=0), 1.0 / len(claims)))
    wrong = (1 - holds) @ says.T
    has = np.array([[concept in g for concept in CONCEPT_IDS] for g in groups], float)
    names = np.array(
        [
            [any(c.about == concept and c.value == "present" for c in r) for concept in CONCEPT_IDS]
            for r in claims
        ],
        float,
    )
    omitted = has @ (1 - names).T
    return (holds * information) @ says.T - _CONTRADICTION * (wrong + omitted)


def _holds(claim: Claim, groups: dict[str, Group], anatomy: dict[str, str]) -> bool:
    if claim.about in anatomy:
        return anatomy[claim.about] == claim.value
    group = groups.get(claim.about)
    if claim.value == "absent" or group is None:
        return (claim.value == "absent") == (group is None)
    return all(
        getattr(claim, name) in (None, getattr(group, name))
        for name in ("side", "zone", "size_word", "variant")
    )
