"""The token-knowledge-patch kernels in Triton's interpreter, against plain torch in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mlip.kernels import _chip
from mlip.kernels.token_knowledge_patch import (
    checks,
    tiling,
    token_knowledge_patch_loss,
    token_knowledge_patch_scores,
)
from tests.kernels.interpreting import compare, interpreted
from tests.kernels.oracle import (
    LAYOUTS,
    LEARNED_SCALES,
    assert_broken_inputs_show,
    assert_broken_weights_show,
    gradients,
    laid_out,
    learned_scale_errors,
    leaves,
    leaves_as_they_are,
    make_inputs,
    poisoned,
    relative_error,
    scaled_half_gradients,
)

pytest.importorskip("triton", reason="triton is not installed")

pytestmark = pytest.mark.usefixtures("round_like_a_gpu")
VARIANTS = [(p, a) for p in ("attention", "context", "max") for a in ("mean", "lse")]
LEARNED = {
    "attention_scale": 7.0,
    "knowledge_scale": 6.0,
    "knowledge_gain": 0.4,
    "aggregation_scale": 4.0,
}


@interpreted
@pytest.mark.parametrize(("pooling", "aggregation"), VARIANTS)
def test_loss_and_all_gradients_are_exact_and_masks_hide(pooling: str, aggregation: str) -> None:
    inputs = make_inputs(3, 3, 20, 9, 3, 24, seed=2)
    inputs["patch_mask"][-1, 3:7] = True
    extra = {k: torch.tensor(v, dtype=torch.float64) for k, v in LEARNED.items()}
    extra["logit_scale"] = torch.tensor(9.0, dtype=torch.float64)
    options: dict[str, Any] = {"pooling": pooling, "aggregation": aggregation}
    made, truth_leaves = leaves(poisoned(inputs) | extra, torch.float32), leaves(inputs | extra)
    value = token_knowledge_patch_loss(**made, impl="triton", **options)
    truth = token_knowledge_patch_loss(**truth_leaves, impl="torch", **options)
    assert relative_error(value, truth) <= 1e-5
    got, want = gradients(value, made), gradients(truth, truth_leaves)
    # a weight's gradient is a difference that float32 does not resolve better than torch does
    plain = leaves(inputs | extra, torch.float32)
    same = gradients(token_knowledge_patch_loss(**plain, impl="torch", **options), plain)
    for name in want:
        allowed = max(1e-5, 2 * relative_error(same[name], want[name]))
        assert relative_error(got[name], want[name]) <= allowed, name


@interpreted
@pytest.mark.parametrize(
    ("images", "texts", "patches", "tokens", "entities", "dim"),
    [(2, 3, 1, 1, 1, 32), (2, 2, 50, 17, 5, 160), (1, 2, 209, 2, 17, 20), (2, 1, 64, 33, 0, 16)],
)
def test_any_size_is_exact(images, texts, patches, tokens, entities, dim) -> None:
    inputs = make_inputs(images, texts, patches, tokens, entities, dim, seed=3, masks=False)
    for pooling in ("attention", "context", "max"):
        compare(inputs, 1e-5, pooling=pooling)


@interpreted
@pytest.mark.parametrize("alpha", [0.0, 74.0, 76.0, 200.0])
@pytest.mark.parametrize("pooling", ["attention", "context"])
def test_any_attention_scale_is_exact(alpha: float, pooling: str) -> None:
    inputs = make_inputs(2, 2, 20, 5, 2, 16, seed=4)
    # rounding the logit alpha * s to float32 alone moves a softmax weight by alpha * 2^-24
    compare(inputs, max(1e-5, alpha * 2**-22), pooling=pooling, attention_scale=alpha)


@interpreted
@pytest.mark.parametrize(("pooling", "gate"), [("attention", 5e-3), ("context", 1.5e-2)])
def test_bfloat16_stays_within_its_gate(pooling: str, gate: float) -> None:
    inputs = make_inputs(2, 2, 100, 24, 3, 128, seed=5)
    inputs["patch_mask"][-1] = True
    compare(inputs, gate, features=torch.bfloat16, pooling=pooling)


@interpreted
@pytest.mark.parametrize("alpha", LEARNED_SCALES)
@pytest.mark.parametrize("features", [torch.float32, torch.bfloat16])
def test_a_learned_attention_scale_is_exact_on_every_way(alpha: float, features) -> None:
    errors = learned_scale_errors(alpha, features, "cpu", 64, 50)
    most = max(1e-5, alpha * 2**-20) if features == torch.float32 else 1.5e-2
    assert all(error <= most for error in errors.values()), errors


@interpreted
@pytest.mark.parametrize("alpha", [0.5, 10.0, 76.0])
@pytest.mark.parametrize("features", [torch.float32, torch.bfloat16])
def test_a_learned_attention_scale_of_contexts_is_exact(alpha: float, features) -> None:
    errors = learned_scale_errors(alpha, features, "cpu", 64, 50, "context")
    # rounding to bfloat16 moves a softmax logit by up to alpha 2^-9
    narrow = max(1.5e-2, alpha * 2**-9)
    most = max(1e-5, alpha * 2**-20) if features == torch.float32 else narrow
    assert all(error <= most for error in errors.values()), errors


@interpreted
@pytest.mark.parametrize("pooling", ["attention", "context"])
def test_a_learned_attention_scale_keeps_its_digits_where_patches_are_alike(pooling: str) -> None:
    """Its gradient is a small part of a sum over similarities that are all near 1."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(3, 1, 32, generator=generator) + torch.randn(1, 1, 32, generator=generator)
    patches, tokens = (base + 0.1 * torch.randn(3, n, 32, generator=generator) for n in (20, 6))
    found = []
    for impl, dtype in (("triton", torch.float32), ("torch", torch.float64)):
        scale = torch.tensor(10.0, dtype=dtype, requires_grad=True)
        loss = token_knowledge_patch_loss(
            patches.to(dtype), tokens.to(dtype), logit_scale=20.0, attention_scale=scale,
            pooling=pooling, impl=impl,
        )  # fmt: skip
        found.append(float(torch.autograd.grad(loss, scale)[0]))
    assert abs(found[0] / found[1] - 1.0) <= 3e-5, found


@interpreted
def test_bfloat16_max_pooling_stays_within_its_gate_where_no_maximum_is_near_a_tie() -> None:
    """Rounding may swap two nearly equal maxima: this seed's smallest gap is 0.0098."""
    inputs = make_inputs(2, 2, 20, 12, 3, 128, seed=10)
    inputs["patch_mask"][-1] = True
    compare(inputs, 5e-3, features=torch.bfloat16, pooling="max")


@interpreted
@pytest.mark.parametrize("pooling", ["attention", "context", "max"])
def test_chunks_of_texts_change_nothing(pooling: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: one chunk whose statistics the forward pass keeps."""
    inputs = make_inputs(2, 5, 20, 6, 2, 16, seed=6)
    whole, cut = leaves(inputs, torch.float32), leaves(inputs, torch.float32)
    value = token_knowledge_patch_scores(**whole, pooling=pooling, impl="triton")
    want = gradients(value, whole)
    from mlip.kernels.token_knowledge_patch import triton_kernels

    problem = tiling.Problem(2, 5, 8, 20, 16, 4, pooling, "mean")
    two_texts = 3 * tiling.chunk_bytes(problem, 1) - 1  # a context's share is three quarters
    for module in (tiling, triton_kernels):
        monkeypatch.setattr(module, "workspace_bytes", lambda *_: two_texts)
    monkeypatch.setattr(triton_kernels, "FORWARD_CHUNK_BYTES", 1)
    assert tiling.text_chunks(problem) == [(0, 2), (2, 4), (4, 5)]
    again = token_knowledge_patch_scores(**cut, pooling=pooling, impl="triton")
    assert torch.equal(again, value)
    got = gradients(again, cut)
    for name in want:
        assert relative_error(got[name], want[name]) <= 1e-6, name
    # a row's gradient adds over images alone: its text's chunk is not seen in any bit
    assert all(torch.equal(got[name], want[name]) for name in ("tokens", "knowledge"))


@interpreted
def test_rows_of_positive_weight_are_packed_in_order_and_zeros_follow() -> None:
    from mlip.kernels.token_knowledge_patch.pack_triton_kernels import pack_rows

    g = torch.Generator().manual_seed(0)
    rows = torch.randn(5, 70, 24, generator=g)
    weight = torch.rand(5, 70, generator=g) - 0.4
    weight[2] = 0.0
    rows[weight <= 0] = torch.nan
    packed, index, text, bounds = pack_rows(rows, weight)
    real = (weight > 0).reshape(-1).nonzero()[:, 0]
    count = len(real)
    assert bounds.tolist() == [0, *(weight > 0).sum(1).cumsum(0).tolist()]
    assert torch.equal(index[:count].long(), real) and torch.equal(text[:count].long(), real // 70)
    assert torch.equal(packed[:count], rows.reshape(-1, 24)[real])
    assert torch.count_nonzero(packed[count : count + tiling.ROW_TAIL]) == 0


@interpreted
def test_a_score_does_not_depend_on_its_neighbours_bit_for_bit() -> None:
    inputs = {
        k: v.float() if v.is_floating_point() else v
        for k, v in make_inputs(3, 4, 20, 9, 3, 16, seed=7).items()
    }
    value = token_knowledge_patch_scores(**inputs, impl="triton")
    order = torch.tensor([2, 0, 3, 1])
    images = ("patches", "patch_mask")
    shuffled = {k: v if k in images else v[order] for k, v in inputs.items()}
    assert torch.equal(token_knowledge_patch_scores(**shuffled, impl="triton"), value[:, order])
    part = {k: v[1:] if k in images else v[1:3] for k, v in inputs.items()}
    assert torch.equal(token_knowledge_patch_scores(**part, impl="triton"), value[1:, 1:3])


@interpreted
@pytest.mark.parametrize("alpha", [50.0, 74.0, 150.0])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_row_like_every_patch_is_exact(alpha: float, sign: float) -> None:
    """Powers of e^alpha or e^-alpha throughout: neither they nor a context's square are lost.

    Beyond the last patch, where a similarity is 0, a weight would be e^alpha: more than float32 has
    at 150.
    """
    g = torch.Generator().manual_seed(15)
    base = torch.randn(32, generator=g, dtype=torch.float64)
    patches, tokens = (
        base + 0.05 * torch.randn(2, n, 32, generator=g, dtype=torch.float64) for n in (40, 5)
    )
    for pooling in ("attention", "context"):
        made = leaves({"patches": patches, "tokens": sign * tokens}, torch.float32)
        truth_leaves = leaves({"patches": patches, "tokens": sign * tokens})
        options: dict[str, Any] = {"pooling": pooling, "attention_scale": alpha}
        value = token_knowledge_patch_scores(**made, impl="triton", **options)
        truth = token_knowledge_patch_scores(**truth_leaves, impl="torch", **options)
        assert relative_error(value, truth) <= 1e-6
        got, want = gradients(value, made), gradients(truth, truth_leaves)
        assert all(relative_error(got[name], want[name]) <= 1e-4 for name in want)


@interpreted
def test_max_pooling_numbers_thousands_of_patches() -> None:
    g = torch.Generator().manual_seed(16)
    patches = torch.randn(1, 4224, 16, generator=g).bfloat16()
    tokens = (patches[:, [0, 255, 256, 4090, 4100, 4117, 4133, 4223]].float() * 2.0).bfloat16()
    made = patches.clone().requires_grad_()
    value = token_knowledge_patch_scores(made, tokens, pooling="max", impl="triton")
    (grad,) = torch.autograd.grad(value.sum(), [made])
    chosen = (torch.nn.functional.normalize(tokens.float(), dim=-1)
              @ torch.nn.functional.normalize(patches.float(), dim=-1).mT).argmax(-1)  # fmt: skip
    assert grad[0].float().norm(dim=1).nonzero()[:, 0].tolist() == sorted(chosen[0].tolist())


@interpreted
@pytest.mark.parametrize(("pooling", "aggregation"), VARIANTS)
def test_what_is_not_a_number_shows_in_the_score(pooling: str, aggregation: str) -> None:
    assert_broken_inputs_show("triton", "cpu", pooling, aggregation)


@interpreted
@pytest.mark.parametrize("aggregation", ["mean", "lse"])
def test_a_weight_that_is_not_a_number_shows_in_the_score(
    aggregation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "has_values", lambda _: False)  # as on a GPU
    for bad in (torch.nan, torch.inf):
        assert_broken_weights_show("triton", "cpu", aggregation, bad)


@interpreted
@pytest.mark.parametrize("order", LAYOUTS)
def test_any_strides_are_read_in_place(order: tuple[int, int, int]) -> None:
    inputs = make_inputs(2, 3, 20, 5, 2, 16, seed=8)
    turned = {
        n: laid_out(x, order) if x.ndim == 3 else x.T.contiguous().T for n, x in inputs.items()
    }
    assert not turned["tokens"].is_contiguous() and not turned["token_weights"].is_contiguous()
    made, truth_leaves = leaves(turned, torch.float32), leaves(inputs)
    value = token_knowledge_patch_scores(**made, impl="triton")
    truth = token_knowledge_patch_scores(**truth_leaves)
    assert relative_error(value, truth) <= 1e-6
    got, want = gradients(value, made), gradients(truth, truth_leaves)
    for name in ("patches", "tokens", "knowledge"):
        assert relative_error(got[name], want[name]) <= 1e-5, name


@interpreted
@pytest.mark.parametrize("gamma", [5.0, 20.0, 50.0])
def test_a_learned_aggregation_scale_keeps_its_digits(gamma: float) -> None:
    """Its gradient is the small difference of two sums over all pairs. Oracle: float64."""
    generator = torch.Generator().manual_seed(1)
    patches = torch.randn(6, 24, 32, generator=generator)
    tokens = torch.randn(6, 20, 32, generator=generator) + 2 * patches[:, :20]
    found = []
    for impl, dtype in (("triton", torch.float32), ("torch", torch.float64)):
        scale = torch.tensor(gamma, dtype=dtype, requires_grad=True)
        loss = token_knowledge_patch_loss(
            patches.to(dtype), tokens.to(dtype), logit_scale=30.0, aggregation="lse",
            aggregation_scale=scale, impl=impl,
        )  # fmt: skip
        found.append(float(torch.autograd.grad(loss, scale)[0]))
    assert abs(found[0] / found[1] - 1.0) <= 1e-5, found


@interpreted
@pytest.mark.parametrize("alpha", [0.5, 10.0, 60.0])
def test_gradients_of_a_confident_batch_reach_a_learned_attention_scale(alpha: float) -> None:
    """Incoming gradients of 1e-23, whose square is no float32. Oracle: float64."""
    generator = torch.Generator().manual_seed(0)
    patches, tokens = (
        torch.eye(4, 32)[:, None] + 0.08 * torch.randn(4, count, 32, generator=generator)
        for count in (24, 8)
    )
    found = []
    for impl, dtype in (("triton", torch.float32), ("torch", torch.float64)):
        scale = torch.tensor(alpha, dtype=dtype, requires_grad=True)
        loss = token_knowledge_patch_loss(
            patches.to(dtype), tokens.to(dtype), logit_scale=70.0, attention_scale=scale, impl=impl
        )
        found.append(float(torch.autograd.grad(loss, scale)[0]))
    assert 0 < abs(found[1]) < 1e-20
    # the loss itself is e^-53, whose exponent float32 rounds
    assert abs(found[0] / found[1] - 1.0) <= 1e-4, found


@interpreted
@pytest.mark.parametrize("aggregation", ["mean", "lse"])
def test_a_batch_without_anchors_loses_nothing_and_moves_nothing(aggregation: str) -> None:
    inputs = make_inputs(2, 2, 20, 5, 2, 16, seed=9)
    inputs["patch_mask"] = torch.zeros(2, 20, dtype=torch.bool)
    made = leaves(inputs, torch.float32)
    value = token_knowledge_patch_loss(
        **made, logit_scale=10.0, aggregation=aggregation, impl="triton"
    )
    assert value.item() == 0.0
    assert all(torch.count_nonzero(grad) == 0 for grad in gradients(value, made).values())


@interpreted
def test_the_lowest_of_equal_maxima_takes_the_gradient() -> None:
    row = torch.tensor([0.6, 0.8])
    patches = torch.stack([-row, *[row] * 40])[None].requires_grad_()
    value = token_knowledge_patch_scores(
        patches, torch.tensor([[[1.0, 0.0]]]), pooling="max", impl="triton"
    )
    (grad,) = torch.autograd.grad(value.sum(), [patches])
    assert grad[0].abs().sum(1).nonzero()[:, 0].tolist() == [1]


@interpreted
def test_rows_of_any_finite_length_are_normalised() -> None:
    patches = torch.randn(1, 4, 16, generator=torch.Generator().manual_seed(0))
    scaled = patches.clone()
    scaled[0, 1] *= 1e20
    scaled[0, 2] *= 1e-20
    scaled[0, 3] = 0.0
    equal = patches.clone()
    equal[0, 2:] = 0.0
    tokens = torch.randn(1, 3, 16, generator=torch.Generator().manual_seed(1))
    made = scaled.requires_grad_()
    value = token_knowledge_patch_scores(made, tokens, impl="triton")
    assert relative_error(value, token_knowledge_patch_scores(equal, tokens)) <= 1e-6
    (grad,) = torch.autograd.grad(value.sum(), [made])
    assert torch.isfinite(grad).all() and torch.count_nonzero(grad[0, 2:]) == 0


@interpreted
def test_zero_rows_of_tokens_and_entities_are_exact() -> None:
    inputs = make_inputs(2, 2, 20, 5, 2, 16, seed=13, masks=False)
    inputs["tokens"][0, 1] = 0.0
    inputs["knowledge"][1, 0] = 0.0
    compare(inputs, 1e-5)


@interpreted
def test_mixed_dtypes_are_multiplied_in_bfloat16_and_an_unused_scale_gets_gradient_zero() -> None:
    inputs = make_inputs(2, 2, 20, 5, 0, 64, seed=14, masks=False)
    mixed = {"patches": inputs["patches"].bfloat16(), "tokens": inputs["tokens"].float()}
    made, truth_leaves = leaves_as_they_are(mixed), leaves(mixed)
    unused = torch.tensor(5.0, requires_grad=True)
    value = token_knowledge_patch_scores(**made, aggregation_scale=unused, impl="triton")
    truth = token_knowledge_patch_scores(**truth_leaves, impl="torch")
    assert relative_error(value, truth) <= 5e-3
    got, want = gradients(value, made | {"unused": unused}), gradients(truth, truth_leaves)
    for name, dtype in (("patches", torch.bfloat16), ("tokens", torch.float32)):
        assert got[name].dtype == dtype
        assert relative_error(got[name], want[name]) <= 1e-2, name
    assert got["unused"].item() == 0.0


@interpreted
def test_scores_split_over_programs_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: float64. With many multiprocessors each pass is cut into partial sums."""
    from mlip.kernels.token_knowledge_patch import triton_kernels

    monkeypatch.setattr(triton_kernels, "chip_facts", lambda _: _chip.chip_of((9, 0), 64))
    # of this seed no gradient of a weight nearly cancels, as one of a context does of seed 12:
    # there the rounding of r in float32 is 2e-5 of it, with one program as with many
    inputs = make_inputs(3, 4, 20, 40, 2, 16, seed=13)
    for pooling in ("attention", "context", "max"):
        compare(inputs, 1e-5, pooling=pooling)


@interpreted
def test_gradients_of_float16_features_survive_a_grad_scaler() -> None:
    """Oracle: float64 of the same rounded features."""
    got, want = scaled_half_gradients("triton", 2.0**10)
    for name in want:
        assert torch.isfinite(got[name]).all()
        assert relative_error(got[name], want[name]) <= 1e-2, name  # of rows of 16 in bfloat16
