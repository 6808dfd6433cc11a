"""Which pairs of val a run is watched by, and that they are read as an evaluation reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlip.assembly import Corpus
from mlip.dataloading.loader import build_loader
from mlip.dataloading.manifest import ManifestError, load_manifest
from mlip.held_out_pairs import batches_of, open_validation
from mlip.settings.config import Config, load
from tests.small_run import small_run, with_val


def watched(folder: Path, *more: str, rows: int) -> tuple[Config, Corpus]:
    """The small run's studies, `rows` of the training ones in split val."""
    run = small_run()
    config = load([], [*run.settings, *with_val(folder, rows), "run.seed=3", *more])
    return config, Corpus(load_manifest(config.data), run.tokenizer, run.table, run.linker)


def test_val_is_read_as_an_evaluation_reads_it(tmp_path: Path) -> None:
    # oracle: the evaluation's own loader, row by row
    config, corpus = watched(tmp_path, "train.monitor=loss", rows=9)
    augment = config.data.augment
    assert augment.random_crop and augment.brightness > 0.0 and augment.sentence_dropout > 0.0
    validation = open_validation(config, corpus)
    assert validation is not None and (validation.batches, validation.pairs) == (1, 9)
    parts: dict[str, Any] = {
        "tokenizer": corpus.tokenizer,
        "linker": corpus.linker,
        "table": corpus.table,
    }
    plain = build_loader(config, corpus.manifest, split="val", train=False, **parts)
    try:
        mine, theirs = next(iter(validation.held_out)), next(iter(plain))
        mine_at, at = mine.row_index.argsort(), theirs.row_index.argsort()
        for name in ("row_index", "image", "token_ids", "token_mask", "entity_ids", "pair_id"):
            left, right = getattr(mine, name)[mine_at], getattr(theirs, name)[at]
            np.testing.assert_array_equal(left.numpy(), right.numpy(), err_msg=name)
    finally:
        validation.close()
        plain.close()


@pytest.mark.parametrize(("rows", "refused"), [(10, True), (11, False)])
def test_recall_at_10_needs_more_than_10_pairs(tmp_path: Path, rows: int, refused: bool) -> None:
    config, corpus = watched(tmp_path, "train.monitor=recall", rows=rows)
    if refused:
        with pytest.raises(ManifestError, match="recall@10 among 10 pairs, which finds all"):
            open_validation(config, corpus)
        return
    validation = open_validation(config, corpus)
    assert validation is not None and validation.pairs == 11
    validation.close()


@pytest.mark.parametrize(
    ("rows", "ranks", "expected"),
    [
        (1000, 1, (1, 1000)),
        (1000, 3, (1, 999)),
        (5000, 1, (1, 1000)),
        (7, 2, (1, 6)),
        (1, 1, (1, 1)),
        (0, 1, (1, 0)),
        (1, 2, (1, 0)),
    ],
)
def test_batches_are_of_one_size_that_ranks_can_share(
    rows: int, ranks: int, expected: tuple[int, int]
) -> None:
    assert batches_of(rows, load([], ["batch.global_pairs=1024"]), ranks) == expected


@pytest.mark.parametrize(("global_pairs", "ranks"), [(2, 1), (2, 2), (3, 1), (8, 8), (12, 4)])
def test_as_many_rows_as_a_batch_must_have_are_always_enough(global_pairs: int, ranks: int) -> None:
    """9 rows on 8 ranks with 8 pairs were two batches of none: "at least 8 rows, there are 9"."""
    for rows in range(40):
        for most in (2, 3, 9, 1000):
            more = [f"batch.global_pairs={global_pairs}", f"train.monitor_pairs={most}"]
            batches, pairs = batches_of(rows, load([], more), ranks)
            wanted = min(rows, most)
            assert pairs % ranks == 0 and pairs <= global_pairs and batches * pairs <= wanted
            assert (pairs >= max(2, ranks)) is (wanted >= max(2, ranks)), (rows, most)


@pytest.mark.parametrize(
    ("rows", "ranks", "pairs", "told"),
    [
        (1, 1, 1000, "needs at least 2 rows with a report in split val, there are 1"),
        (2, 3, 1000, "needs at least 3 rows with a report in split val, there are 2"),
        (9, 3, 2, "train.monitor_pairs=2 on 3 ranks: expected one pair of each"),
    ],
)
def test_too_few_pairs_are_refused_with_what_is_missing(
    rows: int, ranks: int, pairs: int, told: str, tmp_path: Path
) -> None:
    more = ("train.monitor=loss", f"train.monitor_pairs={pairs}", "batch.global_pairs=12")
    config, corpus = watched(tmp_path, *more, rows=rows)
    with pytest.raises(ValueError, match=told):
        open_validation(config, corpus, world_size=ranks)


def test_more_rows_than_a_batch_are_several_equal_ones() -> None:
    config = load([], ["batch.global_pairs=144", "train.monitor_pairs=1000"])
    batches, pairs = batches_of(2000, config, 8)
    assert (batches, pairs) == (7, 136) and pairs <= 144 and pairs % 8 == 0
