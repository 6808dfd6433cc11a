"""Proxy task: do this image and this report belong together?"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from mlip.host_read import HostRead
from mlip.losses.context import LossContext, mean_over_ranks
from mlip.losses.partner import draw_partners
from mlip.ranks.distributed import gather_rows
from mlip.settings.config import Config

FEED_FORWARD_FACTOR = 4  # width of the feed-forward block over D, as in transformers


@dataclass(frozen=True)
class Drawn:
    """Who is shown whom: a wrong text to every own image, a wrong image to every report."""

    false_text_B: Tensor  # [B] int64
    false_image_N: Tensor  # [N] int64 among all ranks' images; -1 where the report has no partner
    is_mine_N: Tensor  # [N] bool: that image is this rank's
    count: HostRead | None  # of is_mine_N, with several ranks


class Matching(nn.Module):
    """Two-way cross-entropy over the true pair, one hard negative image and one hard negative text.

    Cross-attention layers, the report's embedding as the one query and the image's patches as keys,
    then a linear layer. The layers hold no attention among queries, so that tokens as further ones
    would change nothing. A pair is judged on the rank that owns its image: report vectors travel,
    patches never do.

    Cost:    with several ranks the host must know how many drawn images are this rank's: `prepare`
             asks early, so that a GPU has other losses to compute meanwhile; alone, rows without a
             partner are computed and left out of the mean
    Returns: scalar in nats, mean over the three judgements of every sample that has a partner
    Source:  MLIP section 3.4; hard negatives as ALBEF (Li et al. 2021); layers ours.
    """

    def __init__(self, config: Config, dim: int) -> None:
        super().__init__()
        settings = config.loss.matching
        if dim % settings.heads:
            raise ValueError(
                f"loss.matching.heads={settings.heads} does not divide model.embed_dim={dim}"
            )
        self.report = nn.Linear(dim, dim)
        self.patch_norm = nn.LayerNorm(dim)
        self.layers = nn.ModuleList(
            [CrossAttentionLayer(dim, settings.heads) for _ in range(settings.layers)]
        )
        self.norm = nn.LayerNorm(dim)
        self.classifier = nn.Linear(dim, 2)

    def prepare(self, context: LossContext) -> Drawn:
        """The draws, which need the embeddings alone."""
        image_BD, own = context.features.image.embedding.detach(), context.own
        image_ND, text_ND = context.views_all[0], context.views_all[1]
        false_text_B = draw_partners(context, "match_text", image_BD @ text_ND.T.to(image_BD.dtype))
        false_image_B = draw_partners(context, "match_image", text_ND[own] @ image_ND.T)
        false_image_B = torch.where(context.has_partner, false_image_B, -1)
        false_image_N = gather_rows(false_image_B, context.counts)
        is_mine_N = (false_image_N >= own.start) & (false_image_N < own.stop)
        several = len(context.counts) > 1
        count = HostRead(is_mine_N.sum().reshape(1)) if several else None
        return Drawn(false_text_B, false_image_N, is_mine_N, count)

    def forward(self, context: LossContext) -> Tensor:
        drawn: Drawn = context.prepared.pop(self, None) or self.prepare(context)
        own, first = context.own, context.first
        dtype = self.report.weight.dtype
        report_ND = self.report(context.text_embedding_all.to(dtype))
        patch_BPD = self.patch_norm(context.features.image.patches.to(dtype))
        own_report_B2D = torch.stack([report_ND[own], report_ND[drawn.false_text_B]], dim=1)
        logits_B22 = self.classify(own_report_B2D, patch_BPD)

        is_mine_N = drawn.is_mine_N
        if drawn.count is None:
            report_index = torch.arange(is_mine_N.shape[0], device=is_mine_N.device)
        else:
            mine = int(drawn.count.numbers()[0])
            report_index = torch.nonzero_static(is_mine_N, size=mine).squeeze(1)
        is_judged = is_mine_N[report_index]
        image_index = torch.where(is_judged, drawn.false_image_N[report_index] - first, 0)
        away_Q2 = self.classify(report_ND[report_index].unsqueeze(1), patch_BPD[image_index])[:, 0]

        at_home = torch.stack(
            [_negative_log(logits_B22[:, 0], True), _negative_log(logits_B22[:, 1], False)], dim=1
        )
        away = _negative_log(away_Q2, False)
        values = torch.cat([at_home.flatten(), away])
        counted = torch.cat([context.has_partner.repeat_interleave(2), is_judged])
        return mean_over_ranks(values, counted)

    def classify(self, reports: Tensor, patches: Tensor) -> Tensor:
        """Logits (wrong, right) of Q reports with each image, [B, Q, 2]."""
        query = reports
        for layer in self.layers:
            query = layer(query, patches)
        return self.classifier(self.norm(query))


class CrossAttentionLayer(nn.Module):
    """Multi-head cross-attention and a feed-forward block, both residual with norms first.

    Keys and values are never made: a head's key matrix is applied to the few queries instead of the
    many patches, and its value matrix to the attended mean (both are linear, so the result is the
    same). With Q queries, H heads and P patches that is Q (D + H P) / (P D) of the arithmetic, and
    no [P, D] temporaries. A key bias would cancel in the softmax, a value bias is the output's.

    Shapes:  query [B, Q, D], patches [B, P, D] -> [B, Q, D]
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        head_dim = dim // heads
        self.query_norm = nn.LayerNorm(dim)
        self.query = nn.Linear(dim, dim)
        self.key_HED = nn.Parameter(torch.empty(heads, head_dim, dim))
        self.value_HDE = nn.Parameter(torch.empty(heads, dim, head_dim))
        self.out = nn.Linear(dim, dim)
        self.feed_norm = nn.LayerNorm(dim)
        self.widen = nn.Linear(dim, FEED_FORWARD_FACTOR * dim)
        self.narrow = nn.Linear(FEED_FORWARD_FACTOR * dim, dim)
        bound = (3.0 / dim) ** 0.5  # uniform with variance 1 / dim: keeps the rows' scale
        nn.init.uniform_(self.key_HED, -bound, bound)
        nn.init.uniform_(self.value_HDE, -bound, bound)

    def forward(self, query: Tensor, patches: Tensor) -> Tensor:
        rows, queries, dim = query.shape
        heads, head_dim = self.key_HED.shape[:2]
        x = self.query(self.query_norm(query)).view(rows, queries, heads, head_dim)
        asked = torch.einsum("bqhe,hed->bqhd", x, self.key_HED).reshape(rows, queries * heads, dim)
        scores = asked @ patches.transpose(1, 2) * head_dim**-0.5
        weight = torch.softmax(scores, dim=-1, dtype=_at_least_float32(scores)).to(patches.dtype)
        seen = (weight @ patches).view(rows, queries, heads, dim)
        value = torch.einsum("bqhd,hde->bqhe", seen, self.value_HDE).reshape(rows, queries, dim)
        query = query + self.out(value)
        return query + self.narrow(F.gelu(self.widen(self.feed_norm(query))))


def _at_least_float32(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _negative_log(logits: Tensor, is_match: bool) -> Tensor:
    """Cross-entropy of rows of two logits (wrong, right), [..., 2] -> [...]."""
    sign = 1.0 if is_match else -1.0
    logits = logits.to(_at_least_float32(logits))
    return F.softplus(-sign * (logits[..., 1] - logits[..., 0]))
