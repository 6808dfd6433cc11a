"""Floating-point operations of one training step, by formula: what "utilisation" divides.

A product [a, b] x [b, c] is 2abc. Forward, for one sequence of l rows through a transformer of
width d, feed-forward width f and L layers:

    L (2 l (4 d^2 + 2 d f) + 4 l^2 d)         projections and feed-forward; scores and their mean

The image tower adds its patch projection, 2 P d C p^2, with l = P + 1; a head over r rows is
2 r (d h + h D); the local score 2 R N P D over the R rows of all texts that have weight; the
global level 2 V N^2 D over its V = 4 pairings of views. A step is three times that, forward and
the two products of each backward, less one patch projection (images need no gradient). What a
method computes again (attention, local score, gradient cache) is not counted: it is no work of the
model. Left out, 0.03 % of a step at ViT-B/16 by torch's counter: matching, prototypes, divergence,
entity projections; and every elementwise operation and the optimiser, which no counter counts.

`real` counts the tokens of reports, `padded` the rows that the text tower is given.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from mlip.batch import Batch
from mlip.settings.config import Config

# dense bf16 rates that NVIDIA states, TFLOP/s, by what the card's name contains
NOMINAL_TFLOPS = {
    "H200": 989.4,
    "H100 PCIe": 756.5,
    "H100 NVL": 835.5,
    "H100": 989.4,
    "A100": 312.0,
    "L40S": 362.0,
}
VIEW_PAIRINGS = 4


def nominal_tflops(gpu: str | None) -> float | None:
    """What the data sheet says of a card, None where it is not in the table."""
    return next((rate for name, rate in NOMINAL_TFLOPS.items() if gpu and name in gpu), None)


def transformer_forward(
    lengths: Iterable[int], width: int, feed_forward: int, layers: int
) -> float:
    """Of sequences of these lengths through all layers."""
    each = torch.tensor(list(lengths), dtype=torch.float64)
    linear = 2.0 * (4 * width * width + 2 * width * feed_forward) * float(each.sum())
    return layers * (linear + 4.0 * width * float(each.square().sum()))


def head_forward(rows: float, width: int, hidden: int, out: int) -> float:
    return 2.0 * rows * (width * hidden + hidden * out)


def patch_projection(pairs: int, vision: Any) -> float:
    """Of the image tower's first layer; `vision` is its transformers config."""
    patches = (vision.image_size // vision.patch_size) ** 2
    return 2.0 * pairs * patches * vision.hidden_size * vision.num_channels * vision.patch_size**2


def forward_parts(model: Any, batch: Batch, config: Config, *, real: bool) -> dict[str, float]:
    """Operations of one forward pass by part; `model` is an MLIPModel with a ViT and a BERT."""
    vision, text = model.vision.tower.backbone.config, model.text.backbone.config
    pairs, hidden, dim = len(batch), config.model.heads.hidden, config.model.embed_dim
    patches = (vision.image_size // vision.patch_size) ** 2
    whole = torch.full_like(batch.row_index, batch.token_mask.shape[1])
    lengths = (batch.token_mask.sum(dim=1) if real else whole).tolist()
    knowledge = model.state_weights.cpu()[batch.entity_state.cpu()] * batch.entity_mask.cpu()
    rows = float(batch.content_mask.sum()) + float((knowledge > 0).sum())
    tokens = float(sum(lengths))
    return {
        "vision": patch_projection(pairs, vision)
        + transformer_forward(
            [patches + 1] * pairs,
            vision.hidden_size,
            vision.intermediate_size,
            vision.num_hidden_layers,
        ),
        "text": transformer_forward(
            lengths, text.hidden_size, text.intermediate_size, text.num_hidden_layers
        ),
        "heads": head_forward(pairs * (patches + 1), vision.hidden_size, hidden, dim)
        + head_forward(pairs + tokens, text.hidden_size, hidden, dim),
        "local": 2.0 * rows * pairs * patches * dim,
        "global": 2.0 * VIEW_PAIRINGS * pairs * pairs * dim,
    }


def step_flop(model: Any, batch: Batch, config: Config, *, real: bool = True) -> float:
    """Operations of forward and backward together."""
    forward = sum(forward_parts(model, batch, config, real=real).values())
    return 3.0 * forward - patch_projection(len(batch), model.vision.tower.backbone.config)
