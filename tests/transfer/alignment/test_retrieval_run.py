"""Retrieval of a split in which some images have no report."""

from __future__ import annotations

import copy
import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mlip.transfer.alignment.encoded_split import encode_split
from mlip.transfer.alignment.large_retrieval import class_precision
from mlip.transfer.alignment.retrieval_run import _by_class, _PoolScores, retrieval_run
from mlip.transfer.array import Array
from tests.small_run import small_run


def test_images_without_a_report_change_nothing_for_those_that_have_one() -> None:
    # oracle: a split of the images with a report alone
    run = small_run()
    evaluate = dataclasses.replace(run.config.evaluate, retrieval_pool=8, bootstrap=50)
    config = dataclasses.replace(run.config, evaluate=evaluate)
    rows = run.manifest.rows("test")
    has_text = np.flatnonzero(np.arange(len(rows)) % 3 > 0)
    found: list[tuple[dict[str, Any], list[tuple[Any, ...]]]] = []
    for chosen, with_text in ((rows, has_text), (rows[has_text], np.arange(len(has_text)))):
        opened = dataclasses.replace(run, config=config)
        split = encode_split(opened, run.manifest, chosen)
        kept: list[tuple[Any, ...]] = []

        def keep(
            method: str,
            what: str,
            measure: str,
            at: Array,
            marks: Array,
            kept: list[tuple[Any, ...]] = kept,
            row_index: Array = split.images.row_index,
        ) -> None:
            kept.append((method, what, measure, row_index[at].tolist(), marks.tolist()))

        # every second pair is right for the one before: an order that a prefix does not have
        asked = dataclasses.replace(
            split,
            has_text=np.isin(np.arange(len(chosen)), with_text),
            pair_id=np.searchsorted(rows, split.images.row_index) // 2,
        )
        told = retrieval_run(opened, run.manifest, asked, oracle=None, keep=keep)
        found.append((told, kept))
    assert found[0] == found[1]
    told, kept = found[0]
    assert told["n"] == len(has_text) // 8 * 8 and len(kept) == 3 * 2 * 3


def test_class_precision_is_among_the_rows_of_exactly_one_label() -> None:
    # oracle: the same embeddings without the other rows
    run, generator = small_run(), torch.Generator().manual_seed(0)
    image, text = F.normalize(torch.randn(2, 40, 8, generator=generator), dim=2)
    names = [["a"], ["b"], [], ["a", "b"]]
    labels = [names[(7 * row) % 11 % 4] for row in range(40)]
    manifest: Any = SimpleNamespace(label_column="labels", labels=lambda row: labels[row])
    patients = np.arange(40) // 3
    found = _by_class(run.config, manifest, np.arange(40), (image, text), patients)
    one = np.array([row for row in range(40) if len(labels[row]) == 1])
    classes = np.array([labels[row][0] for row in one])
    settings: dict[str, Any] = {
        "bootstrap": run.config.evaluate.bootstrap,
        "seed": run.config.run.seed,
    }
    for direction, query, candidate in (
        ("image_to_text", image[one], text[one]),
        ("text_to_image", text[one], image[one]),
    ):
        parts = (query, candidate, classes, classes, patients[one])
        assert found[direction] == class_precision(*parts, **settings)
    assert found["image_to_text"] != found["text_to_image"]


def test_both_heads_together_weigh_by_the_scales_that_their_losses_learned() -> None:
    """Of an untrained model both are one number, with which no order tells them apart."""
    run = small_run()
    model = copy.deepcopy(run.model)
    model.scales.stored["log_scale"].data.fill_(np.log(30.0))
    model.scales.stored["log_scale_local"].data.fill_(np.log(4.0))
    rows = run.manifest.rows("test")[:9]
    split = encode_split(dataclasses.replace(run, model=model), run.manifest, rows)
    found = _PoolScores(model, split, None)(np.arange(2, 7))
    assert found["global"].shape == (5, 5)
    expected = 30.0 * found["global"] + 4.0 * found["local"]
    assert found["combined"] == pytest.approx(expected, rel=1e-5)
