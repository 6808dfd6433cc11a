"""The features an evaluation works on: images and texts encoded once, scored many times.

What does not live here: any task. Tasks take an ImageBank and a TextBank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from mlip.batch import Batch, ImageFeatures, KnowledgeFeatures, TextFeatures
from mlip.dataloading.loader import Loader, build_loader
from mlip.dataloading.manifest import Manifest
from mlip.settings.config import Data
from mlip.transfer.array import Array

# Bytes of token-patch similarities alive at once in a chunk of local scores.
CHUNK_BYTES = 96 * 2**20
ROWS_AT_ONCE = 128


_Features = TypeVar("_Features", TextFeatures, KnowledgeFeatures)


def _each(features: _Features, move: Callable[[Tensor], Tensor]) -> _Features:
    """The same features with every tensor moved; None stays."""
    held = {f.name: getattr(features, f.name) for f in fields(features)}
    return replace(features, **{name: move(t) for name, t in held.items() if t is not None})


def _on_host(tensor: Tensor) -> Tensor:
    return (tensor.float() if tensor.is_floating_point() else tensor).cpu()


@dataclass(frozen=True)
class ImageBank:
    """Encoded images; row i of every field belongs to row_index[i] of the manifest."""

    features: ImageFeatures
    row_index: Array  # [N] int64
    pixels: Array  # [N, H, W] uint8, what the model saw, for pictures

    def __len__(self) -> int:
        return int(self.features.embedding.shape[0])


@dataclass(frozen=True)
class TextBank:
    """Encoded texts (reports or prompts) with their linked knowledge."""

    text: TextFeatures
    content_mask: Tensor  # [N, T] bool
    knowledge: KnowledgeFeatures

    def __len__(self) -> int:
        return int(self.text.embedding.shape[0])

    def rows(self, index: Array) -> TextBank:
        """The chosen texts, cut to their longest text; by number, as a slice or by a mask."""
        at = torch.from_numpy(np.arange(len(self))[index].reshape(-1))
        mask = self.content_mask[at]
        used = mask.any(dim=0).nonzero()
        longest = int(used.max()) + 1 if len(used) else 1
        attention = self.text.attention
        return TextBank(
            text=TextFeatures(
                embedding=self.text.embedding[at],
                tokens=self.text.tokens[at, :longest],
                attention=None if attention is None else attention[at, :longest],
            ),
            content_mask=mask[:, :longest],
            knowledge=_each(self.knowledge, lambda tensor: tensor[at]),
        )


def device_of(model: Any) -> torch.device:
    """Where the model's inputs have to be; what it gives comes back to the CPU."""
    return next(model.parameters()).device


@torch.no_grad()
def image_features(model: Any, pixels: Tensor) -> ImageFeatures:
    """Of model inputs [N, C, H, W], on the CPU in float32."""
    found = model.encode_image(pixels.to(device_of(model)))
    return ImageFeatures(found.embedding.float().cpu(), found.patches.float().cpu(), found.grid)


@torch.no_grad()
def encode_text_batch(model: Any, batch: Batch | Any) -> TextBank:
    """A TextBank on the CPU from anything with a Batch's text fields."""
    device = device_of(model)
    ids, mask = batch.token_ids.to(device), batch.token_mask.to(device)
    content = batch.content_mask.to(device)
    text = model.encode_text(ids, mask, content)
    knowledge = model.encode_knowledge(
        batch.entity_ids.to(device), batch.entity_state.to(device), batch.entity_mask.to(device)
    )
    return TextBank(_each(text, _on_host), content.cpu(), _each(knowledge, _on_host))


def _encode_images(model: Any, batch: Batch, data: Data) -> ImageBank:
    """An ImageBank on the CPU; its pictures get back what the loader took out."""
    # channels repeat one grey image, so the first is the picture
    grey = (batch.image[:, 0].float().cpu() * data.std + data.mean).clamp(0.0, 1.0)
    return ImageBank(
        features=image_features(model, batch.image),
        row_index=batch.row_index.cpu().numpy(),
        pixels=(grey * 255.0).round().to(torch.uint8).numpy(),
    )


def row_loader(opened: Any, manifest: Manifest, split: str, rows: Array) -> Loader:
    """Batches of these rows of the split as the model reads them, in their order.

    Films that `mlip prepare` refuses as too dark are bad: the model would see black, and answer.
    """
    return build_loader(
        opened.config,
        manifest,
        split=split,
        train=False,
        tokenizer=opened.tokenizer,
        linker=opened.linker,
        table=opened.table,
        with_report=False,
        rows=rows,
        global_pairs=min(ROWS_AT_ONCE, max(1, len(rows))),
        refuses_dark=True,
    )


def encoded(model: Any, loader: Loader, data: Data) -> Iterator[tuple[Batch, ImageBank, TextBank]]:
    """Each batch of the loader that has a row, with its features; the loader is closed."""
    try:
        for batch in loader:
            if len(batch):
                yield batch, _encode_images(model, batch, data), encode_text_batch(model, batch)
    finally:
        loader.close()


def encoded_images(model: Any, loader: Loader, data: Data) -> Iterator[ImageBank]:
    """The images of each batch of the loader that has a row; the loader is closed."""
    try:
        for batch in loader:
            if len(batch):
                yield _encode_images(model, batch, data)
    finally:
        loader.close()


def _pad(x: Tensor, length: int) -> Tensor:
    if x.shape[1] == length:
        return x
    padded = x.new_zeros((x.shape[0], length, *x.shape[2:]))
    padded[:, : x.shape[1]] = x
    return padded


def join_texts(parts: list[TextBank]) -> TextBank:
    """All parts as one, padded to the longest."""
    tokens = max(p.content_mask.shape[1] for p in parts)
    entities = max(p.knowledge.mask.shape[1] for p in parts)
    has_attention = all(p.text.attention is not None for p in parts)
    return TextBank(
        text=TextFeatures(
            embedding=torch.cat([p.text.embedding for p in parts]),
            tokens=torch.cat([_pad(p.text.tokens, tokens) for p in parts]),
            attention=torch.cat([_pad(p.text.attention, tokens) for p in parts])  # type: ignore[arg-type]
            if has_attention
            else None,
        ),
        content_mask=torch.cat([_pad(p.content_mask, tokens) for p in parts]),
        knowledge=KnowledgeFeatures(
            entities=torch.cat([_pad(p.knowledge.entities, entities) for p in parts]),
            mask=torch.cat([_pad(p.knowledge.mask, entities) for p in parts]),
            row_weights=torch.cat([_pad(p.knowledge.row_weights, entities) for p in parts]),
            present_mean=torch.cat([p.knowledge.present_mean for p in parts]),
            has_present=torch.cat([p.knowledge.has_present for p in parts]),
        ),
    )


def require_finite(images: ImageBank, texts: TextBank | None = None) -> None:
    """Raise ValueError where features are NaN or infinite: no score of them means anything."""
    features = [("image", (images.features.embedding, images.features.patches))]
    if texts is not None:
        features.append(("report", (texts.text.embedding, texts.text.tokens[texts.content_mask])))
    for name, values in features:
        if not all(bool(torch.isfinite(value).all()) for value in values):
            raise ValueError(
                f"the {name} features hold NaN or infinite values: the checkpoint is broken"
            )


def global_scores(images: Tensor, texts: TextBank) -> Array:
    """Cosine of the global heads, [images, texts] float64."""
    return (images.double() @ texts.text.embedding.double().T).numpy()


@torch.no_grad()
def local_scores(model: Any, patches: Tensor, texts: TextBank) -> Array:
    """The token-knowledge-patch score S of method.md section 4, [images, texts] float64.

    In chunks of images, so that the similarities of a thousand images with a pool of reports do
    not have to exist at once.
    """
    count = texts.content_mask.shape[1] + texts.knowledge.mask.shape[1]
    per_image = max(1, patches.shape[1] * count * len(texts) * 4)
    step = max(1, CHUNK_BYTES // per_image)
    device = device_of(model)
    text = _each(texts.text, lambda tensor: tensor.to(device))
    knowledge = _each(texts.knowledge, lambda tensor: tensor.to(device))
    content = texts.content_mask.to(device)
    chunks = [
        model.local_scores(
            patches[i : i + step].to(device), text.tokens, content, text.attention, knowledge
        )
        for i in range(0, len(patches), step)
    ]
    if not chunks:
        return np.zeros((0, len(texts)))
    return torch.cat(chunks).cpu().double().numpy()
