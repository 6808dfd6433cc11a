"""A batch of the loader: shapes, types, tokens, masks, mentions, pair ids, grey channels.

Oracles: the tokenizer and the linker on a row's own report, and counting.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mlip.batch import Batch, by_channel
from mlip.dataloading import loader as loader_module
from mlip.dataloading.loader import pair_ids_by_concepts
from mlip.dataloading.reports.tokenizer import ReportTokenizer
from mlip.settings.config import Config
from tests.dataloading.conftest import take

Make = Callable[..., Config]


def test_a_batch_has_the_promised_shapes_and_types(corpus: Make, build: Any) -> None:
    batch = take(build(corpus("data.channels=3")), 1)[0]
    count, tokens, entities = 6, batch.token_ids.shape[1], batch.entity_ids.shape[1]
    assert batch.image.shape == (count, 3, 32, 32) and batch.image.dtype == torch.float32
    assert torch.equal(batch.image[:, 0], batch.image[:, 2])
    for name in ("token_ids", "token_mask", "content_mask"):
        assert getattr(batch, name).shape == (count, tokens)
    for name in ("entity_ids", "entity_state", "entity_mask"):
        assert getattr(batch, name).shape == (count, entities)
    for name in ("token_ids", "entity_ids", "entity_state", "pair_id", "global_index", "row_index"):
        assert getattr(batch, name).dtype == torch.int64
    assert (
        batch.token_mask.dtype == batch.content_mask.dtype == batch.entity_mask.dtype == torch.bool
    )


def test_masks_mark_tokens_content_and_mentions(
    corpus: Make, build: Any, tokenizer: ReportTokenizer, linker: Any
) -> None:
    loader = build(corpus("data.augment.sentence_dropout=0.0"))
    batch = take(loader, 1)[0]
    for i, row in enumerate(batch.row_index.tolist()):
        text = loader.manifest.text(row)
        ids = batch.token_ids[i][batch.token_mask[i]].tolist()
        assert ids[0] == tokenizer.cls_id and ids[-1] == tokenizer.sep_id
        assert batch.token_ids[i][batch.content_mask[i]].tolist() == ids[1:-1]
        assert ids[1:-1] == tokenizer.encode_batch([text])[0].ids
        assert (batch.token_ids[i][~batch.token_mask[i]] == tokenizer.pad_id).all()
        states = {"present": 0, "absent": 1, "uncertain": 2}
        names = ["effusion", "pneumothorax", "nodule", "tube"]
        pairs = [(names.index(m.concept_id), states[m.state]) for m in linker.link(text)]
        mask = batch.entity_mask[i]
        ids_and_states = torch.stack([batch.entity_ids[i], batch.entity_state[i]], dim=1)
        found = [tuple(pair) for pair in ids_and_states[mask].tolist()]
        assert found == list(dict.fromkeys(pairs))
        assert (batch.entity_ids[i][~mask] == 0).all()
        assert batch.pair_id[i] == loader.manifest.pair_id[row]


def lengths(batches: list[Batch]) -> list[tuple[int, int]]:
    """(row, number of tokens) of every visit."""
    return [
        (row, int(mask.sum()))
        for batch in batches
        for row, mask in zip(batch.row_index.tolist(), batch.token_mask, strict=True)
    ]


def test_sentence_dropout_shortens_some_reports_and_is_off_in_evaluation(
    corpus: Make, build: Any
) -> None:
    full = dict(lengths(take(build(corpus("data.augment.sentence_dropout=0.0")), 6)))
    visits = lengths(take(build(corpus()), 12))
    assert all(now <= full[row] for row, now in visits)
    # half the visits drop, and 14 of 15 subsets of four sentences are smaller than all
    shorter = sum(now < full[row] for row, now in visits) / len(visits)
    assert abs(shorter - 0.5 * 14 / 15) < 4 * (0.25 / len(visits)) ** 0.5
    assert dict(lengths(list(build(corpus(), "train", train=False)))) == full


def test_image_only_rows_come_with_start_and_end_tokens(corpus: Make, build: Any) -> None:
    config = corpus("data.columns.report=null", "data.empty_report=image_only")
    for batch in build(config, "val", train=False, with_report=False):
        assert batch.token_mask.sum(1).tolist() == [2] * len(batch)
        assert not batch.content_mask.any() and not batch.entity_mask.any()
        assert batch.entity_ids.shape[1] == 1


def test_equal_sets_of_present_concepts_share_a_pair_id_when_asked(
    corpus: Make, build: Any
) -> None:
    loader = build(corpus("knowledge.pair_id_by_concepts=true"))
    rows = loader.manifest.rows("train")
    sets: dict[int, Any] = {}
    for row in rows.tolist():
        mentions = loader.encoder.of_row(row, loader.manifest.text).mentions
        present = tuple(sorted({c for _, _, c, state in mentions.tolist() if state == 0}))
        sets[row] = present if len(mentions) else row
    for a in rows.tolist():
        for b in rows.tolist():
            assert (loader.pair_id[a] == loader.pair_id[b]) == (sets[a] == sets[b])
    assert len(set(loader.pair_id[rows])) < len(rows)
    assert (pair_ids_by_concepts(loader.manifest, rows, loader.encoder) == loader.pair_id).all()


def test_grey_channels_are_one_tensor_until_they_are_used(corpus: Make, build: Any) -> None:
    """A batch of three channels costs the memory and the copies of one."""
    batch = take(build(corpus("data.channels=3")), 1)[0]
    moved: list[Tensor] = []
    image = by_channel(batch.image, lambda part: moved.append(part) or part.double())
    assert moved[0].shape == (6, 1, 32, 32) and image.dtype == torch.float64
    assert torch.equal(image, batch.image.double())
    assert batch.image.untyped_storage().nbytes() == 6 * 32 * 32 * 4
    assert torch.equal(batch.to("cpu").image, batch.image)


def test_only_what_is_on_the_host_is_pinned(corpus: Make, build: Any) -> None:
    """Images that DALI made on the GPU are there already: torch refuses to pin them."""

    class Told(Tensor):
        """A host tensor that says where it would be on a GPU machine."""

        on_gpu = False

        @property
        def is_cuda(self) -> bool:  # type: ignore[override]
            return self.on_gpu

        def pin_memory(self, device: Any = None) -> Tensor:
            pinned.append(tuple(self.shape))
            return self

    class OnGpu(Told):
        on_gpu = True

    pinned: list[tuple[int, ...]] = []
    batch = take(build(corpus("data.channels=3")), 1)[0]
    names = [n for n in vars(batch) if n not in ("image", "token_counts")]
    others = {n: getattr(batch, n).as_subclass(Told) for n in names}
    loader_module.pinned(Batch(image=batch.image.as_subclass(OnGpu), **others))
    assert sorted(pinned) == sorted(tuple(tensor.shape) for tensor in others.values())
    pinned.clear()
    loader_module.pinned(Batch(image=batch.image.as_subclass(Told), **others))
    assert (6, 1, 32, 32) in pinned and (6, 3, 32, 32) not in pinned
