"""evaluate_run: zero-shot, retrieval and grounding of a model on one split, in one pass.

Headline numbers come with n, an interval over patients and what they are to be compared with.
Results are plain JSON values but for "examples", which holds pictures (PNG as base64), and
"predictions", the scores of every image.
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlip.config import Config, to_dict
from mlip.dataloading.loader import build_loader
from mlip.dataloading.manifest import Manifest
from mlip.dataloading.progress import Progress
from mlip.precision import precision_on
from mlip.transfer.alignment.chosen_rows import rows_in_split, some_of
from mlip.transfer.alignment.examples import collect_examples
from mlip.transfer.alignment.grounding import POINTING, evaluate_grounding
from mlip.transfer.alignment.patch_maps import PhraseMaps
from mlip.transfer.alignment.prompts import encode_prompts, warn_of_unknown_words
from mlip.transfer.alignment.prototypes import prototype_statistics
from mlip.transfer.alignment.queries import make_prior, make_queries
from mlip.transfer.alignment.retrieval import AMONG
from mlip.transfer.alignment.retrieval_run import retrieval_run
from mlip.transfer.alignment.statistics import knowledge_statistics, pair_statistics
from mlip.transfer.alignment.zero_shot_run import zero_shot_run
from mlip.transfer.array import Array
from mlip.transfer.feature_store import FeatureStore
from mlip.transfer.features import (
    ImageBank,
    TextBank,
    encoded,
    require_finite,
)
from mlip.transfer.fingerprint import fingerprints, run_name, source_commit, versions
from mlip.transfer.measures.mark_subgroups import mark_subgroups
from mlip.transfer.measures.predictions import Series, of_marks, predictions_of
from mlip.transfer.measures.subgroups import read_groupings
from mlip.transfer.trained_heads import learns_local
from mlip.transfer.trained_on import Training, find_seen
from mlip.transfer.truth import finding_boxes, generated
from mlip.transfer.truth.annotations import Annotations, check_labels
from mlip.transfer.truth.finding_masks import load_masks
from mlip.transfer.truth.generated import phantom_meta

SCHEMA = 1


def evaluate_run(
    model: Any,
    config: Config,
    manifest: Manifest,
    tokenizer: Any,
    linker: Any,
    table: Any,
    *,
    device: torch.device | str = "cpu",
    run: Mapping[str, Any] | None = None,
    prototypes: Tensor | None = None,
    training: Training | None = None,
) -> dict[str, Any]:
    """Every score of the model on config.evaluate.split.

    run      facts to keep with the numbers: step, pairs_seen, checkpoint, name, is_local_trained
    prototypes  [C, D] of the category level, where the checkpoint holds them
    training    what the checkpoint tells of the rows that it was trained on
    Returns: {"schema", "run", "data", "zero_shot", "retrieval", "grounding", "knowledge",
             "prototypes", "pairs", "fingerprints", "versions", "config", "examples",
             "predictions"}; a task that
             the data cannot carry is {"reason": why}
    Raises:  ValueError if features are not finite, or boxes.csv is not usable.
    """
    began = time.perf_counter()
    # rows without a usable report are no pairs, but their labels and boxes count
    manifest = dataclasses.replace(manifest, keep_without_report=True)
    device = torch.device(device)
    was_training = bool(model.training)
    model.eval()
    try:
        rows, results = _evaluate(
            *(model, config, manifest, tokenizer, linker, table, device, prototypes, training)
        )
    finally:
        model.train(was_training)
    facts = {
        "name": run_name(config),
        "seed": config.run.seed,  # of the prompts' images, the pools and the resamples
        "split": config.evaluate.split,
        "device": str(device),
        "precision": _precision(model, device),
        "is_local_trained": learns_local(config.loss),
        "commit": source_commit(),
        **(run or {}),
        "evaluation_seconds": round(time.perf_counter() - began, 1),
    }
    return {
        "schema": SCHEMA,
        "run": facts,
        **results,
        "fingerprints": fingerprints(model, config, manifest, tokenizer, table, rows),
        "versions": versions(),
        "config": to_dict(config),
    }


@torch.no_grad()
def encode_split(
    model: Any,
    config: Config,
    manifest: Manifest,
    rows: Array,
    tokenizer: Any,
    linker: Any,
    table: Any,
    device: torch.device,
) -> tuple[ImageBank, TextBank, dict[str, Array], dict[str, int]]:
    """Images and reports of the rows, the per-row arrays tasks need beside them, and the rows whose
    image cannot be read, or is too dark for `mlip prepare`, counted by reason.

    Raises:  ValueError where features hold NaN or infinite values, or find no room.
    """
    loader = build_loader(
        config,
        manifest,
        split=config.evaluate.split,
        train=False,
        tokenizer=tokenizer,
        linker=linker,
        table=table,
        with_report=False,
        rows=rows,
        global_pairs=min(128, max(1, len(rows))),
        refuses_dark=True,  # the model would see black, and be scored
    )
    store = FeatureStore(
        len(rows), max_tokens=config.data.max_tokens, max_entities=config.data.max_entities
    )
    has_text: list[Array] = []
    mentions: list[Array] = []
    seen = 0
    told = Progress("images and reports encoded")
    for batch, image, text in encoded(model, loader, config.data, device):
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
    images, texts = store.banks()
    beside = {
        # not the loader's, which knowledge.pair_id_by_concepts widens for training
        "pair_id": manifest.pair_id[images.row_index],
        "has_text": np.concatenate(has_text),
        "mentions": np.concatenate(mentions),
    }
    return images, texts, beside, dict(Counter(loader.ledger.bad.values()))


def _evaluate(
    model: Any,
    config: Config,
    manifest: Manifest,
    tokenizer: Any,
    linker: Any,
    table: Any,
    device: torch.device,
    prototypes: Tensor | None,
    training: Training | None,
) -> tuple[Array, dict[str, Any]]:
    """(manifest rows that were scored, results)"""
    check_labels(config, manifest)
    in_split = rows_in_split(config, manifest)
    rows = some_of(in_split, config)
    read_groupings(config, manifest, rows)  # refused before the images are encoded
    seen = find_seen(config, manifest, [training] if training else [])
    # as well, where a file tells of boxes outside their images
    boxes = finding_boxes.load_boxes(config, manifest, rows.tolist())
    images, reports, beside, unreadable = encode_split(
        model, config, manifest, rows, tokenizer, linker, table, device
    )
    meta = phantom_meta(manifest)
    patients = manifest.patient_key[images.row_index]
    is_phantom = meta is not None

    def encode(phrases: list[str], cut: bool = False) -> TextBank:
        warn_of_unknown_words(tokenizer, phrases)
        return encode_prompts(
            model,
            phrases,
            config=config,
            tokenizer=tokenizer,
            linker=linker,
            table=table,
            device=device,
            cut=cut,
        )

    with_text = np.flatnonzero(beside["has_text"])
    oracle = generated.oracle(manifest, images.row_index[with_text]) if is_phantom else None
    masks = load_masks(config, manifest, images.row_index.tolist())
    annotations = Annotations(config, manifest)
    queries, phrases, names = make_queries(
        images, annotations, boxes, table, is_phantom, config.run.seed, masks
    )
    # words of a report stand in no message
    holds_reports = any(query.kind == "phrase" for query in queries)
    bank = encode(phrases, cut=holds_reports) if phrases else None
    maps = None if bank is None else PhraseMaps(model, images.features.patches, bank)
    groupings = read_groupings(config, manifest, images.row_index)
    zero_shot, series = zero_shot_run(
        *(model, config, annotations, images, patients, groupings, encode, linker, table),
        is_phantom=is_phantom,
        device=device,
    )

    def keep(method: str, what: str, measure: str, places: Array, marks: Array) -> None:
        if method != "oracle":
            series.append(of_marks(method, None, what, measure, images.row_index[places], marks))

    results: dict[str, Any] = {
        "data": {
            "is_phantom": is_phantom,
            "rows_in_split": len(in_split),
            "rows_asked": len(rows),
            "images": len(images),
            "unreadable": unreadable,
            "reports": len(with_text),
            "patients": len(np.unique(patients)),
            "trained_on": seen.of(images.row_index),
        },
        "zero_shot": zero_shot,
        "retrieval": retrieval_run(
            *(model, config, manifest, images, reports, with_text, beside["pair_id"]),
            device=device,
            oracle=oracle,
            keep=keep,
        ),
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
            *(beside["mentions"], len(with_text), table, linker),
            texts=(manifest.text(int(row)) for row in images.row_index[with_text]),
            most=config.data.max_entities,
        ),
        "prototypes": prototype_statistics(
            prototypes,
            {
                "image": (images.features.embedding, beside["has_text"]),
                "report": (reports.text.embedding, beside["has_text"]),
                "entities": (
                    reports.knowledge.present_mean,
                    reports.knowledge.has_present.numpy(),
                ),
            },
            beside["mentions"],
            table,
            patients,
            config.run.seed,
        ),
        "pairs": pair_statistics(config, manifest, tokenizer, linker, table),
    }
    for part, marks in _marks(series, names).items():
        found = results["retrieval"] if part == "retrieval" else results["grounding"][part]
        found["subgroups"] = mark_subgroups(
            *(marks, groupings, images.row_index, patients),
            bootstrap=config.evaluate.bootstrap,
            seed=config.run.seed,
        )
    results["examples"] = collect_examples(
        model,
        config,
        manifest,
        images,
        reports,
        with_text,
        beside["pair_id"],
        queries=queries,
        phrases=phrases,
        maps=maps,
        boxes=boxes,
        names=names,
        tokenizer=tokenizer,
        shows_text=is_phantom or config.evaluate.show_text,
        shows_id=is_phantom,
    )
    results["predictions"] = predictions_of(
        *(series, config, manifest, config.evaluate.split, images.row_index),
        precision=_precision(model, device),
    )
    return images.row_index, results


def _precision(model: Any, device: torch.device) -> str:
    """What the towers compute in here: "bf16" or "fp32"."""
    return precision_on(model.config.train.precision, device, is_training=False)


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
