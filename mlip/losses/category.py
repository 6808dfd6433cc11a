"""Category level: the views of a sample must agree on prototypes, guided by its entities."""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from mlip.losses.context import LossContext, mean_over_ranks
from mlip.settings.config import Config
from mlip.unit_length import unit_length

IMAGE, TEXT, ENTITIES = 0, 1, 2  # views, in the order of LossContext.views_all
QUEUE_PER_PROTOTYPE = 4
SAFE_LOG_RANGE = 60.0  # exp(60) times the counts of a batch stays below float32's 3e38


class Category(nn.Module):
    """Mean over the terms present of CE(q_t, p_v), CE(q_v, p_t), CE(q_r, p_v), CE(q_r, p_t).

    q are Sinkhorn codes without gradient, p predictions, v image, t text, r the mean of the present
    entities; a sample without present entities has two terms. Balancing sees all ranks' N samples:
    every rank gathers the views and balances all of them, which gives every rank, and one process,
    the same codes with one collective instead of one per sum. While N < 4C the last 4C samples are
    appended for the balancing only; they are buffers, equal on all ranks, and belong to a
    checkpoint.

    Returns: scalar in nats
    Source:  MLIP section 3.4; SwAV (Caron et al. 2020, arXiv 2006.09882) for codes, queue and
             frozen start; terms as method.md section 5.
    """

    queue: Tensor
    queue_valid: Tensor

    def __init__(self, config: Config, dim: int) -> None:
        super().__init__()
        self.settings = config.loss.category
        self.num_views = 3 if self.settings.knowledge_terms else 2
        count = self.settings.prototypes
        self.prototypes = nn.Parameter(F.normalize(torch.randn(count, dim), dim=1))
        rows = QUEUE_PER_PROTOTYPE * count
        self.register_buffer("queue", torch.zeros(self.num_views, rows, dim))
        self.register_buffer("queue_valid", torch.zeros(self.num_views, rows, dtype=torch.bool))

    @torch.no_grad()
    def initialise(self, vectors: Tensor) -> None:
        """Start the prototypes from vectors [C, D], for example k-means centres of the entities."""
        if vectors.shape != self.prototypes.shape:
            raise ValueError(
                f"expected prototypes of shape {list(self.prototypes.shape)} "
                "(loss.category.prototypes, model.embed_dim), got "
                f"{list(vectors.shape)}"
            )
        self.prototypes.copy_(unit_length(vectors))

    def forward(self, context: LossContext) -> Tensor:
        features, settings = context.features, self.settings
        prototypes: Tensor = self.prototypes
        if context.progress < settings.freeze_epochs:
            # a zero gradient, not none: the optimiser then sees the same parameters at every step
            prototypes = prototypes.detach() + 0.0 * prototypes
        prototype_CD = unit_length(prototypes)
        code_VBC = self._codes(context, prototype_CD.detach())

        def prediction(view_BD: Tensor) -> Tensor:
            logits_BC = view_BD.to(prototype_CD.dtype) @ prototype_CD.T
            return torch.log_softmax(logits_BC / settings.prediction_temperature, dim=1)

        image_BC = prediction(features.image.embedding)
        text_BC = prediction(features.text.embedding)
        code_VBC = code_VBC.to(image_BC.dtype)
        pairs = [(TEXT, image_BC), (IMAGE, text_BC)]
        if settings.knowledge_terms:
            pairs += [(ENTITIES, image_BC), (ENTITIES, text_BC)]
        terms = [-(code_VBC[view] * log_p).sum(dim=1) for view, log_p in pairs]
        always = torch.ones_like(features.knowledge.has_present)
        counted = [features.knowledge.has_present if v == ENTITIES else always for v, _ in pairs]
        return mean_over_ranks(torch.stack(terms), torch.stack(counted))

    @torch.no_grad()
    def _codes(self, context: LossContext, prototype_CD: Tensor) -> Tensor:
        """Balanced codes of this rank's samples, [V, B, C]; the queue moves on."""
        views = context.views_all[: self.num_views].to(prototype_CD.dtype)
        valid = torch.ones(views.shape[:2], dtype=torch.bool, device=views.device)
        if self.num_views == 3:
            valid[ENTITIES] = context.has_present_N
        samples = views.shape[1]
        everything, every_valid = views, valid
        if samples < self.queue.shape[1]:
            everything = torch.cat([views, self.queue.to(views.dtype)], dim=1)
            every_valid = torch.cat([valid, self.queue_valid], dim=1)
        code = sinkhorn(
            everything @ prototype_CD.T,
            every_valid,
            temperature=self.settings.sinkhorn_temperature,
            iterations=self.settings.sinkhorn_iterations,
            rows=context.own,
        )
        if self.training and samples < self.queue.shape[1]:
            self._push(views, valid)
        return code

    def _push(self, views: Tensor, valid: Tensor) -> None:
        # a step whose features are not finite is skipped by the engine; it must not live on here
        is_finite = views.isfinite().all(dim=2)
        views = torch.where(is_finite.unsqueeze(2), views, 0.0).to(self.queue.dtype)
        rows = self.queue.shape[1]
        self.queue.copy_(torch.cat([views, self.queue], dim=1)[:, :rows])
        self.queue_valid.copy_(torch.cat([valid & is_finite, self.queue_valid], dim=1)[:, :rows])


@torch.no_grad()
def sinkhorn(
    cosine: Tensor, valid: Tensor, *, temperature: float, iterations: int, rows: slice
) -> Tensor:
    """Codes softmax-like in cosine / temperature, balanced over all N samples, in float32.

    Every column first gets equal mass, then every row mass 1, `iterations` times over.

    Shapes:  cosine [V, N, C], valid [V, N] bool -> [V, rows, C]; rows that are not valid are 0
    Source:  Cuturi 2013 (arXiv 1306.0895); order of steps as SwAV: columns, then rows.
    """
    cosine = cosine.float()
    if 2.0 / temperature <= SAFE_LOG_RANGE:
        return _sinkhorn_by_scaling(cosine, valid, temperature, iterations, rows)
    log_q = (cosine / temperature).masked_fill(~valid.unsqueeze(2), -torch.inf)
    for _ in range(iterations):
        log_q = log_q - _finite(torch.logsumexp(log_q, dim=1, keepdim=True))
        log_q = log_q - _finite(torch.logsumexp(log_q, dim=2, keepdim=True))
    return log_q[:, rows].exp()


def _sinkhorn_by_scaling(
    cosine: Tensor, valid: Tensor, temperature: float, iterations: int, rows: slice
) -> Tensor:
    """One exponential and two matrix-vector products an iteration instead of two passes of it.

    Cosines reach from -1 to 1, so entries reach down to exp(-2 / temperature) and scalings up to
    its inverse; SAFE_LOG_RANGE keeps both inside float32.
    """
    kernel_VNC = torch.exp((cosine - 1.0) / temperature).masked_fill_(~valid.unsqueeze(2), 0.0)
    row_V1N = valid.unsqueeze(1).to(cosine.dtype)
    column_VC1 = row_V1N.new_ones((cosine.shape[0], cosine.shape[2], 1))
    # columns share the rows' total: with mass 1 each, the scalings would drift by N / C a round
    column_mass_V11 = row_V1N.sum(dim=2, keepdim=True) / cosine.shape[2]
    for _ in range(iterations):
        column_VC1 = (_inverse(row_V1N @ kernel_VNC) * column_mass_V11).transpose(1, 2)
        row_V1N = _inverse(kernel_VNC @ column_VC1).transpose(1, 2)
    return kernel_VNC[:, rows] * row_V1N.transpose(1, 2)[:, rows] * column_VC1.transpose(1, 2)


def _inverse(x: Tensor) -> Tensor:
    """1 / x, and 0 for an empty sum."""
    return torch.where(x > 0, 1.0 / x, 0.0)


def _finite(x: Tensor) -> Tensor:
    """0 in place of the -inf of an empty sum."""
    return x.masked_fill(x == -torch.inf, 0.0)
