"""The features of a split as its batches bring them: in memory, or past a part of it in a file.

100,000 images of 196 patches and 128 dimensions with reports of 112 tokens are 22 GB, of which a
score needs a pool, a chunk of images or an image and a phrase at a time.
"""

from __future__ import annotations

import os
import tempfile

import numpy as np
import torch
from torch import Tensor

from mlip.batch import ImageFeatures, KnowledgeFeatures, TextFeatures
from mlip.dataloading.ledger import DataError
from mlip.system.machine import usable_memory
from mlip.transfer.array import Array
from mlip.transfer.features import ImageBank, TextBank

IN_MEMORY = 0.25  # of usable_memory()

# second axis: as wide as the batch's longest report needs; the store is as wide as any may need
_OF_TOKENS = ("tokens", "attention", "content_mask")
_OF_ENTITIES = ("entities", "entity_mask", "row_weights")


class FeatureStore:
    """Banks of batches in, one ImageBank and one TextBank out; no row is held twice.

    Past `in_memory` bytes the rows lie in files of TMPDIR without a name, which go with the
    process however it ends, and the page cache keeps of them what there is room for.

    rows, max_tokens, max_entities    the most there can be
    Raises:  ValueError, at the first batch, where the files find no room.
    """

    def __init__(
        self, rows: int, *, max_tokens: int, max_entities: int, in_memory: float | None = None
    ) -> None:
        self.in_memory = IN_MEMORY * usable_memory() if in_memory is None else in_memory
        self.is_in_files = False
        self._rows, self._used = rows, 0
        self._widths = dict.fromkeys(_OF_TOKENS, max_tokens)
        self._widths |= dict.fromkeys(_OF_ENTITIES, max_entities)
        self._longest: dict[str, int] = {}
        self._held: dict[str, Array] = {}
        self._grid = (0, 0)

    def add(self, images: ImageBank, texts: TextBank) -> None:
        """Append the rows of a batch."""
        batch = _arrays(images, texts)
        if not self._held:
            self._grid = images.features.grid
            self._reserve(batch)
        count = len(images)
        for name, values in batch.items():
            into = self._held[name][self._used : self._used + count]
            if name in self._widths:
                self._longest[name] = max(self._longest.get(name, 0), values.shape[1])
                into = into[:, : values.shape[1]]
            into[...] = values
        self._used += count

    def banks(self) -> tuple[ImageBank, TextBank]:
        """All rows; reports are as wide as the longest of them.  Raises:  DataError without any."""
        if self._used == 0:
            raise DataError(
                "none of the images could be read (the reasons stand above): check data.root, the "
                "folder that the manifest's paths are relative to"
            )
        rows = {name: held[: self._used] for name, held in self._held.items()}
        rows |= {name: rows[name][:, :longest] for name, longest in self._longest.items()}
        of = {name: torch.from_numpy(values) for name, values in rows.items()}
        images = ImageBank(
            features=ImageFeatures(
                embedding=of["image_embedding"], patches=of["patches"], grid=self._grid
            ),
            row_index=rows["row_index"],
            pixels=rows["pixels"],
        )
        texts = TextBank(
            text=TextFeatures(
                embedding=of["text_embedding"], tokens=of["tokens"], attention=of.get("attention")
            ),
            content_mask=of["content_mask"],
            knowledge=KnowledgeFeatures(
                entities=of["entities"],
                mask=of["entity_mask"],
                row_weights=of["row_weights"],
                present_mean=of["present_mean"],
                has_present=of["has_present"],
            ),
        )
        return images, texts

    def _reserve(self, batch: dict[str, Array]) -> None:
        shapes = {name: self._shape(name, values) for name, values in batch.items()}
        sizes = {
            name: int(np.prod(shape, dtype=np.int64)) * batch[name].dtype.itemsize
            for name, shape in shapes.items()
        }
        self.is_in_files = sum(sizes.values()) > self.in_memory
        for name, values in batch.items():
            if not self.is_in_files:
                self._held[name] = np.zeros(shapes[name], values.dtype)
                continue
            try:
                self._held[name] = _in_file(shapes[name], values.dtype, sizes[name])
            except OSError as error:
                raise ValueError(
                    f"the features of {self._rows} rows are {sum(sizes.values()) / 2**30:.1f} GiB, "
                    f"more than {self.in_memory / 2**30:.1f} GiB of memory, and "
                    f"{tempfile.gettempdir()} has no room for them ({error.strerror}): name a "
                    "folder with room by TMPDIR, or set evaluate.max_studies"
                ) from None

    def _shape(self, name: str, values: Array) -> tuple[int, ...]:
        wide = values.shape[1:]
        if name in self._widths:
            wide = (max(self._widths[name], wide[0]), *wide[1:])
        return (self._rows, *wide)


def _in_file(shape: tuple[int, ...], dtype: np.dtype, size: int) -> Array:
    """Zeros in a file without a name, its room taken at once: a full disk found later is SIGBUS."""
    with tempfile.TemporaryFile(prefix="mlip-features-") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        else:
            file.truncate(size)
        return np.memmap(file, dtype=dtype, mode="r+", shape=shape)


def _arrays(images: ImageBank, texts: TextBank) -> dict[str, Array]:
    """Every tensor of a batch's banks, by the names that a store keeps them under."""
    knowledge = texts.knowledge
    tensors: dict[str, Tensor | None] = {
        "image_embedding": images.features.embedding,
        "patches": images.features.patches,
        "text_embedding": texts.text.embedding,
        "tokens": texts.text.tokens,
        "attention": texts.text.attention,
        "content_mask": texts.content_mask,
        "entities": knowledge.entities,
        "entity_mask": knowledge.mask,
        "row_weights": knowledge.row_weights,
        "present_mean": knowledge.present_mean,
        "has_present": knowledge.has_present,
    }
    arrays = {name: tensor.numpy() for name, tensor in tensors.items() if tensor is not None}
    return {**arrays, "row_index": images.row_index, "pixels": images.pixels}
