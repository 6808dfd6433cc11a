"""A YOLOv3 head on three levels of an encoder: predictions, targets, loss, decoding.

Source:  Redmon and Farhadi 2018 (arXiv 1804.02767) with the loss of HKU-MedAI/MGCA's yolo_loss.py,
vectorised and in logits; a ViT's one grid becomes three levels as in ViTDet (Li et al. 2022, simple
feature pyramid).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from mlip.transfer.array import Array
from mlip.transfer.fits.boxes import keep_best
from mlip.transfer.fits.encoder import Encoder
from mlip.transfer.measures.average_precision import MOST_BOXES

# darknet's COCO anchors for an input of 416 px, width and height, from fine to coarse level
ANCHORS = (
    ((10.0, 13.0), (16.0, 30.0), (33.0, 23.0)),
    ((30.0, 61.0), (62.0, 45.0), (59.0, 119.0)),
    ((116.0, 90.0), (156.0, 198.0), (373.0, 326.0)),
)
ANCHOR_SIDE = 416.0
IGNORE_IOU = 0.5
XY_WEIGHT, WH_WEIGHT, EMPTY_WEIGHT = 2.5, 2.5, 0.5
LARGEST_LOG_RATIO = 6.0  # of a box to its anchor: e^6 = 403, larger only overflows


@dataclass(frozen=True)
class Targets:
    """What one level should say; [B, A, h, w] each, offsets [B, A, h, w, 4]."""

    is_object: Tensor
    is_empty: Tensor  # neither an object nor an anchor that overlaps one
    offsets: Tensor  # x, y in the cell, log width and height over the anchor
    classes: Tensor  # [B, A, h, w, classes]


class YoloHead(nn.Module):
    """Levels -> for each of three resolutions [B, A, h, w, 5 + classes] raw outputs.

    Raises:  ValueError for an encoder whose input is too small for three levels.
    """

    def __init__(self, encoder: Encoder, side: int, classes: int, width: int = 0) -> None:
        super().__init__()
        self.side, self.classes = side, classes
        table = encoder.level_channels
        self.is_single = len(table) == 1
        self.extra = nn.ModuleList()
        if self.is_single:
            channels = width or min(256, table[0])
            at = table[0]
            self.extra.append(nn.ConvTranspose2d(at, channels, 2, stride=2))
            self.extra.append(nn.Conv2d(at, channels, 1))
            self.extra.append(nn.Conv2d(at, channels, 3, stride=2, padding=1))
            inputs = [channels] * 3
        else:
            inputs = list(table[-3:])
            while len(inputs) < 3:  # a shallow tower: coarser levels by strided convolution
                channels = width or min(256, inputs[-1])
                self.extra.append(nn.Conv2d(inputs[-1], channels, 3, stride=2, padding=1))
                inputs.append(channels)
        outputs = len(ANCHORS[0]) * (5 + classes)
        # the published head: five alternating 1 x 1 and 3 x 3 convolutions, then the prediction;
        # coarser levels are upsampled into finer ones
        self.embeddings, self.outputs, self.laterals = (
            nn.ModuleList(),
            nn.ModuleList(),
            nn.ModuleList(),
        )
        above = 0
        for level in (2, 1, 0):
            small = width or max(32, min(512, inputs[level] // 4))
            self.embeddings.append(_embedding(inputs[level] + above, small))
            self.outputs.append(
                nn.Sequential(_block(small, 2 * small, 3), nn.Conv2d(2 * small, outputs, 1))
            )
            if level > 0:
                above = max(1, small // 2)
                self.laterals.append(_block(small, above, 1))
        for output in cast(list[nn.Sequential], list(self.outputs)):
            # few cells hold an object: start by saying so, or the first steps unlearn 0.5
            bias = cast(nn.Conv2d, output[-1]).bias
            assert bias is not None
            with torch.no_grad():
                bias.view(len(ANCHORS[0]), -1)[:, 4] = -4.0

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        if self.is_single:
            maps = [layer(maps[0]) for layer in self.extra]
        else:
            maps = list(maps[-3:])
            for layer in self.extra:
                maps.append(layer(maps[-1]))
        found: list[Tensor] = []
        above: Tensor | None = None
        for step, level in enumerate((2, 1, 0)):
            x = maps[level]
            if above is not None:
                x = torch.cat([x, F.interpolate(above, size=x.shape[2:], mode="nearest")], dim=1)
            x = self.embeddings[step](x)
            raw = self.outputs[step](x)
            batch, _, height, width = raw.shape
            shaped = raw.view(batch, len(ANCHORS[0]), 5 + self.classes, height, width)
            found.append(shaped.permute(0, 1, 3, 4, 2))
            if level > 0:
                above = self.laterals[step](x)
        return found[::-1]

    def anchors(self, level: int) -> Tensor:
        """[A, 2] width, height in px of the input."""
        return torch.tensor(ANCHORS[level]) * (self.side / ANCHOR_SIDE)


def _block(channels: int, out: int, kernel: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, out, kernel, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(out),
        nn.LeakyReLU(0.1),
    )


def _embedding(channels: int, small: int) -> nn.Sequential:
    return nn.Sequential(
        _block(channels, small, 1),
        _block(small, 2 * small, 3),
        _block(2 * small, small, 1),
        _block(small, 2 * small, 3),
        _block(2 * small, small, 1),
    )


def make_targets(
    boxes: list[Tensor],
    labels: list[Tensor],
    anchors: Tensor,
    grid: tuple[int, int],
    side: int,
    classes: int,
) -> Targets:
    """Each box belongs to the cell of its centre and the anchor of most similar shape.

    Shapes:  boxes [n_b, 4] corners in px of the input, read only; labels [n_b] int64
    """
    batch, count, (height, width) = len(boxes), len(anchors), grid
    is_object = torch.zeros(batch, count, height, width, dtype=torch.bool)
    near = torch.zeros_like(is_object)
    offsets = torch.zeros(batch, count, height, width, 4)
    wanted = torch.zeros(batch, count, height, width, classes)
    sizes = [len(b) for b in boxes]
    if sum(sizes) == 0:
        return Targets(is_object, ~near, offsets, wanted)
    image = torch.repeat_interleave(torch.arange(batch), torch.tensor(sizes))
    corners, label = torch.cat(boxes).float(), torch.cat(labels)
    extent = (corners[:, 2:] - corners[:, :2]).clamp_min(1e-3)
    centre = (corners[:, :2] + corners[:, 2:]) / 2 * torch.tensor([width, height]) / side
    x = centre[:, 0].floor().long().clamp(0, width - 1)
    y = centre[:, 1].floor().long().clamp(0, height - 1)
    both = torch.minimum(extent[:, None], anchors[None]).prod(dim=2)
    union = extent.prod(dim=1)[:, None] + anchors.prod(dim=1)[None] - both
    similar = both / union  # overlap of box and anchor laid on one corner
    best = similar.argmax(dim=1)
    over = (similar > IGNORE_IOU).nonzero()
    near[image[over[:, 0]], over[:, 1], y[over[:, 0]], x[over[:, 0]]] = True
    near[image, best, y, x] = True
    is_object[image, best, y, x] = True
    offsets[image, best, y, x] = torch.cat(
        [centre - torch.stack([x, y], dim=1), (extent / anchors[best]).log()], dim=1
    )
    wanted[image, best, y, x, label] = 1.0
    return Targets(is_object, ~near, offsets, wanted)


def yolo_loss(
    outputs: list[Tensor],
    head: YoloHead,
    boxes: list[Tensor],
    labels: list[Tensor],
    mean_over: str,
) -> Tensor:
    """2.5 (BCE x + BCE y) + 2.5 (MSE w + MSE h) + BCE object + 0.5 BCE empty + BCE class; summed
    over the levels.

    mean_over  "grid": every term is a mean over the whole grid, as published; "objects": terms of
               objects are means over objects, so that one small box in a large grid counts
    """
    total = outputs[0].new_zeros(())
    for level, raw in enumerate(outputs):
        grid = (raw.shape[2], raw.shape[3])
        target = make_targets(boxes, labels, head.anchors(level), grid, head.side, head.classes)
        device = raw.device
        here = target.is_object.to(device)
        empty = target.is_empty.to(device)
        offsets, wanted = target.offsets.to(device), target.classes.to(device)
        count = here.sum().clamp_min(1)
        if mean_over == "grid":
            own = rest = float(here.numel())
        else:
            own, rest = float(count), float(empty.sum().clamp_min(1))
        found, place = raw[here], offsets[here]
        xy = F.binary_cross_entropy_with_logits(found[:, :2], place[:, :2], reduction="sum")
        wh = (found[:, 2:4] - place[:, 2:]).square().sum()
        seen = F.binary_cross_entropy_with_logits(
            found[:, 4], torch.ones_like(found[:, 4]), reduction="sum"
        )
        nothing = F.softplus(raw[..., 4][empty]).sum()
        name = F.binary_cross_entropy_with_logits(found[:, 5:], wanted[here], reduction="sum")
        total = total + (XY_WEIGHT * xy + WH_WEIGHT * wh + seen) / own
        total = total + EMPTY_WEIGHT * nothing / rest + name / (count * head.classes)
    return total


@torch.no_grad()
def decode(
    outputs: list[Tensor], head: YoloHead, *, score_cut: float, nms_iou: float
) -> list[tuple[Array, Array, Array]]:
    """For each image (corners [k, 4] px of the input, scores [k], labels [k]), best first.

    The score is the objectness, as published; with several classes, times the class's.
    """
    parts = []
    for level, raw in enumerate(outputs):
        raw = raw.float().cpu()
        batch, _, height, width, _ = raw.shape
        anchors = head.anchors(level)
        cell = torch.tensor([head.side / width, head.side / height])
        ys, xs = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        centre = (raw[..., :2].sigmoid() + torch.stack([xs, ys], dim=-1)) * cell
        size = raw[..., 2:4].clamp_max(LARGEST_LOG_RATIO).exp() * anchors[None, :, None, None]
        score, label = raw[..., 4].sigmoid(), torch.zeros(raw.shape[:4], dtype=torch.int64)
        if head.classes > 1:
            best, label = raw[..., 5:].sigmoid().max(dim=-1)
            score = score * best
        corners = torch.cat([centre - size / 2, centre + size / 2], dim=-1)
        parts.append(
            (
                corners.clamp(0, head.side).reshape(batch, -1, 4),
                score.reshape(batch, -1),
                label.reshape(batch, -1),
            )
        )
    corners, score, label = (torch.cat(p, dim=1) for p in zip(*parts, strict=True))
    found = []
    for b in range(len(corners)):
        over = (score[b] >= score_cut).nonzero()[:, 0]
        # suppression is quadratic: the best thousand are ten times what is kept
        over = over[torch.argsort(score[b][over], descending=True, stable=True)[: 10 * MOST_BOXES]]
        kept = over[
            keep_best(corners[b][over], score[b][over], label[b][over], nms_iou, MOST_BOXES)
        ]
        found.append((corners[b][kept].numpy(), score[b][kept].numpy(), label[b][kept].numpy()))
    return found
