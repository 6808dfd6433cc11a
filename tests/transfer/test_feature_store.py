"""Features of batches as one bank: the same in memory and in files, which leave nothing behind."""

from __future__ import annotations

import errno
import os
import tempfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from mlip.batch import ImageFeatures, KnowledgeFeatures, TextFeatures
from mlip.dataloading.ledger import DataError
from mlip.transfer import feature_store
from mlip.transfer.alignment.evaluation import evaluate_run
from mlip.transfer.feature_store import FeatureStore
from mlip.transfer.features import ImageBank, TextBank
from tests.small_run import small_results, small_run

D, PATCHES = 8, 6


def batch(
    rows: int, tokens: int, entities: int, *, patches: int = PATCHES, attends: bool = True
) -> tuple[ImageBank, TextBank]:
    """Random features whose reports fill their batch's width."""
    images = ImageBank(
        ImageFeatures(torch.randn(rows, D), torch.randn(rows, patches, D), (1, patches)),
        row_index=np.arange(rows, dtype=np.int64) + 7,
        pixels=np.random.default_rng(rows).integers(0, 256, (rows, 4, 5)).astype(np.uint8),
    )
    texts = TextBank(
        TextFeatures(
            torch.randn(rows, D),
            torch.randn(rows, tokens, D),
            torch.rand(rows, tokens) if attends else None,
        ),
        content_mask=torch.ones(rows, tokens, dtype=torch.bool),
        knowledge=KnowledgeFeatures(
            entities=torch.randn(rows, entities, D),
            mask=torch.ones(rows, entities, dtype=torch.bool),
            row_weights=torch.rand(rows, entities),
            present_mean=torch.randn(rows, D),
            has_present=torch.tensor([True, False]).repeat(rows)[:rows],
        ),
    )
    return images, texts


def padded(parts: list[torch.Tensor], width: int) -> torch.Tensor:
    grown = [torch.zeros(len(part), width, *part.shape[2:], dtype=part.dtype) for part in parts]
    for whole, part in zip(grown, parts, strict=True):
        whole[:, : part.shape[1]] = part
    return torch.cat(grown)


@pytest.mark.parametrize("in_memory", [1e9, 0])
@pytest.mark.parametrize("attends", [True, False])
def test_banks_are_the_batches_one_after_another(in_memory: float, attends: bool) -> None:
    """As wide as the longest report there is, zero beyond a shorter batch; images may be lost."""
    parts = [batch(rows, t, k, attends=attends) for rows, t, k in ((3, 5, 2), (1, 7, 1), (4, 4, 3))]
    store = FeatureStore(20, max_tokens=9, max_entities=4, in_memory=in_memory)
    for images, texts in parts:
        store.add(images, texts)
    assert store.is_in_files == (in_memory == 0)
    images, texts = store.banks()
    assert len(images) == len(texts) == 8 and images.features.grid == (1, PATCHES)
    of_images, of_texts = zip(*parts, strict=True)
    for name in ("embedding", "patches"):
        expected = torch.cat([getattr(part.features, name) for part in of_images])
        assert torch.equal(getattr(images.features, name), expected)
    assert images.row_index.tolist() == [7, 8, 9, 7, 7, 8, 9, 10]
    assert np.array_equal(images.pixels, np.concatenate([part.pixels for part in of_images]))
    text, knowledge = texts.text, texts.knowledge
    assert torch.equal(text.embedding, torch.cat([part.text.embedding for part in of_texts]))
    assert torch.equal(text.tokens, padded([part.text.tokens for part in of_texts], 7))
    if attends:
        assert torch.equal(text.attention, padded([p.text.attention for p in of_texts], 7))
    else:
        assert text.attention is None
    assert torch.equal(texts.content_mask, padded([p.content_mask for p in of_texts], 7))
    for name in ("entities", "mask", "row_weights"):
        expected = padded([getattr(part.knowledge, name) for part in of_texts], 3)
        assert torch.equal(getattr(knowledge, name), expected)
    for name in ("present_mean", "has_present"):
        expected = torch.cat([getattr(part.knowledge, name) for part in of_texts])
        assert torch.equal(getattr(knowledge, name), expected)


def test_rows_in_files_take_no_memory_and_leave_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    images, texts = batch(16, 8, 2, patches=1000)
    one = images.features.patches.nbytes
    store = FeatureStore(16 * 40, max_tokens=8, max_entities=2, in_memory=20 * one)
    tracemalloc.start()
    for _ in range(40):
        store.add(images, texts)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert store.is_in_files and peak < one
    assert not list(tmp_path.iterdir())
    assert torch.equal(store.banks()[0].features.patches[-16:], images.features.patches)


def test_a_disk_without_room_is_named_before_anything_is_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    store = FeatureStore(10**7, max_tokens=9, max_entities=4, in_memory=2**30)
    with pytest.raises(ValueError, match=r"GiB of memory, .* no room .*TMPDIR.*max_studies"):
        store.add(*batch(2, 5, 1))


def test_no_image_at_all_is_an_error() -> None:
    with pytest.raises(DataError, match="none of the images could be read"):
        FeatureStore(3, max_tokens=9, max_entities=4).banks()


def test_an_evaluation_from_files_scores_what_one_in_memory_scores(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(feature_store, "IN_MEMORY", 0.0)
    run, expected = small_run(), small_results()
    found = evaluate_run(run, run.config, run.manifest)
    for part in ("data", "zero_shot", "retrieval", "grounding", "knowledge"):
        assert found[part] == expected[part]
