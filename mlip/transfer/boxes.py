"""Boxes without torchvision: overlap and non-maximum suppression in plain torch."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


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
    overlaps = ((box_iou(boxes, boxes) > iou) & (labels[:, None] == labels[None, :])).numpy()
    alive = np.ones(len(order), dtype=bool)
    kept: list[int] = []
    for i in range(len(order)):
        if not alive[i]:
            continue
        kept.append(i)
        if len(kept) == most:
            break
        alive &= ~overlaps[i]
    return order[torch.tensor(kept, dtype=torch.int64)]
