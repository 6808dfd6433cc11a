"""Two gloo ranks with uneven shares give what one process gives on all pairs.

Oracle: the same op in one process, float64. Every input's gradient is W times the true one, and
the mean over ranks of a shared scalar's gradient is the true one. The ranks are spawned once.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from mlip.kernels._distributed import gather_rows
from mlip.kernels.info_nce import ClipLoss, info_nce_loss, info_nce_views_loss
from mlip.kernels.token_knowledge_patch import (
    contrastive_loss_from_scores,
    token_knowledge_patch_loss,
    token_knowledge_patch_scores,
)
from tests.kernels.oracle import make_inputs, relative_error
from tests.spawned_ranks import results_of_ranks, save_result

WORLD, SHARES = 2, (4, 2)
SCALARS = {
    "attention_scale": 7.0,
    "knowledge_scale": 6.0,
    "knowledge_gain": 0.4,
    "aggregation_scale": 4.0,
    "logit_scale": 14.3,
}
CASES: dict[str, dict[str, Any]] = {
    "attention_mean": {},
    "attention_lse": {"aggregation": "lse"},
    "context_mean": {"pooling": "context"},
    "max_lse": {"pooling": "max", "aggregation": "lse"},
}


def _inputs() -> dict[str, Any]:
    inputs = make_inputs(6, 6, seed=41)
    inputs["knowledge_mask"][-1] = False  # a text without any row, on the last rank
    inputs["pair_ids"] = torch.tensor([3, 8, 1, 5, 3, 8])  # equal ids on different ranks
    return inputs


def _leaves(rows: slice, dtype: torch.dtype) -> dict[str, Any]:
    made = {name: value[rows].clone() for name, value in _inputs().items()}
    for name, value in made.items():
        if value.is_floating_point():
            made[name] = value.to(dtype).requires_grad_()
    for name, value in SCALARS.items():
        made[name] = torch.tensor(value, dtype=dtype, requires_grad=True)
    return made


def _collect(loss: Tensor, made: dict[str, Tensor]) -> dict[str, Any]:
    loss.backward()
    out = {"value": loss.detach()}
    for name, value in made.items():
        if value.requires_grad:
            out[name] = torch.zeros_like(value) if value.grad is None else value.grad
    return out


def _run(
    case: str, rows: slice, group: Any, impl: str = "torch", dtype: torch.dtype = torch.float64
) -> dict[str, Any]:
    made = _leaves(rows, dtype)
    if case == "info_nce":
        ids, scale = made["pair_ids"], made["logit_scale"]
        features = {"image": made["patches"][:, 0].detach(), "text": made["tokens"][:, 0].detach()}
        features = {k: torch.nn.functional.normalize(v, dim=-1) for k, v in features.items()}
        made = {k: v.requires_grad_() for k, v in features.items()} | {"scale": scale}
        loss = info_nce_loss(
            made["image"], made["text"], scale, pair_ids=ids, group=group, impl=impl
        )
        return _collect(loss, made)
    if case == "info_nce_views":
        ids, scale = made["pair_ids"], made["logit_scale"]
        views = {f"image{i}": made["patches"][:, i].detach() for i in range(2)}
        views |= {f"text{i}": made["tokens"][:, i].detach() for i in range(2)}
        made = {
            k: torch.nn.functional.normalize(v, dim=-1).requires_grad_() for k, v in views.items()
        }
        images, texts = [made["image0"], made["image1"]], [made["text0"], made["text1"]]
        made["scale"] = scale
        loss = info_nce_views_loss(images, texts, scale, pair_ids=ids, group=group, impl=impl)
        return _collect(loss, made)
    if case == "two_losses":
        ids, scale = made.pop("pair_ids"), made.pop("logit_scale")
        s = token_knowledge_patch_scores(**made, group=group)
        made["logit_scale"] = scale
        loss = contrastive_loss_from_scores(s, logit_scale=scale, pair_ids=ids, group=group)
        return _collect(loss * 3.0, made)
    loss = token_knowledge_patch_loss(**made, group=group, impl=impl, **CASES[case])
    return _collect(loss, made)


ALL = [*CASES, "two_losses", "info_nce", "info_nce_views"]
INTERPRETED = (
    ["attention_lse", "info_nce", "info_nce_views"] if importlib.util.find_spec("triton") else []
)


def _work(rank: int, folder: Path) -> None:
    # in this process alone, and before any kernel is imported
    os.environ["TRITON_INTERPRET"] = "1"
    start = sum(SHARES[:rank])
    rows = slice(start, start + SHARES[rank])
    results: dict[str, Any] = {case: _run(case, rows, dist.group.WORLD) for case in ALL}
    for case in INTERPRETED:
        results[f"triton_{case}"] = _run(
            case, rows, dist.group.WORLD, impl="triton", dtype=torch.float32
        )
    unit = torch.nn.functional.normalize(_inputs()["patches"][:, 0], dim=-1)[
        3 * rank : 3 * rank + 3
    ]
    text = torch.nn.functional.normalize(_inputs()["tokens"][:, 0], dim=-1)[3 * rank : 3 * rank + 3]
    clip = ClipLoss(gather_with_grad=True, rank=rank, world_size=WORLD)
    results["clip"] = clip(unit, text, 14.3).item()
    results["clip logits"] = [_by_logits(local_loss, rank, unit, text) for local_loss in (0, 1)]
    results["refused"] = _refused(rank)
    try:
        gather_rows(torch.zeros(2, 3 + rank), dist.group.WORLD)
        results["ragged"] = "accepted"
    except ValueError as error:
        results["ragged"] = str(error)
    results["some ranks"] = [_on_some_ranks(name, rank) for name in OPTIONAL]
    results["no pair"] = _without_pairs(rank)
    results["other branch"] = _gradient_of_another_branch()
    results["three ranks"] = _clip_of_three_ranks()
    save_result(results, rank, folder)


def _by_logits(local_loss: int, rank: int, image: Tensor, text: Tensor) -> float:
    clip = ClipLoss(bool(local_loss), gather_with_grad=True, rank=rank, world_size=WORLD)
    logits = clip.get_logits(image, text, 14.3)
    labels = clip.get_ground_truth(image.device, len(logits[0]))
    return sum(torch.nn.functional.cross_entropy(side, labels).item() for side in logits) / 2


def _refused(rank: int) -> list[str]:
    rows = slice(4 * rank, 4 + 2 * rank)  # 4 and 2 pairs
    image, text = (
        torch.nn.functional.normalize(_inputs()[k][rows, 0], dim=-1).requires_grad_()
        for k in ("patches", "tokens")
    )
    said = []
    clip = ClipLoss(True, gather_with_grad=True, rank=rank, world_size=WORLD)
    try:
        clip.get_logits(image, text, 14.3)
    except ValueError as error:
        said.append(str(error))
    clip.local_loss = False
    logits, _ = clip.get_logits(image, text, 14.3)
    (grad,) = torch.autograd.grad(logits.logsumexp(1).sum(), [image], create_graph=True)
    try:
        grad.square().sum().backward()
    except RuntimeError as error:
        said.append(str(error))
    return said


OPTIONAL = ("pair_ids", "patch_mask", "token_weights")


def _on_some_ranks(name: str, rank: int) -> str:
    made = {k: v[3 * rank : 3 * rank + 3] for k, v in _inputs().items()}
    made = {k: v for k, v in made.items() if k in (*OPTIONAL, "patches", "tokens")}
    if rank == 1:
        del made[name]
    try:
        token_knowledge_patch_loss(**made, logit_scale=10.0, group=dist.group.WORLD)
    except ValueError as error:
        return str(error)
    return "accepted"


def _first_rows(rows: slice, group: Any) -> dict[str, Any]:
    made = {
        k: torch.nn.functional.normalize(_inputs()[k][rows, 0], dim=-1).requires_grad_()
        for k in ("patches", "tokens")
    }
    return _collect(info_nce_loss(made["patches"], made["tokens"], 14.3, group=group), made)


def _without_pairs(rank: int) -> dict[str, Any]:
    return _first_rows(slice(0, 6 * (1 - rank)), dist.group.WORLD)


def _gradient_of_another_branch() -> Tensor:
    """Autograd gives both addends one tensor, which the exchange must leave as it is."""
    own, others = torch.zeros(2, 3, requires_grad=True), torch.zeros(4, 3, requires_grad=True)
    total = others + gather_rows(own, dist.group.WORLD)
    grads = torch.autograd.grad(total, [own, others], torch.ones(4, 3))
    return torch.stack([grad.sum() for grad in grads])


def _clip_of_three_ranks() -> str:
    clip = ClipLoss(gather_with_grad=True, world_size=3)
    try:
        clip(torch.eye(2), torch.eye(2), 1.0)
    except ValueError as error:
        return str(error)
    return "accepted"


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return results_of_ranks(_work, tmp_path_factory.mktemp("ranks"), WORLD, is_fresh=True)


def _assert_one_process(
    parts: list[dict[str, Any]], truth: dict[str, Any], tolerance: float
) -> None:
    for part in parts:
        assert torch.equal(part["value"], parts[0]["value"])
        assert part["value"].item() == pytest.approx(truth["value"].item(), rel=tolerance)
    for name, want in truth.items():
        if name == "value":
            continue
        if want.ndim == 0:
            got = torch.stack([part[name] for part in parts]).mean(0)
        else:
            got = torch.cat([part[name] for part in parts]) / WORLD
        assert relative_error(got, want) <= tolerance, name


@pytest.mark.parametrize("case", ALL)
def test_two_ranks_give_the_loss_and_gradients_of_one_process(
    case: str, ranks: list[dict[str, Any]]
) -> None:
    truth = _run(case, slice(0, sum(SHARES)), None)
    _assert_one_process([part[case] for part in ranks], truth, 1e-11)


@pytest.mark.parametrize("case", INTERPRETED)
def test_two_ranks_of_triton_kernels_give_what_one_process_gives(
    case: str, ranks: list[dict[str, Any]]
) -> None:
    truth = _run(case, slice(0, sum(SHARES)), None)
    _assert_one_process([part[f"triton_{case}"] for part in ranks], truth, 1e-5)


def test_clip_loss_over_ranks_is_the_loss_of_the_whole_batch(ranks: list[dict[str, Any]]) -> None:
    image, text = (
        torch.nn.functional.normalize(_inputs()[k][:, 0], dim=-1) for k in ("patches", "tokens")
    )
    want = info_nce_loss(image, text, 14.3).item()
    assert [part["clip"] for part in ranks] == pytest.approx([want, want], rel=1e-12)
    whole, own = zip(*(part["clip logits"] for part in ranks), strict=True)
    assert whole == pytest.approx([want, want], rel=1e-12)
    assert sum(own) / WORLD == pytest.approx(want, rel=1e-12)


def test_labels_of_uneven_ranks_and_a_second_derivative_of_logits_are_refused(
    ranks: list[dict[str, Any]],
) -> None:
    """Both were wrong without a word: the labels of rank 1 by three columns, the derivative by
    what the other ranks' logits add to it."""
    for part in ranks:
        labels, derivative = part["refused"]
        assert "expected as many pairs on every rank with local_loss=True, got [4, 2]" in labels
        assert "no second derivative" in derivative


def test_ranks_with_different_lengths_are_told_to_pad(ranks: list[dict[str, Any]]) -> None:
    for part in ranks:
        assert "pad tokens and entities to a fixed length" in part["ragged"]


def test_masks_and_ids_on_some_ranks_alone_are_refused(ranks: list[dict[str, Any]]) -> None:
    words = ("pair_ids", "image_valid", "text_valid")  # a loss makes the latter two of its masks
    for part in ranks:
        for word, message in zip(words, part["some ranks"], strict=True):
            assert f"expected {word}" in message and "on every rank or on none" in message


def test_a_rank_may_have_no_pair_in_info_nce_alone(ranks: list[dict[str, Any]]) -> None:
    _assert_one_process([part["no pair"] for part in ranks], _first_rows(slice(0, 6), None), 1e-12)
    none = torch.zeros(0, 3, 8)
    with pytest.raises(ValueError, match="skip the loss of an empty batch"):
        token_knowledge_patch_loss(none, none, logit_scale=1.0)


def test_an_exchange_leaves_the_gradient_that_came_as_it_is(ranks: list[dict[str, Any]]) -> None:
    assert all(part["other branch"].tolist() == [2 * 2 * 3.0, 4 * 3.0] for part in ranks)


def test_clip_loss_of_another_number_of_ranks_is_refused(ranks: list[dict[str, Any]]) -> None:
    assert all("initialised process group of 3 ranks" in part["three ranks"] for part in ranks)


def test_a_group_needs_torch_distributed() -> None:
    with pytest.raises(ValueError, match="init_process_group"):
        info_nce_loss(torch.eye(2), torch.eye(2), 1.0, group=object())
