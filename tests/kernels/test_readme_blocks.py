"""Every Python block that the two READMEs print about the losses runs as it is printed.

The packages that a block comes from stand in as plain torch: open_clip's loss, and maxsim of
late-interaction-kernels; where both ways are printed they must give one number.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
AFTER = "\n# after"
# the packages themselves would need a GPU or an image library
STAND_INS = ("open_clip", "open_clip.loss", "late_interaction_kernels")


def _blocks(page: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


BLOCKS = [block for page in ("README.md", "kernels/README.md") for block in _blocks(page)]


class _OpenClipLoss:
    def __init__(self, **options: Any) -> None:
        assert options["world_size"] == 1

    def __call__(self, image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        logits, labels = scale * image @ text.T, torch.arange(len(image))
        return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def _maxsim(
    queries: Tensor, documents: Tensor, query_mask: Tensor, document_mask: Tensor, normalize: bool
) -> Tensor:
    assert normalize
    unit = [F.normalize(x, dim=-1) for x in (queries, documents)]
    s = torch.einsum("qtd,mpd->qmtp", *unit)
    best = s.masked_fill(~document_mask[None, :, None], -torch.inf).amax(-1)
    return (best * query_mask[:, None]).sum(-1)


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the blocks use without defining it, of the shapes that their pages state."""
    for name in STAND_INS:
        module = ModuleType(name)
        vars(module).update(ClipLoss=_OpenClipLoss, maxsim=_maxsim, __path__=[])
        monkeypatch.setitem(sys.modules, name, module)
    g = torch.Generator().manual_seed(0)
    image, text = (F.normalize(torch.randn(4, 8, generator=g), dim=-1) for _ in range(2))
    mask = torch.arange(5) < torch.tensor([5, 2, 1, 3])[:, None]
    document_mask = torch.arange(6) < torch.tensor([6, 1, 4])[:, None]
    return {
        "rank": 0,
        "world_size": 1,
        "image_features": image,
        "text_features": text,
        "logit_scale": torch.tensor(14.3),
        "patches": torch.randn(4, 6, 8, generator=g),
        "tokens": torch.randn(4, 5, 8, generator=g),
        "knowledge": torch.randn(4, 2, 8, generator=g),
        "mask": mask,
        "scale": torch.tensor(14.3),
        "queries": torch.randn(4, 5, 8, generator=g),
        "documents": torch.randn(3, 6, 8, generator=g),
        "query_mask": mask,
        "document_mask": document_mask,
    }


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_a_block_runs_as_it_is_printed(number: int, names: dict[str, Any]) -> None:
    exec(BLOCKS[number], names)


def test_both_ways_that_a_page_prints_give_one_number(names: dict[str, Any]) -> None:
    first, second, *_ = _blocks("README.md")
    values = []
    for block in (first, second):
        exec(block, names)
        values.append(names["loss"].item())
    assert values[0] == pytest.approx(values[1], rel=1e-6)

    (clip,) = (block for block in _blocks("kernels/README.md") if "open_clip" in block)
    exec(clip, names)
    assert names["total"].item() == pytest.approx(values[0], rel=1e-6)

    (late,) = (block for block in _blocks("kernels/README.md") if "maxsim" in block)
    before, after = late.split(AFTER)
    exec(before, names)
    want = names["scores"]
    exec(f"#{after}", names)
    assert torch.allclose(names["sums"], want, rtol=1e-5, atol=1e-6)


def test_the_pages_print_what_is_tested() -> None:
    named = {name for block in BLOCKS for name in re.findall(r"from (\S+) import", block)}
    assert sorted(named) == [
        "late_interaction_kernels",
        "mlip.kernels.info_nce",
        "mlip.kernels.token_knowledge_patch",
        "open_clip.loss",
    ]
