"""Token-knowledge-patch scores of every image against every text, and their contrastive loss."""

from mlip.kernels.token_knowledge_patch.loss import (
    TokenKnowledgePatchLoss,
    contrastive_loss_from_scores,
    token_knowledge_patch_loss,
)
from mlip.kernels.token_knowledge_patch.op import token_knowledge_patch_scores

__all__ = [
    "TokenKnowledgePatchLoss",
    "contrastive_loss_from_scores",
    "token_knowledge_patch_loss",
    "token_knowledge_patch_scores",
]
