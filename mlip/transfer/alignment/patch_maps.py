"""Maps of an image's patches: how well each matches a phrase or one of its words.

A map is the weighted mean over the phrase's rows (knowledge-enriched tokens and linked entities,
the rows and weights of the local score, method.md section 4) of their cosine with each patch:
what the local score pools, before it is pooled. High = match.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from mlip.transfer.array import Array
from mlip.transfer.features import TextBank, device_of
from mlip.unit_length import unit_length


@torch.no_grad()
def text_rows(model: Any, texts: TextBank) -> tuple[Tensor, Tensor]:
    """The unit rows of the local score and their weights, [N, T+K, D] and [N, T+K].

    Source:  method.md section 4 (rows, weight); weights sum to 1 where a text has any.
    """
    local = model.config.loss.local_alignment
    scales = model.scales
    learned = local.learn_scales
    scale = scales.knowledge_scale.item() if learned else local.knowledge_scale
    gain = scales.knowledge_gain.item() if learned else local.knowledge_gain
    tokens, knowledge = unit_length(texts.text.tokens), texts.knowledge
    entities = unit_length(knowledge.entities)
    similarity = torch.einsum("ntd,nkd->ntk", tokens, entities) * scale
    similarity = similarity.masked_fill(~knowledge.mask[:, None, :], -torch.inf)
    # a text without entities has a softmax over nothing: NaN by definition, 0 here
    attention = torch.softmax(similarity, dim=-1).nan_to_num(0.0)
    enriched = unit_length(tokens + gain * torch.einsum("ntk,nkd->ntd", attention, entities))
    attended = texts.text.attention
    device = device_of(model)
    token_weights = model.token_weights(
        texts.content_mask.to(device), None if attended is None else attended.to(device)
    ).cpu()
    row_weights = knowledge.row_weights * knowledge.mask
    u, s = token_weights.sum(1, keepdim=True), row_weights.sum(1, keepdim=True)
    share = torch.full_like(s, local.knowledge_share)
    share = torch.where(s > 0, share, 0.0)
    share = torch.where(u > 0, share, torch.where(s > 0, 1.0, 0.0))
    weights = torch.cat(
        [
            (1.0 - share) * token_weights / torch.where(u > 0, u, 1.0),
            share * row_weights / torch.where(s > 0, s, 1.0),
        ],
        dim=1,
    )
    return torch.cat([enriched, entities], dim=1), weights


def _mean_rows(model: Any, texts: TextBank) -> Tensor:
    """[N, D]: a weighted mean of cosines is the cosine's numerator with the weighted mean row."""
    rows, weights = text_rows(model, texts)
    return torch.einsum("nj,njd->nd", weights, rows.nan_to_num(0.0))


def phrase_maps(model: Any, patches: Tensor, texts: TextBank) -> Tensor:
    """Similarity of every patch with every phrase, [N, M, P] in [-1, 1], high = match."""
    return torch.einsum("nd,mpd->nmp", _mean_rows(model, texts), unit_length(patches))


class PhraseMaps:
    """phrase_maps of the phrases and images that are asked for, made when they are.

    maps[phrases, images] is [..., P] float32: all maps of a hundred phrases on 100,000 images of
    196 patches are 8 GB, and a phrase is asked of the images that carry its finding.

    Shapes:  patches [M, P, D]; texts of N phrases
    """

    def __init__(self, model: Any, patches: Tensor, texts: TextBank) -> None:
        self._rows, self._patches = _mean_rows(model, texts), patches

    def __getitem__(self, at: tuple[int | Sequence[int], int | Sequence[int]]) -> Array:
        phrases, images = (np.asarray(index) for index in at)
        # an image is asked for all that is said of it, one phrase after another
        own, place = np.unique(images, return_inverse=True)
        patches = unit_length(self._patches[torch.from_numpy(own)])
        patches = patches[torch.as_tensor(place.reshape(images.shape))]
        rows = self._rows[torch.as_tensor(phrases)]
        return torch.einsum("...d,...pd->...p", rows, patches).numpy()


def token_maps(model: Any, patches: Tensor, texts: TextBank) -> Tensor:
    """Similarity of every patch of each image with every row of its own text, [N, T+K, P]."""
    rows, _ = text_rows(model, texts)
    return torch.einsum("njd,npd->njp", rows.nan_to_num(0.0), unit_length(patches))


class Upsampler:
    """Cubic upsampling of patch maps to pixels as two matrix products, for many maps at once."""

    def __init__(self, grid: tuple[int, int], size: tuple[int, int]) -> None:
        self.grid, self.size = grid, size
        self._rows = _cubic_matrix(grid[0], size[0])
        self._columns = _cubic_matrix(grid[1], size[1])

    def __call__(self, maps: Array) -> Array:
        """Shapes:  maps [..., P] -> [..., H, W] float32"""
        shaped = np.asarray(maps, dtype=np.float32).reshape(*maps.shape[:-1], *self.grid)
        return np.matmul(np.matmul(self._rows, shaped), self._columns.T)


def _cubic_matrix(cells: int, pixels: int) -> Array:
    """[pixels, cells]: what each cell gives to each pixel (OpenCV's cubic, edges repeated)."""
    identity = np.eye(cells, dtype=np.float32)
    return cv2.resize(identity, (cells, pixels), interpolation=cv2.INTER_CUBIC)


def pointed_pixel(pictures: Array, grid: tuple[int, int]) -> Array:
    """Centre (x, y) of the highest pixel of upsampled maps, [..., H, W] -> [..., 2].

    Cubic upsampling lets neighbouring patches move the point inside the best patch: a patch of
    16 px would else never hit a nodule of 6 px beside its centre. The border beyond the outermost
    patch centres is extrapolated, not measured, and cannot be pointed at.
    """
    height, width = pictures.shape[-2:]
    top, left = int(height / grid[0] / 2), int(width / grid[1] / 2)
    inner = pictures[..., top : height - top, left : width - left]
    best = inner.reshape(*inner.shape[:-2], -1).argmax(axis=-1)
    y, x = np.divmod(best, inner.shape[-1])
    return np.stack([left + x + 0.5, top + y + 0.5], axis=-1)
