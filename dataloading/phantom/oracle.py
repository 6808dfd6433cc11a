"""What retrieval could reach at best: a score by a reader who knows the truth of every image.

Reports are not unique (two studies may both show a small left effusion), so even this reader
misses: its recall is the ceiling that evaluation prints beside a model's.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mlip.dataloading.phantom.reports import Group, Instance, group_findings
from mlip.dataloading.phantom.study_types import CONCEPT_IDS, Claim, FindingTruth, PhantomStudy

_CONTRADICTION = 1000.0  # outweighs any sum of information: one report says some ten things


class Truth(NamedTuple):
    """What is true of a study's image, and what its report claims."""

    groups: dict[str, Group]  # by concept_id
    anatomy: dict[str, str]
    claims: tuple[Claim, ...]


def truth_of(study: PhantomStudy) -> Truth:
    return Truth(_by_concept(study.findings), study.anatomy, tuple(study.claims))


def read_truths(folder: Path | str, image_ids: Sequence[str]) -> list[Truth]:
    """Of studies of a written data set, in the order of `image_ids`.

    Raises:  ValueError naming the first image_id that the folder's truth.jsonl does not hold.
    """
    asked, found = set(image_ids), dict[str, Truth]()
    with (Path(folder) / "truth.jsonl").open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            if row["image_id"] in asked:
                findings = [Instance(**_kept(finding)) for finding in row["findings"]]
                claims = tuple(Claim(**claim) for claim in row["claims"])
                found[row["image_id"]] = Truth(_by_concept(findings), row["anatomy"], claims)
    for image_id in image_ids:
        if image_id not in found:
            raise ValueError(f"{folder}/truth.jsonl: expected a line for image {image_id}")
    return [found[image_id] for image_id in image_ids]


def oracle_scores(studies: Sequence[Truth]) -> NDArray[np.float64]:
    """How well report j fits what is true of image i.

    The sum of the information -ln P(claim) of what report j says, P being the share of the given
    images for which it holds; minus a large penalty for each claim that is false of image i and
    for each finding of image i that report j leaves out (reports name every present finding).

    Shapes:  N studies -> [N, N], rows images, columns reports; the diagonal has no penalty
    """
    said = sorted({claim for study in studies for claim in study.claims}, key=repr)
    holds = np.array([[_holds(claim, study) for claim in said] for study in studies], float)
    number = {claim: k for k, claim in enumerate(said)}
    says = np.zeros((len(studies), len(said)))
    for j, study in enumerate(studies):
        says[j, [number[claim] for claim in study.claims]] = 1.0
    information = -np.log(np.maximum(holds.mean(axis=0), 1.0 / len(studies)))
    wrong = (1 - holds) @ says.T
    has = np.array(
        [[concept in study.groups for concept in CONCEPT_IDS] for study in studies], float
    )
    names = np.array(
        [
            [
                any(c.about == concept and c.value == "present" for c in study.claims)
                for concept in CONCEPT_IDS
            ]
            for study in studies
        ],
        float,
    )
    omitted = has @ (1 - names).T
    return (holds * information) @ says.T - _CONTRADICTION * (wrong + omitted)


def _by_concept(findings: Sequence[FindingTruth | Instance]) -> dict[str, Group]:
    return {group.concept_id: group for group in group_findings(findings)}


def _kept(finding: dict[str, Any]) -> dict[str, Any]:
    return {field.name: finding[field.name] for field in dataclasses.fields(Instance)}


def _holds(claim: Claim, study: Truth) -> bool:
    if claim.about in study.anatomy:
        return study.anatomy[claim.about] == claim.value
    group = study.groups.get(claim.about)
    if claim.value == "absent" or group is None:
        return (claim.value == "absent") == (group is None)
    return all(
        getattr(claim, name) in (None, getattr(group, name))
        for name in ("side", "zone", "size_word", "variant")
    )
