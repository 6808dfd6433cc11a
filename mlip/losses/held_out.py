"""What held-out pairs are scored by while a run trains: contrastive losses, and retrieval."""

from __future__ import annotations

import torch
from torch import Tensor

from mlip.losses.context import LossContext

# the losses that need no draw and leave no state behind: equal weights give equal numbers
HELD_OUT_LOSSES = ("global_contrastive", "local_alignment")
RECALL_AT = 10


def recall_terms(context: LossContext, at: int = RECALL_AT) -> dict[str, Tensor]:
    """recall@`at` of the global embeddings among all N pairs of the batch, both ways.

    Pairs of equal pair_id are right answers for each other, ties and NaN count against, a pair
    whose report says nothing is neither asked nor an answer.

    Returns: {"recall@10 image to text", "recall@10 text to image"}, each a scalar; equal on all
             ranks
    Source:  ours; as mlip/transfer/alignment/retrieval.py counts, where N is the pool.
    """
    image_ND, text_ND, _ = context.views_all
    scores_NN = image_ND.float() @ text_ND.float().T
    is_pair_NN = context.pair_id_N[:, None] == context.pair_id_N[None, :]
    has_text_N = context.text_valid_N
    asked = has_text_N.float()
    count = asked.sum().clamp_min(1.0)
    images = (_wrong_above(scores_NN, is_pair_NN, has_text_N) < at) * asked
    texts = (_wrong_above(scores_NN.T, is_pair_NN, has_text_N) < at) * asked
    return {
        f"recall@{at} image to text": images.sum() / count,
        f"recall@{at} text to image": texts.sum() / count,
    }


def _wrong_above(scores: Tensor, is_right: Tensor, is_candidate: Tensor) -> Tensor:
    """[Q] how many wrong candidates stand at or above the best right one."""
    best_Q = scores.masked_fill(~(is_right & is_candidate), -torch.inf).amax(dim=1)
    is_above = ~(scores < best_Q[:, None]) & ~is_right & is_candidate
    return is_above.sum(dim=1)
