"""Which pairs of val a run is watched by (train.monitor), and how they are read."""

from __future__ import annotations

import dataclasses

from mlip.assembly import Corpus
from mlip.dataloading.loader import build_loader
from mlip.dataloading.manifest import ManifestError
from mlip.losses.held_out import RECALL_AT
from mlip.settings.config import Augment, Config, ConfigError
from mlip.training.validation import Validation

_AS_THEY_ARE = Augment(
    random_crop=False, brightness=0.0, contrast=0.0, rotation_degrees=0.0, sentence_dropout=0.0
)


def open_validation(
    config: Config, corpus: Corpus, *, rank: int = 0, world_size: int = 1
) -> Validation | None:
    """What scores checkpoints on val, where train.monitor asks for it; on every rank.

    Raises:  ConfigError where train.monitor_pairs has none for some rank; ManifestError where val
             has too few rows with a report.
    """
    if config.train.monitor == "none":
        return None
    if config.train.monitor_pairs < world_size:
        raise ConfigError(
            f"train.monitor_pairs={config.train.monitor_pairs} on {world_size} ranks: expected one "
            f"pair of each or more; set it to {world_size} or more"
        )
    rows = len(corpus.manifest.rows("val"))
    batches, pairs = batches_of(rows, config, world_size)
    if pairs < 2:
        raise ManifestError(
            f"manifest {corpus.manifest.path}: train.monitor={config.train.monitor} needs at least "
            f"{max(2, world_size)} rows with a report in split val, there are {rows}; give it some "
            "(data.columns.split), or set train.monitor=none"
        )
    if config.train.monitor == "recall" and pairs <= RECALL_AT:
        raise ManifestError(
            f"manifest {corpus.manifest.path}: train.monitor=recall is recall@{RECALL_AT} among "
            f"{pairs} pairs, which finds all; give val more rows, raise train.monitor_pairs and "
            "batch.global_pairs, or set train.monitor=loss"
        )
    data = dataclasses.replace(config.data, augment=_AS_THEY_ARE)
    loader = build_loader(
        dataclasses.replace(config, data=data),
        corpus.manifest,
        split="val",
        train=True,  # equal batches on all ranks: what cannot be read is replaced
        rank=rank,
        world_size=world_size,
        tokenizer=corpus.tokenizer,
        linker=corpus.linker,
        table=corpus.table,
        global_pairs=pairs,
    )
    loader.ledger.bad_share = 1.0  # as an evaluation's: bad images of val are named, and end no run
    return Validation(config, loader, batches=batches, pairs=pairs)


def batches_of(rows: int, config: Config, ranks: int) -> tuple[int, int]:
    """(batches, pairs of each) that train.monitor_pairs asks for among this many rows.

    All are of one size, at most batch.global_pairs and a multiple of the ranks: a loss among other
    numbers of pairs is another loss, and GPUs exchange equal shares. Rows that fill no share of
    every rank are left out.
    """
    wanted, largest = min(rows, config.train.monitor_pairs), config.batch.global_pairs
    # rather a full batch, and some rows left out, than two that some rank has nothing of
    batches = max(1, min(-(-wanted // largest), wanted // max(2, ranks)))
    return batches, min(largest, wanted // batches) // ranks * ranks
