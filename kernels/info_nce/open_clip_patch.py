"""ClipLoss inside open_clip, for training code that nobody wants to edit."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor

from mlip.kernels.info_nce.op import ClipLoss


def patch_open_clip() -> None:
    """Let every ClipLoss of open_clip, made or still to be made, compute what ClipLoss here does.

    Its forward method is exchanged on the class itself, so it does not matter who has imported the
    class by name (open_clip.factory, open_clip_train) or derived from it (CoCaLoss;
    DistillClipLoss, SigLipLoss and whatever has get_logits or get_ground_truth of its own stay as
    they are). A second call changes nothing. ClipLoss.forward_of_open_clip is the method before.

    Raises:  ImportError without open_clip; RuntimeError where its ClipLoss.forward takes other
             arguments than this one. The patched loss raises what ClipLoss raises, at its first
             call: for gather_with_grad=False over several ranks, or horovod
    """
    from open_clip.loss import ClipLoss as Theirs

    if Theirs.forward is _forward:
        return
    wanted, found = (list(inspect.signature(f).parameters) for f in (_forward, Theirs.forward))
    if found != wanted:
        raise RuntimeError(
            f"expected open_clip's ClipLoss.forward to take {wanted}, got {found}: this open_clip "
            "is of another version; import mlip.kernels.info_nce.ClipLoss in its place instead"
        )
    Theirs.forward_of_open_clip = Theirs.forward
    Theirs.forward = _forward


def _forward(
    self: Any,
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor | None = None,
    output_dict: bool = False,
) -> Tensor | dict[str, Tensor]:
    from open_clip.loss import ClipLoss as Theirs

    for part in ("get_logits", "get_ground_truth"):
        if getattr(type(self), part, None) is not getattr(Theirs, part, None):
            return self.forward_of_open_clip(
                image_features, text_features, logit_scale, logit_bias, output_dict
            )
    names = ("local_loss", "gather_with_grad", "cache_labels", "rank", "world_size", "use_horovod")
    ours = ClipLoss(**{name: getattr(self, name) for name in names if hasattr(self, name)})
    return ours(image_features, text_features, logit_scale, logit_bias, output_dict)
