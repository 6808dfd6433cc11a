"""Batches of the shapes that a loader makes, without images, reports or a linker.

A GPU machine may have none of the packages that read real data. Times depend on shapes and on how
many tokens are real, not on what they say: lengths here follow those of radiology reports, of
which the mean fills half of data.max_tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mlip.batch import ABSENT, PRESENT, UNCERTAIN, Batch
from mlip.settings.config import Config

FILL = 0.5  # mean length over data.max_tokens, [CLS] and [SEP] included
_SHAPE = 6  # of the gamma distribution: a sum of six exponentials, 0.41 of its mean wide
_SHORTEST = 8  # tokens: "no acute disease" and its like
_IMAGES = 64  # different ones; a thousand would take seconds to draw and change no time
_SAME_STUDY = 50  # one pair in so many shares its pair_id with the one before
# how often a linked mention has each state, as in reports that deny most of what they name
_STATES = (PRESENT, PRESENT, PRESENT, PRESENT, ABSENT, ABSENT, ABSENT, ABSENT, ABSENT, UNCERTAIN)


def report_lengths(pairs: int, max_tokens: int, generator: torch.Generator) -> Tensor:
    """Tokens of each report, [CLS] and [SEP] included, [pairs] int64.

    Gamma of shape 6, cut at `max_tokens`. The first report has them all, so that every batch has
    one shape; among 256 drawn ones five do.
    """
    draws = torch.empty(_SHAPE, pairs).exponential_(generator=generator).sum(dim=0) / _SHAPE
    lengths = (FILL * max_tokens * draws).round().long()
    lengths = lengths.clamp(min(_SHORTEST, max_tokens), max_tokens)
    lengths[0] = max_tokens
    return lengths


def made_batch(
    config: Config, pairs: int, *, vocab_size: int, concepts: int, seed: int = 0
) -> Batch:
    """A batch as of mlip.dataloading.loader.Loader: the same fields, types, shapes and masks.

    Grey images seen `data.channels` times, as the loader makes them; nothing is on a GPU yet.
    """
    data, generator = config.data, torch.Generator().manual_seed(seed)
    size, width, number = data.crop_px, data.max_entities, torch.arange(pairs)
    grey = torch.randn(min(pairs, _IMAGES), 1, size, size, generator=generator)
    place = torch.arange(data.max_tokens)
    lengths = report_lengths(pairs, data.max_tokens, generator)
    token_mask = place < lengths[:, None]
    token_ids = torch.randint(5, vocab_size, (pairs, data.max_tokens), generator=generator)
    mentions = torch.randint(0, width + 1, (pairs,), generator=generator)
    mentions[0] = width
    entity_mask = torch.arange(width) < mentions[:, None]
    state = torch.randint(0, len(_STATES), (pairs, width), generator=generator)
    entity_ids = torch.randint(0, concepts, (pairs, width), generator=generator)
    return Batch(
        image=grey[number % len(grey)].expand(-1, data.channels, -1, -1),
        token_ids=torch.where(token_mask, token_ids, 0),
        token_mask=token_mask,
        content_mask=(place > 0) & (place < lengths[:, None] - 1),
        entity_ids=torch.where(entity_mask, entity_ids, 0),
        entity_state=torch.where(entity_mask, torch.tensor(_STATES)[state], 0),
        entity_mask=entity_mask,
        pair_id=torch.where(number % _SAME_STUDY == 1, number - 1, number),
        global_index=number + seed * pairs,
        row_index=number,
    )


def in_pinned_memory(batch: Batch) -> Batch:
    """As mlip.dataloading.loader hands batches to a GPU."""
    return batch.each(Tensor.pin_memory)


def padding_share(batch: Batch) -> float:
    """The part of the tokens that is padding."""
    return 1.0 - float(batch.token_mask.double().mean())
