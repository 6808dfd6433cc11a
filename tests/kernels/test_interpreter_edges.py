"""Kernels in Triton's interpreter where a case has a rule of its own: nothing to see, no length,
the largest sizes and what lies beyond them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mlip.kernels._chip import SHARED_MEMORY, Chip
from mlip.kernels.info_nce import info_nce_loss, info_nce_views_loss
from mlip.kernels.token_knowledge_patch import tiling, token_knowledge_patch_scores
from tests.kernels.interpreting import compare, interpreted
from tests.kernels.oracle import (
    assert_inference_mode_serves,
    gradients,
    learned_scale_errors,
    leaves,
    make_inputs,
    relative_error,
)

pytest.importorskip("triton", reason="triton is not installed")

pytestmark = pytest.mark.usefixtures("round_like_a_gpu")


@interpreted
@pytest.mark.parametrize("aggregation", ["mean", "lse"])
@pytest.mark.parametrize("pooling", ["attention", "context", "max"])
def test_an_image_without_a_patch_scores_0_and_moves_nothing(
    pooling: str, aggregation: str
) -> None:
    """Whatever gradient its scores get: weights of the texts are what it could reach."""
    inputs = make_inputs(3, 2, 7, 4, 2, 16, seed=8)
    inputs["patch_mask"][1] = False
    compare(inputs, 1e-5, pooling=pooling, aggregation=aggregation)


@interpreted
def test_all_but_one_side_may_come_out_of_inference_mode() -> None:
    assert_inference_mode_serves("triton")


@interpreted
def test_a_context_that_all_but_cancels_is_exact() -> None:
    """Shorter than its floor it is divided by that, and has no direction to project away."""
    patches, tokens = torch.zeros(1, 2, 32), torch.zeros(1, 1, 32)
    patches[0, 0, 0], patches[0, 1, 0], patches[0, 1, 1] = 1.0, -1.0, 5e-7
    tokens[0, 0, :3] = torch.tensor([0.0, 0.8, 0.6])
    compare({"patches": patches, "tokens": tokens}, 1e-4, pooling="context", attention_scale=1.0)


@interpreted
def test_a_large_learned_scale_is_finite_where_rows_are_unlike_every_patch() -> None:
    """A weight of the padding behind the last patch would be e^alpha, and d alpha NaN."""
    generator = torch.Generator().manual_seed(4)
    base = torch.randn(32, generator=generator)
    patches, tokens = (
        (sign * base + 0.05 * torch.randn(2, n, 32, generator=generator)).bfloat16()
        for sign, n in ((1.0, 40), (-1.0, 5))
    )
    for alpha in (0.0, 30.0, 100.0):
        scale = torch.tensor(alpha, requires_grad=True)
        made = [patches.clone().requires_grad_(), tokens.clone().requires_grad_()]
        scores = token_knowledge_patch_scores(*made, attention_scale=scale, impl="triton")
        grads = torch.autograd.grad(scores.square().sum(), [*made, scale])
        assert all(bool(torch.isfinite(x).all()) for x in (scores, *grads))


@interpreted
@pytest.mark.parametrize(("dim", "patches"), [(32, 230), (144, 80)])
def test_a_learned_scale_is_exact_where_an_image_takes_several_tiles(
    dim: int, patches: int
) -> None:
    """By two passes and by library products: what stands for a whole image is added once."""
    errors = learned_scale_errors(10.0, torch.bfloat16, "cpu", dim, patches)
    assert all(error <= 1.5e-2 for error in errors.values()), errors


@interpreted
def test_no_share_of_the_images_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 6 images in 4 shares of 2 the last would be: the pass over rows is compiled for loops that
    run."""
    from mlip.kernels.token_knowledge_patch import triton_kernels

    chip = Chip(SHARED_MEMORY[9, 0], 132)
    monkeypatch.setattr(triton_kernels, "chip_facts", lambda device: chip)
    errors = learned_scale_errors(10.0, torch.float32, "cpu", 16, 20)
    assert all(error <= 1e-5 for error in errors.values()), errors


@interpreted
def test_a_sum_of_powers_that_are_each_in_range_stays_in_range() -> None:
    """40 powers of 2^123: one is bounded without a maximum, their sum is not."""
    generator = torch.Generator().manual_seed(5)
    image, text = (
        F.normalize(torch.eye(1, 32) + 1e-3 * torch.randn(40, 32, generator=generator), dim=-1)
        for _ in range(2)
    )
    value = info_nce_loss(image, text, 85.5, impl="triton")
    truth = info_nce_loss(image.double(), text.double(), 85.5, impl="torch")
    assert relative_error(value, truth) <= 1e-5


BEYOND = [
    ((2, 3, 257), (2, 2, 257), None, torch.bfloat16, "D=257 is above 256"),
    ((1, 2**16 + 1, 16), (1, 2, 16), None, torch.bfloat16, "P=65537 patches are above 65536"),
    ((1, 3, 256), (1, 2, 256), (1, 65, 256), torch.bfloat16, "K=65 entities are above 64"),
    ((1, 3, 256), (1, 2, 256), (1, 17, 256), torch.float32, "K=17 entities are above 16"),
    ((1, 3, 16), (1, 2, 16), None, torch.float64, "the inputs are float64"),
    ((1, 3, 16), (1, 2, 16), None, torch.float8_e4m3fn, "the inputs are float8_e4m3fn"),
]


@interpreted
@pytest.mark.parametrize(("patches", "tokens", "knowledge", "dtype", "message"), BEYOND)
def test_what_the_score_kernels_cannot_take_is_refused(
    patches, tokens, knowledge, dtype, message
) -> None:
    made = [None if x is None else torch.ones(x).to(dtype) for x in (patches, tokens, knowledge)]
    with pytest.raises(ValueError, match=message):
        token_knowledge_patch_scores(*made, impl="triton")


@interpreted
@pytest.mark.parametrize(
    ("dim", "dtype", "message"),
    [
        (513, torch.bfloat16, "D=513 is above 512"),
        (257, torch.float32, "D=257 is above 256"),
        (16, torch.float64, "the inputs are float64"),
    ],
)
def test_what_the_info_nce_kernels_cannot_take_is_refused(dim, dtype, message) -> None:
    rows = torch.ones(2, dim, dtype=dtype)
    with pytest.raises(ValueError, match=message):
        info_nce_loss(rows, rows, 1.0, impl="triton")


@interpreted
@pytest.mark.parametrize(("dim", "dtype"), [(512, torch.bfloat16), (256, torch.float32)])
def test_the_longest_rows_of_info_nce_are_taken(dim: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(6)
    made = F.normalize(torch.randn(2, 3, dim, generator=generator), dim=-1).to(dtype)
    value = info_nce_loss(made[0], made[1], 10.0, impl="triton")
    truth = info_nce_loss(made[0].double(), made[1].double(), 10.0, impl="torch")
    assert relative_error(value, truth) <= 1e-5


@interpreted
def test_the_longest_rows_and_the_most_entities_of_scores_are_taken() -> None:
    compare(make_inputs(1, 2, 3, 2, 16, 256, seed=9, masks=False), 1e-5)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pairs_without_negatives_lose_nothing_and_move_nothing(dtype: torch.dtype) -> None:
    """Their log-sum-exps are -inf."""
    generator = torch.Generator().manual_seed(8)
    made = F.normalize(torch.randn(2, 5, 16, generator=generator), dim=-1).to(dtype)
    leaves = [*made.requires_grad_(), torch.tensor(10.0, requires_grad=True)]
    value = info_nce_loss(*leaves, pair_ids=torch.zeros(5, dtype=torch.int64), impl="triton")
    assert value.item() == 0.0
    assert all(torch.count_nonzero(x) == 0 for x in torch.autograd.grad(value, leaves))


@interpreted
@pytest.mark.parametrize("pooling", ["attention", "context", "max"])
def test_a_kept_graph_gives_the_same_gradients_again(pooling: str) -> None:
    """The backward pass writes over nothing that it was given."""
    made = leaves(make_inputs(2, 2, 20, 5, 2, 16, seed=4), torch.float32)
    value = token_knowledge_patch_scores(**made, pooling=pooling, impl="triton")
    first, second = gradients(value, made), gradients(value, made)
    assert all(torch.equal(first[name], second[name]) for name in first)


@interpreted
def test_autocast_makes_unit_rows_of_bfloat16() -> None:
    """As it does of any product's operands; without it those of float32 inputs stay float32."""
    inputs = {k: x.float() for k, x in make_inputs(2, 2, 20, 5, 2, 16, masks=False).items()}
    rows = [inputs[name][:, 0] for name in ("patches", "tokens")]
    with torch.autocast("cpu", torch.bfloat16):
        loss = info_nce_loss(rows[0], rows[1], 1.0, impl="triton")
        scores = token_knowledge_patch_scores(**inputs, impl="triton")
    narrow = info_nce_loss(rows[0].bfloat16(), rows[1].bfloat16(), 1.0, impl="triton")
    assert torch.equal(loss, narrow)
    assert 1e-4 < relative_error(scores, token_knowledge_patch_scores(**inputs)) <= 1e-2


@interpreted
def test_a_weight_too_small_for_float32_masks_nothing() -> None:
    inputs = {k: x.float() for k, x in make_inputs(2, 2, 20, 5, 2, 16, masks=False).items()}
    ones = torch.ones(2, 5, dtype=torch.float64)
    value, same = (
        token_knowledge_patch_scores(**inputs, token_weights=x, impl="triton")
        for x in (ones, 1e-50 * ones)
    )
    assert torch.equal(value, same)


@interpreted
@pytest.mark.parametrize("dim", [16, 144])
def test_weights_and_gradients_of_any_strides_are_read_as_they_are(dim: int) -> None:
    """Without entities the weights of a text's rows have the strides of token_weights."""
    inputs = make_inputs(2, 3, 20, 5, 0, dim, seed=8)
    features = [inputs[name].bfloat16() for name in ("patches", "tokens")]
    incoming = torch.randn(2, 3, generator=torch.Generator().manual_seed(1))
    found = []
    for turn in (False, True):
        weights, grad = (
            x.T.contiguous().T if turn else x for x in (inputs["token_weights"].float(), incoming)
        )
        made = [x.detach().requires_grad_() for x in (*features, weights)]
        value = token_knowledge_patch_scores(*made[:2], token_weights=made[2], impl="triton")
        found.append([value, *torch.autograd.grad(value, made, grad)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@interpreted
@pytest.mark.parametrize(
    ("pooling", "dim"), [("attention", 16), ("context", 16), ("max", 16), ("attention", 144)]
)
def test_gradients_of_all_rows_are_those_of_their_chunks(
    pooling: str, dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ranks exchange them: every chunk of texts writes to one buffer. Oracle: one chunk."""
    from mlip.kernels.token_knowledge_patch import operators, triton_kernels

    generator = torch.Generator().manual_seed(0)
    patches, tokens = (torch.randn(n, 20, dim, generator=generator) for n in (2, 5))
    narrow, one = dim > 128, torch.tensor(5.0)
    rows = operators.query_rows(tokens, None, None, None, one, one, narrow)
    weight, grad = torch.rand(5, 20, generator=generator), torch.randn(2, 5, generator=generator)
    inputs = (*operators.pack_rows(rows, weight), weight)
    inputs = (*inputs, *operators.unit_patches(patches, None, narrow), one, one, None)
    options, found = (20, pooling, "mean"), []
    problem = tiling.Problem(2, 5, 20, 20, dim, 2 if narrow else 4, pooling, "mean")
    for is_cut in (False, True):
        if is_cut:
            room = 3 * tiling.chunk_bytes(problem, 1, True) - 1
            for module in (tiling, triton_kernels):
                monkeypatch.setattr(module, "workspace_bytes", lambda *_, most=room: most)
            each = 8 * problem.images * problem.stride(1)
            monkeypatch.setattr(triton_kernels, "FORWARD_CHUNK_BYTES", 2 * each)
            assert tiling.text_chunks(problem, True) == [(0, 2), (2, 4), (4, 5)]
        made = operators.pair_scores_op(*inputs, *options, True)
        grads = operators.pair_scores_bwd_op(grad, *inputs, *made, *options, True)
        found.append([made[0], *grads])
    # a score, and the gradient of a row, which adds over images alone
    assert all(torch.equal(found[1][at], found[0][at]) for at in (0, 1))
    assert all(relative_error(b, a) <= 1e-5 for a, b in zip(*found, strict=True))


@interpreted
def test_gradients_of_views_are_added_before_they_are_rounded() -> None:
    """Of eight views each part is rounded once; a sum that is rounded eight times is not."""
    generator = torch.Generator().manual_seed(7)
    image, *texts = F.normalize(torch.randn(9, 12, 32, generator=generator), dim=-1).bfloat16()
    grads = []
    for dtype, impl in ((torch.bfloat16, "triton"), (torch.float64, "torch")):
        leaf = image.to(dtype).requires_grad_()
        value = info_nce_views_loss([leaf], [x.to(dtype) for x in texts], 10.0, impl=impl)
        grads.append(torch.autograd.grad(value, leaf)[0])
    assert relative_error(*grads) <= 3e-3
