"""patch_open_clip on a stand-in: open_clip cannot be imported without an image library.

Oracle: the stand-in's own loss, which makes the matrix of logits. Constructor and call have the
names of open_clip 3.3.0, whose own classes were patched so once: value and gradients to 1e-6.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from mlip.kernels.info_nce import patch_open_clip
from tests.kernels.oracle import relative_error


def _open_clip() -> Any:
    """Classes of their own for every test: the patch changes them for good."""

    class ClipLoss(nn.Module):
        def __init__(
            self,
            local_loss=False,
            gather_with_grad=False,
            cache_labels=False,
            rank=0,
            world_size=1,
            use_horovod=False,
        ):
            super().__init__()
            vars(self).update({k: v for k, v in locals().items() if k not in ("self", "__class__")})
            self.matrices = 0

        def forward(
            self, image_features, text_features, logit_scale, logit_bias=None, output_dict=False
        ):
            self.matrices += 1
            logits = logit_scale * image_features @ text_features.T
            labels = torch.arange(len(logits))
            loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
            return {"contrastive_loss": loss} if output_dict else loss

    class CoCaLoss(ClipLoss):
        def forward(self, image_features, text_features, logit_scale):
            return 2.0 * super().forward(image_features, text_features, logit_scale)

    module: Any = ModuleType("open_clip.loss")
    module.ClipLoss, module.CoCaLoss = ClipLoss, CoCaLoss
    return module


@pytest.fixture
def theirs(monkeypatch: pytest.MonkeyPatch) -> Any:
    package: Any = ModuleType("open_clip")
    package.__path__ = []
    module = _open_clip()
    monkeypatch.setitem(sys.modules, "open_clip", package)
    monkeypatch.setitem(sys.modules, "open_clip.loss", module)
    return module


def _features() -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [F.normalize(torch.randn(6, 8, generator=g), dim=-1).requires_grad_() for _ in "xy"]


def test_losses_made_before_and_after_and_derived_ones_make_no_matrix(theirs: Any) -> None:
    image, text = _features()
    by_name = theirs.ClipLoss  # as open_clip.factory has imported it
    made_before, derived = by_name(cache_labels=True), theirs.CoCaLoss()
    wanted = made_before(image, text, 14.3)
    gradients = torch.autograd.grad(wanted, [image, text])
    patch_open_clip()
    patch_open_clip()
    for loss, factor in ((made_before, 1), (by_name(), 1), (derived, 2)):
        value = loss(image, text, 14.3)
        assert relative_error(value / factor, wanted) <= 1e-6
        for got, want in zip(torch.autograd.grad(value, [image, text]), gradients, strict=True):
            assert relative_error(got / factor, want) <= 1e-5
    assert (made_before.matrices, derived.matrices) == (1, 0)
    named = made_before(image_features=image, text_features=text, logit_scale=14.3,
                        logit_bias=None, output_dict=True)  # fmt: skip
    assert relative_error(named["contrastive_loss"], wanted) <= 1e-6


def test_a_derived_class_with_logits_of_its_own_stays_as_it_is(theirs: Any) -> None:
    class Colder(theirs.ClipLoss):
        def get_logits(self, image_features: Tensor, text_features: Tensor, scale: float) -> Any:
            raise NotImplementedError

    patch_open_clip()
    loss = Colder()
    loss(*_features(), 14.3)
    assert loss.matrices == 1


def test_the_pages_block_patches(theirs: Any) -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "losses.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.DOTALL)
    (block,) = (block for block in blocks if "patch_open_clip()" in block)
    plain = theirs.ClipLoss.forward
    exec(block, {})
    assert theirs.ClipLoss.forward is not plain


@pytest.mark.parametrize(
    "options", [{"world_size": 2}, {"use_horovod": True}], ids=["gather", "horovod"]
)
def test_what_cannot_be_honoured_is_an_error_of_the_first_call(
    theirs: Any, options: dict[str, Any]
) -> None:
    patch_open_clip()
    loss = theirs.ClipLoss(**options)
    with pytest.raises(ValueError, match="gather_with_grad=True|use_horovod=False"):
        loss(*_features(), 14.3)


def test_an_open_clip_without_horovod_is_taken(theirs: Any) -> None:
    """As its main branch is: the constructor has one argument less."""
    loss = theirs.ClipLoss()
    wanted = loss(*_features(), 14.3)
    patch_open_clip()
    del loss.use_horovod
    assert relative_error(loss(*_features(), 14.3), wanted) <= 1e-6


def test_another_call_is_refused_and_left_alone(theirs: Any) -> None:
    def forward(self: Any, image_features: Tensor, text_features: Tensor, scale: Tensor) -> Tensor:
        return scale

    theirs.ClipLoss.forward = forward
    with pytest.raises(RuntimeError, match="to take .*'logit_scale'.* got .*'scale'"):
        patch_open_clip()
    assert theirs.ClipLoss.forward is forward
