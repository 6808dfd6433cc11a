"""Zero-shot scores of one split: prompts of its labels, three similarities, thresholds from val.

The metrics live in zero_shot.py; here the model meets the manifest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from mlip.batch import ImageFeatures
from mlip.dataloading.manifest import Manifest
from mlip.dataloading.progress import Progress
from mlip.transfer.alignment.label_prompts import lexicon_prompts, phantom_prompts
from mlip.transfer.alignment.prompts import encode_asked
from mlip.transfer.alignment.zero_shot import (
    Prompts,
    Thresholds,
    at_thresholds,
    choose_thresholds,
    combine,
    evaluate_zero_shot,
    exclusive_accuracy,
    finding_scores,
    prompt_texts,
    zero_shot_measures,
)
from mlip.transfer.array import Array
from mlip.transfer.draws import some_of
from mlip.transfer.features import (
    ImageBank,
    TextBank,
    encoded_images,
    global_scores,
    local_scores,
    row_loader,
)
from mlip.transfer.measures.interval import patient_resamples
from mlip.transfer.measures.predictions import Series, of_findings
from mlip.transfer.measures.subgroups import Grouping, subgroup_scores
from mlip.transfer.truth.annotations import Annotations, shared_names
from mlip.transfer.truth.labels import label_matrix, label_names


def zero_shot_run(
    opened: Any,
    annotations: Annotations,
    images: ImageBank,
    groupings: Sequence[Grouping],
    *,
    is_phantom: bool,
) -> tuple[dict[str, Any], list[Series]]:
    """(evaluate_zero_shot of the images, with rates at val's thresholds, scores by subgroup and,
    where the labels exclude each other, accuracy; the scores of every image); ({"reason": why}, [])
    where there is nothing to score against."""
    config, manifest, table = opened.config, annotations.manifest, opened.table
    patients = manifest.patient_key[images.row_index]
    # first: without labels every finding of a generated study would count as absent
    if manifest.label_column is None:
        nor = ", nor to tell by evaluate.subgroups" if config.evaluate.subgroups else ""
        reason = f"data.columns.labels is not set: there is nothing to score against{nor}"
        return {"reason": reason}, []
    if is_phantom:
        prompts, unknown = phantom_prompts(opened.linker, table, config.evaluate)
    else:
        names = label_names(manifest, images.row_index)
        prompts, unknown = lexicon_prompts(names, opened.linker, table, config.evaluate)
    if not prompts:
        return {"reason": "no label of this split names a concept of the table"}, []
    findings = [p.finding for p in prompts]
    bank = encode_asked(opened, prompt_texts(prompts))

    def scores_of(features: ImageFeatures) -> dict[str, Array]:
        return head_scores(opened.model, features, bank, prompts)

    def labels_of(rows: Array) -> Array:
        return label_matrix(annotations, rows, findings, blank_is_negative=is_phantom)

    labels = labels_of(images.row_index)
    scores = scores_of(images.features)
    settings = config.evaluate
    weights = patient_resamples(patients, settings.bootstrap, config.run.seed)
    found = evaluate_zero_shot(scores, labels, prompts, weights)
    thresholds: Thresholds = {}
    if settings.thresholds and settings.split != "val":
        on_val = _val_scores(opened, manifest, scores_of)
        if isinstance(on_val, str):
            found["at_thresholds"] = {"reason": on_val}
        else:
            thresholds = choose_thresholds(on_val[1], labels_of(on_val[0]), settings.threshold_rule)
            told = at_thresholds(scores, labels, thresholds, weights)
            told["findings"] = dict(zip(findings, told["findings"], strict=True))
            found["at_thresholds"] = {"rule": settings.threshold_rule, **told}
    measure = zero_shot_measures(scores, labels, findings, thresholds, weights, patients)
    found["subgroups"] = subgroup_scores(groupings, patients, measure)
    if settings.exclusive:
        found["exclusive"] = exclusive_accuracy(scores, labels, weights)
    # results are passed on: what one patient alone has may be an identifier
    named = sorted(set(unknown) & set(shared_names(manifest)))
    if rare := len(unknown) - len(named):
        named.append(f"{rare} more, each of one patient alone")
    series = [
        one
        for head, values in scores.items()
        for one in of_findings(head, None, findings, images.row_index, labels, values)
    ]
    return {**found, "labels_without_concept": named}, series


def head_scores(
    model: Any, images: ImageFeatures, texts: TextBank, prompts: Sequence[Prompts]
) -> dict[str, Array]:
    """Scores of each head, [images, findings]; texts are those of prompt_texts(prompts)."""
    named = scores_by_head(model, images.embedding, images.patches, texts)
    return {head: finding_scores(value, prompts) for head, value in named.items()}


def scores_by_head(
    model: Any, embedding: Tensor, patches: Tensor, texts: TextBank
) -> dict[str, Array]:
    """{"global", "local", "combined"}: every image with every text, [images, texts] float64."""
    by_global, by_local = global_scores(embedding, texts), local_scores(model, patches, texts)
    scales = (model.scales.logit_scale().item(), model.scales.logit_scale_local().item())
    both = combine(by_global, by_local, *scales)
    return {"global": by_global, "local": by_local, "combined": both}


def _val_scores(
    opened: Any, manifest: Manifest, scores_of: Callable[[ImageFeatures], dict[str, Array]]
) -> tuple[Array, dict[str, Array]] | str:
    """(rows of val whose image can be read, their scores), or why there are none."""
    config = opened.config
    every = manifest.rows("val", with_report=False)
    rows = some_of(every, config.evaluate.max_studies, config.run.seed)
    if len(rows) == 0:
        return "the manifest has no val rows to choose thresholds on"
    # as the scored split is read: another decoder rounds otherwise, beside a threshold too
    loader = row_loader(opened, manifest, "val", rows)
    kept: list[Array] = []
    parts: list[dict[str, Array]] = []
    seen, told = 0, Progress("val images scored for the thresholds")
    for images in encoded_images(opened.model, loader, config.data):
        kept.append(images.row_index)
        parts.append(scores_of(images.features))
        seen += len(images)
        told(seen, len(rows))
    if not parts:
        return "no image of val could be read: there are no thresholds"
    scores = {head: np.concatenate([part[head] for part in parts]) for head in parts[0]}
    return np.concatenate(kept), scores
