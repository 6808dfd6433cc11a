"""evaluate_run: zero-shot, retrieval and grounding of a model on one split, in one pass.

Headline numbers come with n, an interval over patients and what they are to be compared with.
Results are plain JSON values but for "examples", which holds pictures (PNG as base64), and
"predictions", the scores of every image.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mlip.dataloading.manifest import Manifest
from mlip.precision import precision_on
from mlip.settings.config import Config, to_dict
from mlip.transfer.alignment.chosen_rows import rows_in_split
from mlip.transfer.alignment.encoded_split import encode_split
from mlip.transfer.alignment.examples import collect_examples
from mlip.transfer.alignment.grounding import POINTING, evaluate_grounding
from mlip.transfer.alignment.patch_maps import PhraseMaps
from mlip.transfer.alignment.prompts import encode_asked
from mlip.transfer.alignment.prototypes import prototype_statistics
from mlip.transfer.alignment.queries import make_prior, make_queries
from mlip.transfer.alignment.retrieval import AMONG
from mlip.transfer.alignment.retrieval_run import retrieval_run
from mlip.transfer.alignment.statistics import knowledge_statistics, pair_statistics
from mlip.transfer.alignment.zero_shot_run import zero_shot_run
from mlip.transfer.array import Array
from mlip.transfer.draws import some_of
from mlip.transfer.features import device_of
from mlip.transfer.fingerprint import fingerprints, run_name, source_commit, versions
from mlip.transfer.measures.mark_subgroups import mark_subgroups
from mlip.transfer.measures.predictions import Series, of_marks, predictions_of
from mlip.transfer.measures.subgroups import read_groupings
from mlip.transfer.trained_heads import is_local_trained
from mlip.transfer.trained_on import Training, find_seen
from mlip.transfer.truth import finding_boxes, generated
from mlip.transfer.truth.annotations import Annotations, check_labels
from mlip.transfer.truth.finding_masks import load_masks

SCHEMA = 1


def evaluate_run(opened: Any, config: Config, manifest: Manifest) -> dict[str, Any]:
    """Every score of an open model (mlip.pretrained) on config.evaluate.split.

    config  the settings to evaluate by; those of `opened` are of its training
    Returns: {"schema", "run", "data", "zero_shot", "retrieval", "grounding", "knowledge",
             "prototypes", "pairs", "fingerprints", "versions", "config", "examples",
             "predictions"}; a task that
             the data cannot carry is {"reason": why}
    Raises:  ValueError if features are not finite, or boxes.csv is not usable.
    """
    began, commit = time.perf_counter(), source_commit()  # first: it may refuse MLIP_COMMIT
    # rows without a usable report are no pairs, but their labels and boxes count
    manifest = dataclasses.replace(manifest, keep_without_report=True)
    model, training = opened.model, Training.of(opened)
    was_training = bool(model.training)
    model.eval()
    try:
        asked = dataclasses.replace(opened, config=config)
        rows, results = _evaluate(asked, manifest, training)
    finally:
        model.train(was_training)
    facts = {
        **opened.facts,  # first: those of an export are of whoever wrote it
        "name": run_name(config),
        "seed": config.run.seed,  # of the prompts' images, the pools and the resamples
        "split": config.evaluate.split,
        "device": str(device_of(model)),
        "precision": _precision(model),
        "is_local_trained": is_local_trained(opened),
        "commit": commit,
        "evaluation_seconds": round(time.perf_counter() - began, 1),
    }
    return {
        "schema": SCHEMA,
        "run": facts,
        **results,
        "fingerprints": fingerprints(model, config, manifest, opened.tokenizer, opened.table, rows),
        "versions": versions(),
        "config": to_dict(config),
    }


def _evaluate(opened: Any, manifest: Manifest, training: Training) -> tuple[Array, dict[str, Any]]:
    """(manifest rows that were scored, results)"""
    config, model, table = opened.config, opened.model, opened.table
    check_labels(config, manifest)
    in_split = rows_in_split(config, manifest)
    rows = some_of(in_split, config.evaluate.max_studies, config.run.seed)
    read_groupings(config, manifest, rows)  # refused before the images are encoded
    seen = find_seen(config, manifest, [training])
    # as well, where a file tells of boxes outside their images
    boxes = finding_boxes.load_boxes(config, manifest, rows.tolist())
    split = encode_split(opened, manifest, rows)
    images, reports, with_text = split.images, split.reports, split.with_text
    is_phantom = generated.phantom_size(manifest) is not None
    patients = manifest.patient_key[images.row_index]
    oracle = generated.oracle(manifest, images.row_index[with_text]) if is_phantom else None
    masks = load_masks(config, manifest, images.row_index.tolist())
    annotations = Annotations(config, manifest)
    queries, phrases, names = make_queries(
        images, annotations, boxes, table, is_phantom, config.run.seed, masks
    )
    # words of a report stand in no message
    holds_reports = any(query.kind == "phrase" for query in queries)
    bank = encode_asked(opened, phrases, cut=holds_reports) if phrases else None
    maps = None if bank is None else PhraseMaps(model, images.features.patches, bank)
    groupings = read_groupings(config, manifest, images.row_index)
    zero_shot, series = zero_shot_run(opened, annotations, images, groupings, is_phantom=is_phantom)

    def keep(method: str, what: str, measure: str, places: Array, marks: Array) -> None:
        if method != "oracle":
            series.append(of_marks(method, None, what, measure, images.row_index[places], marks))

    results: dict[str, Any] = {
        "data": {
            "is_phantom": is_phantom,
            "rows_in_split": len(in_split),
            "rows_asked": len(rows),
            "images": len(images),
            "unreadable": split.unreadable,
            "reports": len(with_text),
            "patients": len(np.unique(patients)),
            "trained_on": seen.of(images.row_index),
        },
        "zero_shot": zero_shot,
        "retrieval": retrieval_run(opened, manifest, split, oracle=oracle, keep=keep),
        "grounding": {"reason": "no boxes.csv with boxes of these images beside the manifest"}
        if maps is None
        else evaluate_grounding(
            maps,
            queries,
            patients,
            grid=images.features.grid,
            size=images.pixels.shape[1:],
            prior=make_prior(config, manifest, images.pixels.shape[1:]),
            names=names,
            bootstrap=config.evaluate.bootstrap,
            seed=config.run.seed,
            keep=keep,
        ),
        "knowledge": knowledge_statistics(
            *(split.mentions, len(with_text), table, opened.linker),
            (manifest.text(int(row)) for row in images.row_index[with_text]),
            config.data.max_entities,
        ),
        "prototypes": prototype_statistics(
            opened.prototypes,
            {
                "image": (images.features.embedding, split.has_text),
                "report": (reports.text.embedding, split.has_text),
                "entities": (
                    reports.knowledge.present_mean,
                    reports.knowledge.has_present.numpy(),
                ),
            },
            split.mentions,
            len(images.row_index),
            table,
            config.run.seed,
        ),
        "pairs": pair_statistics(config, manifest, opened.tokenizer, opened.linker, table),
    }
    for part, marks in _marks(series, names).items():
        found = results["retrieval"] if part == "retrieval" else results["grounding"][part]
        found["subgroups"] = mark_subgroups(
            *(marks, groupings, images.row_index, patients),
            bootstrap=config.evaluate.bootstrap,
            seed=config.run.seed,
        )
    results["examples"] = collect_examples(
        *(opened, manifest, split),
        queries=queries,
        phrases=phrases,
        maps=maps,
        boxes=boxes,
        names=names,
        is_phantom=is_phantom,
    )
    results["predictions"] = predictions_of(
        *(series, config, manifest, config.evaluate.split, images.row_index),
        precision=_precision(model),
    )
    return images.row_index, results


def _precision(model: Any) -> str:
    """What the towers compute in here: "bf16" or "fp32"."""
    return precision_on(model.config.train.precision, device_of(model), is_training=False)


def _marks(
    series: Sequence[Series], names: Mapping[str, str]
) -> dict[str, list[tuple[str, str, Series]]]:
    """What is told by group, beside zero-shot: of "retrieval" each head's recall@10 by direction,
    of each kind of phrase the hits by finding."""
    found: dict[str, list[tuple[str, str, Series]]] = {}
    for one in series:
        if one.measure == "recall@10":
            direction = one.finding.partition(AMONG)[0]
            found.setdefault("retrieval", []).append((direction, one.method, one))
        elif one.measure == "hit":
            kind, name = one.method.removeprefix(POINTING), names.get(one.finding)
            found.setdefault(kind, []).append((name or one.finding, "hit", one))
    return found
