"""Symmetric InfoNCE over the global batch in O(B) memory beside inputs and gradients."""

from mlip.kernels.info_nce.op import ClipLoss, info_nce_loss, info_nce_views_loss
from mlip.kernels.info_nce.open_clip_patch import patch_open_clip

__all__ = ["ClipLoss", "info_nce_loss", "info_nce_views_loss", "patch_open_clip"]
