"""The batches of the whole-step benchmark are a loader's in everything that takes time."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from benchmarks.step_batch import FILL, made_batch, padding_share, report_lengths
from mlip.assembly import Corpus, open_loader
from mlip.batch import Batch
from mlip.settings.config import load
from tests.small_run import small_run


@cache
def _real_batch() -> tuple[Batch, Any]:
    """A batch of the project's loader in three channels, and its settings."""
    run = small_run()
    config = load([], [*run.settings, "data.channels=3", "batch.global_pairs=16"])
    loader = open_loader(config, Corpus(run.manifest, run.tokenizer, run.table, run.linker))
    try:
        return next(iter(loader)), config
    finally:
        loader.close()


def _claims(batch: Batch) -> dict[str, Any]:
    """What is true of a batch beside its sizes."""
    lengths = batch.token_mask.sum(dim=1)
    place = torch.arange(batch.token_mask.shape[1])
    tensors = vars(batch.to("cpu"))  # as an engine has it
    return {
        "types": {name: value.dtype for name, value in tensors.items()},
        "dimensions": {name: value.ndim for name, value in tensors.items()},
        "one grey channel": batch.image.stride(1) == 0,
        "image": tuple(batch.image.shape[1:]),
        "padding behind": torch.equal(batch.token_mask, place < lengths[:, None]),
        "no first and last": torch.equal(
            batch.content_mask, (place > 0) & (place < lengths[:, None] - 1)
        ),
        "as wide as the longest": int(lengths.max()) == batch.token_ids.shape[1],
        "as many entities as the most": int(batch.entity_mask.sum(dim=1).max())
        == batch.entity_ids.shape[1],
        "entities in front": torch.equal(
            batch.entity_mask,
            torch.arange(batch.entity_mask.shape[1]) < batch.entity_mask.sum(dim=1)[:, None],
        ),
        "nothing masked": int(batch.entity_ids[~batch.entity_mask].abs().sum()) == 0,
        "padding": set(batch.token_ids[~batch.token_mask].tolist()),
    }


def test_a_made_batch_is_what_the_loader_makes() -> None:
    real, config = _real_batch()
    run = small_run()
    made = made_batch(
        config, len(real), vocab_size=run.tokenizer.vocab_size, concepts=len(run.table)
    )
    assert _claims(made) == _claims(real)
    assert int(made.token_ids.max()) < run.tokenizer.vocab_size
    assert int(made.entity_ids.max()) < len(run.table)


def test_reports_fill_half_of_the_tokens() -> None:
    lengths = report_lengths(4096, 112, torch.Generator().manual_seed(3))
    assert float(lengths.double().mean()) == pytest.approx(FILL * 112, rel=0.03)
    assert int(lengths.min()) >= 8 and int(lengths.max()) == 112
    # of a gamma distribution of shape 6, cut at both ends
    assert float(lengths.double().std()) == pytest.approx(FILL * 112 / 6**0.5, rel=0.1)
    config = load([], ["data.crop_px=16"])
    batch = made_batch(config, 4096, vocab_size=100, concepts=10)
    assert padding_share(batch) == pytest.approx(0.5, abs=0.02)
    assert len(batch.pair_id.unique()) == 4096 - 82  # one study in fifty has two images
    other = made_batch(config, 4096, vocab_size=100, concepts=10, seed=1)
    both = torch.cat([batch.global_index, other.global_index])
    assert both.tolist() == list(range(8192))  # no noise is drawn twice
