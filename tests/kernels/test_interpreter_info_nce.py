"""The InfoNCE kernels in Triton's interpreter, against plain torch in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mlip.kernels import _chip
from mlip.kernels._contrastive import Pairing, Statistics, center, pull
from mlip.kernels.info_nce import info_nce_loss, op, reference
from tests.kernels.interpreting import interpreted
from tests.kernels.oracle import nearly_collapsed, relative_error

pytest.importorskip("triton", reason="triton is not installed")

pytestmark = pytest.mark.usefixtures("round_like_a_gpu")


def info_nce_pair(count: int, dim: int, seed: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    made = [torch.randn(count, dim, generator=g, dtype=torch.float64) for _ in range(2)]
    return F.normalize(made[0], dim=-1), F.normalize(made[1], dim=-1)


def compare_info_nce(image: Tensor, text: Tensor, tolerance: float, scale: float, ids=None) -> None:
    results = []
    for dtype, impl in ((image.dtype, "triton"), (torch.float64, "torch")):
        made = [x.to(dtype).clone().requires_grad_() for x in (image, text)]
        kappa = torch.tensor(scale, dtype=torch.float64 if impl == "torch" else torch.float32)
        made.append(kappa.requires_grad_())
        value = info_nce_loss(*made, pair_ids=ids, impl=impl)
        results.append([value.detach(), *torch.autograd.grad(value, made)])
    for got, want in zip(*results, strict=True):
        assert relative_error(got, want) <= tolerance


@interpreted
@pytest.mark.parametrize(("count", "dim"), [(1, 16), (3, 20), (65, 24), (150, 130)])
@pytest.mark.parametrize("with_ids", [False, True])
def test_info_nce_is_exact(count: int, dim: int, with_ids: bool) -> None:
    image, text = info_nce_pair(count, dim, 0)
    ids = torch.arange(count) // 2 if with_ids else None
    compare_info_nce(image.float(), text.float(), 1e-5, 20.0, ids)


@interpreted
def test_ids_of_any_strides_are_read_as_they_are() -> None:
    """A column of a table, and one id for all. Oracle: the same ids one behind another."""
    image, text = (x.float().requires_grad_() for x in info_nce_pair(6, 16, 0))
    table = torch.stack([torch.arange(6) // 2, torch.arange(6) + 100], 1)
    for ids in (table[:, 0], torch.zeros(1, dtype=torch.int64).expand(6)):
        made = []
        for given in (ids, ids.contiguous()):
            value = info_nce_loss(image, text, 10.0, pair_ids=given, impl="triton")
            made.append([value, *torch.autograd.grad(value, [image, text])])
        assert all(torch.equal(a, b) for a, b in zip(*made, strict=True))


@interpreted
@pytest.mark.parametrize("scale", [0.0, 75.0, 80.0, 100.0, 400.0])
@pytest.mark.parametrize("with_ids", [False, True])
def test_info_nce_is_exact_at_any_scale(scale: float, with_ids: bool) -> None:
    """Up to about 75 (of unit rows) logits need no maximum; above they do."""
    image, text = info_nce_pair(150, 16, 4)
    ids = torch.arange(150) % 60 if with_ids else None
    # rounding a logit to float32 alone moves its power by scale * 2^-24
    compare_info_nce(image.float(), text.float(), max(1e-5, scale * 2**-21), scale, ids)


@interpreted
@pytest.mark.parametrize("scale", [60.0, 100.0])
def test_info_nce_is_exact_where_no_pair_is_alike(scale: float) -> None:
    """Every logit is near -scale: no power may be lost. Gradients nearly cancel: torch in float32
    is itself off by 1.4e-4."""
    image, noise = info_nce_pair(40, 32, 5)
    one = torch.zeros(32, dtype=torch.float64)
    one[0] = 1.0
    image = F.normalize(one + 0.01 * image, dim=-1)
    text = F.normalize(-one + 0.01 * noise, dim=-1)
    image, text = image.float(), text.float()
    results = []
    for dtype, impl in ((torch.float32, "triton"), (torch.float64, "torch")):
        made = [x.to(dtype).requires_grad_() for x in (image, text)]
        value = info_nce_loss(made[0], made[1], scale, impl=impl)
        results.append([value.detach(), *torch.autograd.grad(value, made)])
    assert relative_error(results[0][0], results[1][0]) <= 1e-6
    for got, want in zip(results[0][1:], results[1][1:], strict=True):
        assert relative_error(got, want) <= 3e-4


@interpreted
def test_info_nce_of_long_rows_is_exact() -> None:
    """Rows ought to have unit length; where they do not, the bound of logits grows with them."""
    image, text = info_nce_pair(40, 32, 6)
    compare_info_nce(30.0 * image.float(), 5.0 * text.float(), 5e-5, 2.0)


@interpreted
def test_info_nce_in_bfloat16_stays_within_its_gate() -> None:
    image, text = info_nce_pair(65, 64, 1)
    compare_info_nce(image.bfloat16(), text.bfloat16(), 5e-3, 20.0)


@interpreted
def test_info_nce_keeps_the_gradient_of_a_confident_batch() -> None:
    image, noise = info_nce_pair(32, 64, 2)
    text = F.normalize(image + 0.05 * noise, dim=-1)
    image, text = image.float(), text.float()
    value = info_nce_loss(image, text, 40.0, impl="triton")
    assert 0 < value.item() < 1e-8
    compare_info_nce(image, text, 1e-4, 40.0)


@interpreted
@pytest.mark.parametrize("features", [torch.float32, torch.bfloat16])
def test_a_scale_keeps_its_digits_where_a_batch_has_nearly_collapsed(features) -> None:
    found = []
    for dtype, impl in ((features, "triton"), (torch.float64, "torch")):
        image, text = (x.to(features).to(dtype) for x in nearly_collapsed())
        wide = torch.float64 if impl == "torch" else torch.float32
        scale = torch.tensor(14.0, dtype=wide, requires_grad=True)
        loss = info_nce_loss(image, text, scale, impl=impl)
        found.append(float(torch.autograd.grad(loss, scale)[0]))
    assert abs(found[0] / found[1] - 1.0) <= 1e-4, found


@interpreted
def test_info_nce_row_and_column_shares_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: one program. With three multiprocessors rows and columns are split over programs."""
    from mlip.kernels.info_nce import triton_kernels

    image, text = info_nce_pair(300, 16, 3)
    monkeypatch.setattr(triton_kernels, "chip_facts", lambda _: _chip.chip_of((9, 0), 3))
    compare_info_nce(image.float(), text.float(), 1e-5, 20.0)


@interpreted
@pytest.mark.parametrize(("with_ids", "tiles"), [(False, 1), (True, 1), (True, 2)])
def test_chunks_of_rows_add_up(monkeypatch: pytest.MonkeyPatch, with_ids: bool, tiles: int) -> None:
    """Chunks of one or two row tiles and odd ends, gradients in bfloat16. Oracle: float64."""
    from mlip.kernels.info_nce import triton_kernels

    image, text = info_nce_pair(301, 24, 7)
    ids = torch.arange(301) // 2 if with_ids else None
    monkeypatch.setattr(triton_kernels, "DS_BYTES", tiles * 2 * 320 * 128)
    compare_info_nce(image.bfloat16(), text.bfloat16(), 5e-3, 20.0, ids)


@interpreted
@pytest.mark.parametrize("features", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_ids", [False, True])
def test_a_share_of_the_rows_gets_its_share_of_gradients(
    features: torch.dtype, with_ids: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on the middle of three ranks: 150 of 300 images against every text. Oracle: float64."""
    from mlip.kernels.info_nce import triton_kernels

    monkeypatch.setattr(triton_kernels, "DS_BYTES", 1)
    count, rows, offset = 300, 150, 57
    image, text = (x.to(features).double() for x in info_nce_pair(count, 24, 8))
    ids = torch.arange(count) // 2 if with_ids else None
    scale, grad = torch.tensor(20.0).double(), torch.tensor(3.0).double()
    weight = torch.full((count,), 0.5 / count).double()
    whole = Pairing([count], 0, ids, None, None, None, weight)
    stats = Statistics(*reference.statistics(image, text, scale, whole))
    share = Pairing([offset, rows, count - offset - rows], offset, ids, None, None, None, weight)
    own = image[offset : offset + rows]
    middle = center(stats, share, scale)
    want = reference.gradients(own, text, (scale, middle), grad, stats, share, True)
    pulls = pull(stats, share, rows)
    numbers = [stats.row_lse[offset : offset + rows], stats.column_lse]
    got = op._gradients(
        own.to(features), text.to(features), scale.float(), middle.float(), grad.float(), ids,
        *(x.float().contiguous() for x in numbers),
        *(x.float().contiguous() for x in pulls), offset, True,
    )  # fmt: skip
    assert got[0].dtype == features and got[1].dtype == torch.float32
    for a, b in zip(got, want, strict=True):
        assert relative_error(a, b) <= (1e-5 if features == torch.float32 else 5e-3)
