"""build_loader(config, manifest, ...): an iterator of Batch with exact resume and a ledger.

A background thread prepares data.prefetch batches ahead; what it prepared but nobody took is not
in the state, so resuming at step s repeats nothing and skips nothing.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mlip.batch import PRESENT, Batch
from mlip.dataloading.ledger import Ledger, listed
from mlip.dataloading.manifest import Manifest, ManifestError
from mlip.dataloading.pair_ids import IntArray, connect
from mlip.dataloading.pipelines.producer import Producer
from mlip.dataloading.pipelines.sampler import Plan, SequentialOrder, TrainingOrder
from mlip.dataloading.pipelines.samples import Images, SampleReader
from mlip.dataloading.pipelines.transforms import Transform
from mlip.dataloading.reports.batch import compose_batch, draw_sentences
from mlip.dataloading.reports.encoder import MAX_CACHE_BYTES, ReportEncoder
from mlip.dataloading.text_hash import HashArray
from mlip.settings.config import Config

logger = logging.getLogger("mlip")

_MANY_REPORTS = 100_000  # to link them takes longer than anybody waits without a word
MOST_TOLD = 50  # lines of a rank on bad images: of a million images a hundredth may be bad


class Pipeline(Protocol):
    """What turns a Plan into images: TorchPipeline or DaliPipeline."""

    name: str

    def load(self, plan: Plan) -> Images: ...

    def close(self) -> None: ...


class Loader:
    """Batches of one rank: endless when training, once through otherwise.

    Iterating again goes on at the next step (training) or from the start (evaluation).
    """

    def __init__(
        self,
        order: TrainingOrder | SequentialOrder,
        pipeline: Pipeline,
        encoder: ReportEncoder,
        manifest: Manifest,
        pair_id: IntArray,
        ledger: Ledger,
        *,
        seed: int,
        sentence_dropout: float,
        prefetch: int,
        timeout_s: float,
    ) -> None:
        self.order, self.pipeline, self.encoder = order, pipeline, encoder
        self.manifest, self.pair_id, self.ledger = manifest, pair_id, ledger
        self.seed, self.sentence_dropout = seed, sentence_dropout
        self.prefetch = prefetch
        self.timeout_s = timeout_s  # longest wait for one batch
        self.step = 0  # of the next batch
        self.wait_seconds = 0.0  # how long the last next() waited for data
        self._told = 0  # bad images that the log was to name
        self._producer: Producer | None = None
        self._gpu = torch.cuda.current_device() if torch.cuda.is_available() else None

    @property
    def is_training(self) -> bool:
        return isinstance(self.order, TrainingOrder)

    @property
    def num_rows(self) -> int:
        """Rows of the split that no rule excludes, over all ranks."""
        return len(self.order.rows)

    def __iter__(self) -> Iterator[Batch]:
        if not self.is_training:
            self.rewind()
        return self

    def __next__(self) -> Batch:
        if isinstance(self.order, SequentialOrder) and self.step >= self.order.num_steps:
            self._stop()
            raise StopIteration
        begin = time.perf_counter()
        if self._producer is None:
            order = self.order
            last = order.num_steps if isinstance(order, SequentialOrder) else None
            self._producer = Producer(self.make, self.step, last, self.prefetch)
        batch, images, plan = self._producer.take(self.timeout_s)
        self.wait_seconds = time.perf_counter() - begin
        self._account(images, plan)
        self.step += 1
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Next step, what the order depends on, and this rank's ledger; JSON-ready."""
        return {"step": self.step, "order": self._order_key(), "ledger": self.ledger.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on at the saved step, on any number of ranks.

        `state` is merge_states of all ranks' states: rank 0 takes its counts, the others start
        theirs at zero, so the sum over ranks stays right.
        Raises:  ValueError if the state belongs to another order of rows; TypeError, KeyError or
                 AttributeError where it is none.
        """
        saved, mine = state["order"], self._order_key()
        if saved != mine:
            keys = sorted(k for k in mine.keys() | saved.keys() if mine.get(k) != saved.get(k))
            raise ValueError(
                "loader state: expected the same "
                + ", ".join(f"{k} (saved {saved.get(k)!r}, now {mine.get(k)!r})" for k in keys)
                + ": resume with the manifest and settings of the saved run, or start a new one"
            )
        self._stop()
        try:
            self.step, ledger = int(state["step"]), Ledger.from_state(state["ledger"])
        except ValueError as error:  # a text in a number's place
            raise TypeError(f"loader: {error}") from error
        if self.order.rank != 0:
            ledger.epochs = {}
        own = self.ledger  # of the same manifest: its rows are known
        ledger.rows, ledger.excluded, ledger.bad_share = own.rows, own.excluded, own.bad_share
        self.ledger = ledger

    def rewind(self) -> None:
        """Begin again at the first step; rows found bad stay known, and are named once."""
        self._stop()
        self.step, self.ledger.epochs = 0, {}

    def close(self) -> None:
        """Stop the background thread and free the pipeline."""
        self._stop()
        self.pipeline.close()

    def _order_key(self) -> dict[str, Any]:
        return {
            "manifest_sha256": self.manifest.fingerprint,
            "rows": self.num_rows,
            "run.seed": self.seed,
            "batch.global_pairs": self.order.global_pairs,
        }

    def _stop(self) -> None:
        if self._producer is not None:
            self._producer.stop()
            self._producer = None

    def _account(self, images: Images, plan: Plan) -> None:
        for epoch, row, reason, in_order in images.bad:
            if row not in self.ledger.bad:
                self._tell_bad(row, reason)
            self.ledger.add_bad(epoch, row, reason, in_order=in_order)
            if in_order and self.is_training:
                self.ledger.add_replacement(epoch)
        epochs, counts = np.unique(plan.epoch, return_counts=True)
        for epoch, count in zip(epochs.tolist(), counts.tolist(), strict=True):
            bad = sum(1 for e, _, _, in_order in images.bad if in_order and e == epoch)
            self.ledger.add_trained(epoch, count - bad)
        if images.bad:
            self.ledger.check()

    def _tell_bad(self, row: int, reason: str) -> None:
        self._told += 1
        if self._told <= MOST_TOLD:
            logger.warning("quarantined image %s: %s", self.manifest.image_name(row), reason)
        elif self._told == MOST_TOLD + 1:
            logger.warning(
                "more than %d images quarantined: the others are counted and not named here; those "
                "of a training stand in quarantine.json at the next checkpoint",
                MOST_TOLD,
            )

    def make(self, step: int) -> tuple[Batch, Images, Plan]:
        """The batch of a step; called by the background thread."""
        if self._gpu is None:
            return self._made(step)
        # A thread starts on the first GPU: to pin there, or to come back there from a stream of
        # another, would take half a GiB of it for each rank.
        with torch.cuda.device(self._gpu):
            batch, images, plan = self._made(step)
            return pinned(batch), images, plan

    def _made(self, step: int) -> tuple[Batch, Images, Plan]:
        plan = self.order.plan(step)
        images = self.pipeline.load(plan)
        return self._batch(plan, images), images, plan

    def _batch(self, plan: Plan, images: Images) -> Batch:
        index, epoch = plan.global_index[images.kept], plan.epoch[images.kept]
        draws = draw_sentences(self.seed, epoch, index, self.sentence_dropout)
        text = self.manifest.text
        reports = [self.encoder.of_row(row, text) for row in images.rows.tolist()]
        made = compose_batch(self.encoder, reports, draws[:, 1])
        return Batch(
            image=images.image,
            **made.tensors(),
            pair_id=torch.from_numpy(self.pair_id[images.rows]),
            global_index=torch.from_numpy(index),
            row_index=torch.from_numpy(images.rows),
        )


def listed_bad(manifest: Manifest, ledger: Ledger) -> list[dict[str, Any]]:
    """The ledger's bad rows: data row of the manifest, its image as twelve hex digits, reason."""
    return [
        {"row": row + 1, "image": manifest.image_hash(row), "reason": reason}
        for row, reason in sorted(ledger.bad.items())
    ]


def pinned(batch: Batch) -> Batch:
    """Host tensors in page-locked memory, so that copies to the GPU overlap the step.

    What is on the GPU already, the images of DALI, stays there: pinning it would be an error.
    """

    def pin(tensor: Tensor) -> Tensor:
        return tensor if tensor.is_cuda else tensor.pin_memory()

    return batch.each(pin)


def build_loader(
    config: Config,
    manifest: Manifest,
    *,
    split: str,
    train: bool,
    rank: int = 0,
    world_size: int = 1,
    tokenizer: Any,
    linker: Any,
    table: Any,
    with_report: bool = True,
    rows: IntArray | None = None,
    global_pairs: int | None = None,
    refuses_dark: bool = False,
) -> Loader:
    """The loader of one rank over a split.

    with_report: only rows with a usable text (default); False adds image-only rows where
    data.empty_report is image_only. rows: these manifest rows of the split instead of all.
    global_pairs: batch size over all ranks, default batch.global_pairs. refuses_dark: as of
    SampleReader.
    Raises:  ManifestError (no rows, or hashes asked for that are not there), ValueError.
    """
    data = config.data
    allowed = manifest.rows(split, with_report=with_report)
    excluded = manifest.excluded(split, with_report=with_report)
    chosen = allowed if rows is None else np.asarray(rows, dtype=np.int64)
    if not np.isin(chosen, allowed).all():
        raise ValueError(f"rows: expected usable rows of split {split!r} only")
    if len(allowed) > len(chosen):
        excluded["not_chosen"] = len(allowed) - len(chosen)
    if len(chosen) == 0:
        raise ManifestError(
            f"{manifest.path}: split {split!r} has no usable rows of {len(manifest)} "
            f"({listed(excluded) or 'none at all'})"
        )
    pairs = config.batch.global_pairs if global_pairs is None else global_pairs
    order: TrainingOrder | SequentialOrder
    seed = config.run.seed
    if train:
        order = TrainingOrder(
            chosen, seed=seed, global_pairs=pairs, rank=rank, world_size=world_size
        )
    else:
        order = SequentialOrder(chosen, global_pairs=pairs, rank=rank, world_size=world_size)
    # What is kept of each row among tensors that come and go holds the heap around it. Without
    # training a row is read once, or twice for pair_ids_by_concepts.
    by_concepts = config.knowledge.pair_id_by_concepts
    encoder = ReportEncoder(
        tokenizer,
        linker,
        table,
        max_tokens=data.max_tokens,
        max_entities=data.max_entities,
        max_cache_bytes=MAX_CACHE_BYTES if train or by_concepts else 0,
    )
    pair_id = manifest.pair_id
    if by_concepts:
        pair_id = pair_ids_by_concepts(manifest, chosen, encoder)
    transform = Transform(data, train=train, seed=seed)
    reader = SampleReader(manifest, data, refuses_dark=refuses_dark)
    pipeline = _build_pipeline(config, order, reader, transform)
    return Loader(
        order,
        pipeline,
        encoder,
        manifest,
        pair_id,
        Ledger(len(manifest), excluded, data.bad_share if train else 1.0),
        seed=seed,
        sentence_dropout=data.augment.sentence_dropout if train else 0.0,
        prefetch=data.prefetch,
        timeout_s=config.run.timeout_s,
    )


@cache
def _say_torch(reason: str) -> None:
    """Once: a run that watches val has two loaders."""
    logger.info("data.pipeline=auto takes the torch pipeline: %s", reason)


def _build_pipeline(
    config: Config,
    order: TrainingOrder | SequentialOrder,
    reader: SampleReader,
    transform: Transform,
) -> Pipeline:
    kind = config.data.pipeline
    if kind != "torch":
        from mlip.dataloading.pipelines.dali_pipeline import DaliPipeline, why_not_dali

        reason = why_not_dali(config) if kind == "dali" or torch.cuda.is_available() else "no GPU"
        if kind == "dali" or reason is None:
            return DaliPipeline(order, reader, transform, config)
        _say_torch(reason)
    from mlip.dataloading.pipelines.torch_pipeline import TorchPipeline

    return TorchPipeline(order, reader, transform, config.data)


def merge_states(states: list[Mapping[str, Any]]) -> dict[str, Any]:
    """All ranks' state_dicts of one moment as one that any number of ranks can load.

    Raises:  DataError where the ranks together met more bad rows than data.bad_share allows: each
             knows its own only, and a rank of many meets a small part of them in an epoch;
             ValueError for states of several steps or manifests.
    """
    steps = {state["step"] for state in states}
    if len(steps) != 1:
        raise ValueError(f"loader states to merge must be of one step, got {sorted(steps)}")
    ledger = Ledger.merge(Ledger.from_state(state["ledger"]) for state in states)
    ledger.check()
    return {**states[0], "ledger": ledger.state_dict()}


def pair_ids_by_concepts(manifest: Manifest, rows: IntArray, encoder: ReportEncoder) -> IntArray:
    """manifest.pair_id with rows of equal sets of present concepts joined too.

    Rows without any linked mention join nothing: their sets are equal only by ignorance.
    """
    sets: dict[tuple[int, ...], int] = {}
    members, keys = [], []
    if len(rows) > _MANY_REPORTS:
        logger.info("knowledge.pair_id_by_concepts: linking %d reports", len(rows))
    for row in rows.tolist():
        mentions = encoder.of_row(row, manifest.text).mentions
        if len(mentions):
            present = tuple(sorted(set(mentions[mentions[:, 3] == PRESENT, 2].tolist())))
            members.append(row)
            keys.append(sets.setdefault(present, len(sets)))
    groups: list[tuple[NDArray[np.int64], HashArray]] = [
        (np.arange(len(manifest), dtype=np.int64), manifest.pair_id.astype(np.uint64)),
        (np.array(members, dtype=np.int64), np.array(keys, dtype=np.uint64)),
    ]
    return connect(len(manifest), groups)
