"""Boxes without torchvision: overlap and non-maximum suppression in plain torch."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mlip.transfer.array import Array

BLOCK = 200  # boxes compared with each other at once


def box_iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of corners x0, y0, x1, y1; 0 where a box has no area.

    Shapes:  [n, 4], [m, 4] -> [n, m]
    """
    low = torch.maximum(a[:, None, :2], b[None, :, :2])
    high = torch.minimum(a[:, None, 2:], b[None, :, 2:])
    both = (high - low).clamp_min(0).prod(dim=2)
    area_a = (a[:, 2:] - a[:, :2]).clamp_min(0).prod(dim=1)
    area_b = (b[:, 2:] - b[:, :2]).clamp_min(0).prod(dim=1)
    union = area_a[:, None] + area_b[None] - both
    return torch.where(union > 0, both / union.clamp_min(1e-12), torch.zeros_like(both))


def keep_best(boxes: Tensor, scores: Tensor, labels: Tensor, iou: float, most: int) -> Tensor:
    """Indices that non-maximum suppression within each label leaves, best first, at most `most`.

    Greedy, as the published evaluation: a box goes where a better one of its label overlaps it by
    more than `iou`. Equal scores keep their order.
    """
    order = torch.argsort(scores, descending=True, stable=True)
    boxes, labels = boxes[order], labels[order]
    kept = torch.empty(0, dtype=torch.int64)
    # in blocks: most of a thousand boxes come after the last that is kept
    for start in range(0, len(order), BLOCK):
        own = torch.arange(start, min(start + BLOCK, len(order)))

        def overlaps(others: Tensor, own: Tensor = own) -> Array:
            same = labels[others][:, None] == labels[own][None, :]
            return ((box_iou(boxes[others], boxes[own]) > iou) & same).numpy()

        alive: Array = ~np.any(overlaps(kept), axis=0)
        among = overlaps(own)
        chosen: list[int] = []
        for i in range(len(own)):
            if alive[i] and len(kept) + len(chosen) < most:
                chosen.append(start + i)
                alive &= ~among[i]
        kept = torch.cat([kept, torch.tensor(chosen, dtype=torch.int64)])
        if len(kept) == most:
            break
    return order[kept]
