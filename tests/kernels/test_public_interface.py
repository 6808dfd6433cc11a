"""The operators' signatures as promised, and the ways a user may call them."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from mlip.kernels.info_nce import ClipLoss, info_nce_loss
from mlip.kernels.token_knowledge_patch import (
    TokenKnowledgePatchLoss,
    contrastive_loss_from_scores,
    token_knowledge_patch_loss,
    token_knowledge_patch_scores,
)
from tests.circles import tensors_in_circles
from tests.kernels.oracle import (
    gradients,
    leaves,
    leaves_as_they_are,
    make_inputs,
    relative_error,
    scaled_half_gradients,
)

SCORES = {
    "token_weights": None,
    "knowledge_weights": None,
    "knowledge_mask": None,
    "patch_mask": None,
    "attention_scale": 10.0,
    "knowledge_scale": 10.0,
    "knowledge_gain": 0.5,
    "knowledge_share": 0.25,
    "pooling": "attention",
    "aggregation": "mean",
    "aggregation_scale": 5.0,
    "group": None,
    "impl": "auto",
}
INPUTS = ("patches", "tokens", "knowledge")
REQUIRED = inspect.Parameter.empty


def parts(function: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Defaults of what may come by position, and of what comes by keyword alone."""
    by_position, by_keyword = {}, {}
    for name, parameter in inspect.signature(function).parameters.items():
        assert parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        is_keyword = parameter.kind is parameter.KEYWORD_ONLY
        (by_keyword if is_keyword else by_position)[name] = parameter.default
    return by_position, by_keyword


def test_signatures_are_as_promised() -> None:
    three = {"patches": REQUIRED, "tokens": REQUIRED, "knowledge": None}
    assert parts(token_knowledge_patch_scores) == (three, SCORES)
    more = {"logit_scale": REQUIRED, "pair_ids": None}
    assert parts(token_knowledge_patch_loss) == (three, SCORES | more)
    validity = {"image_valid": None, "text_valid": None, "group": None}
    assert parts(contrastive_loss_from_scores) == ({"scores": REQUIRED}, more | validity)
    positional, named = parts(info_nce_loss)
    assert list(positional) == ["image_features", "text_features", "logit_scale"]
    assert named == {"pair_ids": None, "group": None, "impl": "auto"}
    options = {name: SCORES[name] for name in list(SCORES)[4:]}
    options |= {"learn_scales": True, "logit_scale": 1 / 0.07}
    assert parts(TokenKnowledgePatchLoss) == ({}, options)
    positional, named = parts(TokenKnowledgePatchLoss().forward)
    assert positional == three
    masks = {name: None for name in list(SCORES)[:4]}
    assert named == masks | {"pair_ids": None, "output_dict": False}


def test_clip_loss_has_open_clips_signatures() -> None:
    """Oracle: a copy of those of mlfoundations/open_clip 2.x, which 3.3.0 still has."""
    positional, named = parts(ClipLoss)
    assert not named and list(positional.items()) == [
        ("local_loss", False),
        ("gather_with_grad", False),
        ("cache_labels", False),
        ("rank", 0),
        ("world_size", 1),
        ("use_horovod", False),
    ]
    positional, named = parts(ClipLoss().forward)
    assert not named and list(positional.items()) == [
        ("image_features", REQUIRED),
        ("text_features", REQUIRED),
        ("logit_scale", REQUIRED),
        ("logit_bias", None),
        ("output_dict", False),
    ]


def _square(seed: int = 0, **options: Any) -> dict[str, Any]:
    inputs = make_inputs(4, 4, 5, 6, 3, 8, seed=seed, **options)
    inputs["patch_mask"][-1] = True
    return inputs


def test_features_may_come_in_different_dtypes() -> None:
    """Oracle: the same numbers in float64."""
    kinds = {"patches": torch.bfloat16, "tokens": torch.float32, "knowledge": torch.float16}
    inputs = _square()
    mixed = {
        k: v.to(kinds.get(k, torch.float32)) if v.is_floating_point() else v
        for k, v in inputs.items()
    }
    made, truth_leaves = leaves_as_they_are(mixed), leaves(mixed)
    value = token_knowledge_patch_loss(**made, logit_scale=10.0)
    truth = token_knowledge_patch_loss(**truth_leaves, logit_scale=10.0)
    assert value.dtype == torch.float32 and relative_error(value, truth) <= 1e-6
    got, want = gradients(value, made), gradients(truth, truth_leaves)
    for name, dtype in kinds.items():
        assert got[name].dtype == dtype
        assert relative_error(got[name], want[name]) <= 4e-3, name  # its own rounding


def test_one_input_of_float64_makes_the_call_float64() -> None:
    inputs = {k: v.float() if v.is_floating_point() else v for k, v in _square().items()}
    rows = [F.normalize(inputs[name][:, 0], dim=-1) for name in ("patches", "tokens")]
    for name in INPUTS:
        value = token_knowledge_patch_loss(
            **inputs | {name: inputs[name].double()}, logit_scale=10.0
        )
        truth = token_knowledge_patch_loss(**leaves(inputs), logit_scale=10.0)
        assert value.dtype == torch.float64 and relative_error(value, truth) <= 1e-12
    for wide in (0, 1):
        image, text = (x.double() if side == wide else x for side, x in enumerate(rows))
        truth = info_nce_loss(rows[0].double(), rows[1].double(), 10.0)
        assert torch.equal(info_nce_loss(image, text, 10.0), truth)


def test_scores_of_bfloat16_are_multiplied_and_summed_in_float32() -> None:
    narrow = torch.randn(6, 6, generator=torch.Generator().manual_seed(0)).bfloat16()
    value = contrastive_loss_from_scores(narrow, logit_scale=10.0)
    truth = contrastive_loss_from_scores(narrow.double(), logit_scale=10.0)
    assert value.dtype == torch.float32 and relative_error(value, truth) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_scale_may_be_one_entry_of_any_dtype(dtype: torch.dtype) -> None:
    inputs = {k: v.float() if v.is_floating_point() else v for k, v in _square().items()}
    rows = [F.normalize(inputs[name][:, 0], dim=-1) for name in ("patches", "tokens")]

    def losses(scale: float | Tensor) -> list[Tensor]:
        found = [info_nce_loss(rows[0], rows[1], scale)]
        found += [token_knowledge_patch_loss(**inputs, logit_scale=scale)]
        return [*found, token_knowledge_patch_loss(**inputs, logit_scale=3, attention_scale=scale)]

    scale = torch.tensor([10.0], dtype=dtype, requires_grad=True)
    for value, want in zip(losses(scale), losses(10.0), strict=True):
        assert value.dtype == torch.float32 and torch.equal(value, want)
        assert torch.autograd.grad(value, scale)[0].item() != 0.0


def test_weights_may_be_boolean_masks() -> None:
    """As the tokenizers' own attention masks are, compared with 0."""
    inputs = _square()
    masks = {
        name: (inputs[name] > 0.3) | (torch.arange(inputs[name].shape[1]) == 0)
        for name in ("token_weights", "knowledge_weights")
    }
    value = token_knowledge_patch_loss(**inputs | masks, logit_scale=10.0)
    floats = {name: mask.double() for name, mask in masks.items()}
    assert torch.equal(value, token_knowledge_patch_loss(**inputs | floats, logit_scale=10.0))


def test_features_of_eight_bits_are_left_to_torch() -> None:
    inputs = {k: v.float() if v.is_floating_point() else v for k, v in _square().items()}
    tiny = inputs | {"tokens": inputs["tokens"].to(torch.float8_e4m3fn)}
    with pytest.raises(ValueError, match="the inputs are float8_e4m3fn|needs an NVIDIA GPU"):
        token_knowledge_patch_loss(**tiny, logit_scale=10.0, impl="triton")
    value = token_knowledge_patch_loss(**{"tokens": tiny["tokens"], "patches": inputs["patches"]},
                                       logit_scale=10.0)  # fmt: skip
    wide = {"tokens": tiny["tokens"].float(), "patches": inputs["patches"]}
    assert torch.equal(value, token_knowledge_patch_loss(**wide, logit_scale=10.0))


def test_the_module_asks_for_the_implementation_that_it_was_told() -> None:
    with pytest.raises(ValueError, match='impl="triton" cannot run'):
        TokenKnowledgePatchLoss(impl="triton")(torch.ones(2, 3, 8), torch.ones(2, 4, 8))


class _Handle:
    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("cannot pickle a process group")


def test_a_copy_of_the_module_shares_its_group_and_nothing_else() -> None:
    """As torch.optim.swa_utils.AveragedModel copies a model. Oracle: the gradients of each."""
    module = TokenKnowledgePatchLoss(aggregation="lse")
    module.group = handle = _Handle()
    twin = copy.deepcopy(nn.Sequential(module))[0]
    assert type(twin) is TokenKnowledgePatchLoss and twin.group is handle
    module.group = twin.group = None
    inputs = {k: v.float() if v.is_floating_point() else v for k, v in _square().items()}
    value = twin(**inputs)
    assert torch.equal(value, module(**inputs))
    value.backward()
    assert all(p.grad is not None for p in twin.parameters())
    assert all(p.grad is None for p in module.parameters())


def test_slices_at_odd_offsets_and_inference_mode_change_nothing() -> None:
    inputs = {k: v.float() if v.is_floating_point() else v for k, v in _square().items()}
    want = token_knowledge_patch_loss(**inputs, logit_scale=10.0)
    odd = dict(inputs)
    for name in INPUTS:
        flat = torch.full((inputs[name].numel() + 3,), torch.nan)
        flat[3:] = inputs[name].flatten()
        odd[name] = flat[3:].view(inputs[name].shape)
        assert odd[name].data_ptr() % 16 != 0
    assert torch.equal(token_knowledge_patch_loss(**odd, logit_scale=10.0), want)
    with torch.inference_mode():
        assert torch.equal(token_knowledge_patch_loss(**inputs, logit_scale=10.0), want)


def test_an_expanded_gradient_is_taken() -> None:
    made = leaves(_square())
    value = token_knowledge_patch_scores(**made)
    ones = torch.ones((), dtype=value.dtype)
    got = torch.autograd.grad(value, [made["tokens"]], ones.expand_as(value), retain_graph=True)
    want = torch.autograd.grad(value, [made["tokens"]], torch.ones_like(value))
    assert torch.equal(got[0], want[0])


def test_a_cached_gradient_equals_the_direct_one() -> None:
    """Oracle: one graph. Features are detached, their gradients stored and pushed through later."""
    inputs = _square(3)
    tower = torch.nn.Linear(8, 8).double()
    rest = {k: v for k, v in inputs.items() if k != "patches"}

    def loss(patches: Tensor) -> Tensor:
        return token_knowledge_patch_loss(patches, **rest, logit_scale=10.0)

    (want,) = torch.autograd.grad(loss(tower(inputs["patches"])), [tower.weight])
    features = tower(inputs["patches"]).detach().requires_grad_()
    (cache,) = torch.autograd.grad(loss(features), [features])
    total = torch.zeros_like(want)
    for rows, part in zip(inputs["patches"].split(1), cache.split(1), strict=True):
        total += torch.autograd.grad(tower(rows), [tower.weight], part)[0]
    assert relative_error(total, want) <= 1e-12


def test_torch_compile_gives_the_same_loss_and_gradients_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.undo()  # torch.compile cannot trace the poisoned torch.empty of tests/conftest.py
    inputs = leaves(_square(5, masks=True), torch.float32)
    wanted = [inputs["patches"], inputs["tokens"]]

    def run(patches: Tensor, tokens: Tensor) -> Tensor:
        rest = inputs | {"patches": patches * 2.0, "tokens": tokens}
        image, text = (F.normalize(x[:, 0], dim=-1) for x in (patches, tokens))
        local = token_knowledge_patch_loss(**rest, logit_scale=10.0)
        return local + info_nce_loss(image, text, 10.0)

    truth = run(*wanted)
    value = torch.compile(run, backend="eager")(*wanted)
    assert relative_error(value, truth) <= 1e-6
    grads = [torch.autograd.grad(x, wanted) for x in (value, truth)]
    for got, want in zip(*grads, strict=True):
        assert relative_error(got, want) <= 1e-6


def test_a_scale_that_the_options_do_not_use_gets_gradient_zero() -> None:
    inputs = leaves(_square(7))
    unused = torch.tensor(5.0, dtype=torch.float64, requires_grad=True)
    value = token_knowledge_patch_loss(**inputs, logit_scale=10.0, aggregation_scale=unused)
    assert gradients(value, {"unused": unused})["unused"].item() == 0.0


def test_info_nce_is_exact_at_logit_scale_100() -> None:
    g = torch.Generator().manual_seed(0)
    made = [
        F.normalize(torch.randn(40, 16, generator=g, dtype=torch.float64), dim=-1) for _ in "xy"
    ]
    results = []
    for dtype in (torch.float32, torch.float64):
        rows = [x.float().to(dtype).requires_grad_() for x in made]
        value = info_nce_loss(rows[0], rows[1], 100.0)
        results.append([value, *torch.autograd.grad(value, rows)])
    for got, want in zip(*results, strict=True):
        assert relative_error(got, want) <= 1e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": torch.zeros(4, 6, 8, device="meta")}, "tokens on cpu"),
        ({"token_weights": torch.ones(4, 6, device="meta")}, "token_weights on cpu"),
        ({"patch_mask": torch.ones(4, 5, device="meta").bool()}, "patch_mask on cpu"),
        ({"pair_ids": torch.zeros(4, dtype=torch.int64, device="meta")}, "pair_ids .* on cpu"),
        ({"logit_scale": torch.ones(2)}, "logit_scale to be a number"),
    ],
)
def test_a_wrong_argument_is_named(change: dict[str, Any], message: str) -> None:
    arguments = {"logit_scale": 1.0} | _square()
    with pytest.raises(ValueError, match=message):
        token_knowledge_patch_loss(**(arguments | change))


TENSORS: dict[str, Any] = {
    "scores": lambda **given: contrastive_loss_from_scores(**given, logit_scale=1.0),
    "pair_ids": lambda **given: info_nce_loss(torch.eye(3), torch.eye(3), 1.0, **given),
    "text_valid": lambda **given: contrastive_loss_from_scores(
        torch.eye(3), logit_scale=1.0, **given
    ),
    "text_features": lambda **given: info_nce_loss(torch.eye(3), logit_scale=1.0, **given),
    **{
        name: lambda **given: token_knowledge_patch_loss(**_square() | given, logit_scale=1.0)
        for name in ("patches", "tokens", "knowledge", *list(SCORES)[:4])
    },
}
NEEDED = ("scores", "text_features", "patches", "tokens")


@pytest.mark.parametrize("name", TENSORS)
def test_what_is_no_tensor_is_named(name: str) -> None:
    wrong: list[Any] = [[[True] * 3] * 3, torch.eye(3).numpy()]
    if name in NEEDED:
        wrong.append(None)
    for given in wrong:
        with pytest.raises(ValueError, match=rf"expected {name} .*got (list|ndarray|NoneType)"):
            TENSORS[name](**{name: given})


def test_masks_of_pairs_must_be_boolean_and_batches_not_empty() -> None:
    with pytest.raises(ValueError, match="image_valid torch.bool"):
        contrastive_loss_from_scores(torch.eye(3), logit_scale=1.0, image_valid=torch.ones(3))
    with pytest.raises(ValueError, match="skip the loss of an empty batch"):
        info_nce_loss(torch.zeros(0, 4), torch.zeros(0, 4), 1.0)


def test_gradients_of_float16_features_survive_a_grad_scaler() -> None:
    """Oracle: float64 of the same rounded features."""
    got, want = scaled_half_gradients("torch", 2.0**10)
    for name in want:
        assert torch.isfinite(got[name]).all()
        assert relative_error(got[name], want[name]) <= 2e-3, name


def test_a_loss_that_overflows_float16_is_a_step_that_the_grad_scaler_skips() -> None:
    got, _ = scaled_half_gradients("torch", 2.0**40)
    assert not all(torch.isfinite(grad).all() for grad in got.values())


@pytest.mark.parametrize("pooling", ["attention", "max"])
def test_a_loss_leaves_no_tensor_to_the_collector_of_circles(pooling: str) -> None:
    """In a loop of days each would stay: young passes free it only while nothing else asks."""
    local, clip = TokenKnowledgePatchLoss(pooling=pooling), ClipLoss()

    def step() -> None:
        inputs = leaves(_square(), torch.float32)
        scale = torch.tensor(10.0, requires_grad=True)
        rows, columns = (torch.randn(4, 8, requires_grad=True) for _ in range(2))
        (local(**inputs) + clip(rows, columns, scale)).backward()

    assert tensors_in_circles(step) == []
