"""Objective: weights, what weight 0 skips, what run.exact refuses."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn as nn
from torch import Tensor

from mlip import objective as objective_module
from mlip.losses import LOSSES
from mlip.objective import Objective
from mlip.settings.config import ConfigError
from tests.losses.loss_inputs import FakeModel, config_of, make_batch

NO_LOSS = [f"loss.{name}.weight=0" for name in LOSSES]
TERMS = ["global_contrastive", "local_alignment", "category", "matching", "swapping", "divergence"]


def _make(*overrides: str) -> Objective:
    torch.manual_seed(0)
    return Objective(config_of(*overrides), FakeModel())


def _run(objective: Objective) -> tuple[Tensor, dict[str, Tensor]]:
    return objective(make_batch(), step=3, progress=1.5)


def test_total_is_the_weighted_sum_of_its_terms() -> None:
    weights = {"global_contrastive": 1.5, "local_alignment": 0.5, "category": 0.25,
               "matching": 2.0, "swapping": 3.0, "divergence": 1.0}  # fmt: skip
    objective = _make(*(f"loss.{n}.weight={w}" for n, w in weights.items() if n != "divergence"))
    total, terms = _run(objective)
    assert list(terms) == TERMS
    assert not any(value.requires_grad for value in terms.values())
    expected = sum(weights[name] * value for name, value in terms.items())
    torch.testing.assert_close(total.detach(), expected)
    assert total.dtype == torch.float32 and total.requires_grad


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_alone_keeps_its_value_and_the_others_are_not_even_built(name: str) -> None:
    on = f"loss.{name}.weight=1"  # a loss may be off by default
    objective = _make(*(o for o in NO_LOSS if f".{name}." not in o), on)
    assert list(objective.losses) == [name]
    objective.losses.load_state_dict(_make(on).losses.state_dict(), strict=False)
    _, terms = _run(objective)
    whole = _make(on)
    _, all_terms = _run(whole)
    assert set(terms) == ({name, "divergence"} if name == "global_contrastive" else {name})
    for term, value in terms.items():
        torch.testing.assert_close(value, all_terms[term])


def test_no_local_scores_are_computed_where_no_loss_wants_them() -> None:
    objective = _make("loss.local_alignment.weight=0", "loss.swapping.local_share=0")

    def refuse(*args: Any, **kwargs: Any) -> Tensor:
        raise AssertionError("local scores were computed")

    objective.model.local_scores = refuse
    total, _ = _run(objective)
    assert bool(total.isfinite())


def test_draws_are_made_before_the_local_scores_and_for_their_own_loss(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With several ranks the host reads their number: until then a GPU has the scores to do."""
    objective, told = _make(), []
    drawn = objective.losses["matching"].prepare
    scores = objective.model.local_scores

    def prepare(context: Any) -> Any:
        told.append("draws")
        return drawn(context)

    def local_scores(*args: Any, **kwargs: Any) -> Tensor:
        told.append("scores")
        return scores(*args, **kwargs)

    monkeypatch.setattr(objective.losses["matching"], "prepare", prepare)
    monkeypatch.setattr(objective.model, "local_scores", local_scores)
    _run(objective)
    assert told == ["draws", "scores"]  # once: the loss takes what was prepared


def test_with_everything_off_but_the_global_loss_it_is_clip() -> None:
    overrides = [o for o in NO_LOSS if "global" not in o]
    objective = _make(*overrides, "model.divergence.kind=none")
    total, terms = _run(objective)
    batch = make_batch()
    image = objective.model.encode_image(batch.image).embedding
    text = objective.model.encode_text(
        batch.token_ids, batch.token_mask, batch.content_mask
    ).embedding
    logits = 5.0 * image @ text.T
    same = batch.pair_id[:, None] == batch.pair_id[None, :]
    logits = logits.masked_fill(same & ~torch.eye(len(batch), dtype=torch.bool), -torch.inf)
    target = torch.arange(len(batch))
    cross_entropy = nn.functional.cross_entropy
    expected = 0.5 * (cross_entropy(logits, target) + cross_entropy(logits.T, target))
    assert list(terms) == ["global_contrastive"]
    torch.testing.assert_close(total, expected)


def test_losses_are_given_the_runs_seed_and_the_place_in_the_run() -> None:
    context = _make("run.seed=7").context(make_batch(), step=3, progress=0.25)
    assert (context.seed, context.step, context.progress) == (7, 3, 0.25)


@torch.no_grad()
@pytest.mark.parametrize("sizes", [([2, 2, 2, 2, 1], [3, 3, 3]), ([9], [3, 3, 3]), ([9], [9])])
def test_each_tower_runs_in_micro_batches_of_its_own_size_and_its_attention_is_kept(
    sizes: tuple[list[int], list[int]],
) -> None:
    micro = [0 if len(passes) == 1 else passes[0] for passes in sizes]
    settings = (f"batch.micro_images={micro[0]}", f"batch.micro_texts={micro[1]}")
    objective = _make("model.vision.norm=group", *settings)
    model, seen = objective.model, ([], [])
    encode_image, encode_text = model.encode_image, model.encode_text

    def images(image: Tensor) -> Any:
        seen[0].append(len(image))
        return encode_image(image)

    def texts(ids: Tensor, *masks: Tensor) -> Any:
        seen[1].append(len(ids))
        return dataclasses.replace(encode_text(ids, *masks), attention=ids.float())

    model.encode_image, model.encode_text = images, texts
    batch = make_batch()
    found = objective.encode(batch)
    assert seen == sizes
    # else token_weights=attention would weigh all tokens alike, without a word
    assert torch.equal(found.text.attention, batch.token_ids.float())


def test_what_a_rank_adds_to_be_as_wide_as_the_widest_is_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    objective, batch = _make(), make_batch()
    features = objective.encode(batch)
    text = dataclasses.replace(features.text, attention=batch.token_ids.float())
    width, mentions = batch.content_mask.shape[1], batch.entity_mask.shape[1]
    for more in ((2, 0), (0, 3), (1, 1)):
        wide = [width + more[0], mentions + more[1]]
        monkeypatch.setattr(objective_module, "max_of_numbers", lambda own, wide=wide: wide)
        whole, shown, knowledge = objective_module._equal_widths(
            text, batch.content_mask, features.knowledge
        )
        for plain, padded, size in (
            (text.tokens, whole.tokens, wide[0]),
            (text.attention, whole.attention, wide[0]),
            (batch.content_mask, shown, wide[0]),
            (features.knowledge.entities, knowledge.entities, wide[1]),
            (features.knowledge.mask, knowledge.mask, wide[1]),
            (features.knowledge.row_weights, knowledge.row_weights, wide[1]),
        ):
            assert padded.shape[1] == size and not padded[:, plain.shape[1] :].any()
            assert torch.equal(padded[:, : plain.shape[1]], plain)


def test_no_loss_at_all_is_refused() -> None:
    with pytest.raises(ConfigError, match="weight is 0"):
        _make(*NO_LOSS)


def test_a_step_repeats_bit_for_bit_and_the_next_step_draws_anew() -> None:
    objective = _make("loss.category.weight=0")
    torch.manual_seed(1)
    first, _ = _run(objective)
    torch.manual_seed(2)
    again, _ = _run(objective)
    assert torch.equal(first, again)
    other, _ = objective(make_batch(), step=4, progress=1.5)
    assert not torch.equal(first, other)


def test_losses_stay_float32_under_autocast() -> None:
    # oracle: bf16 has 8 bits; autocast around the call may change the towers, not the losses, so
    # with features given in float32 the value is the same to float32 rounding
    objective = _make()
    features = objective.encode(make_batch())
    objective.encode = lambda batch: features
    objective.eval()
    plain, _ = _run(objective)
    with torch.autocast("cpu", torch.bfloat16):
        cast, _ = _run(objective)
    torch.testing.assert_close(cast, plain, rtol=1e-6, atol=0.0)


class _Dropping(FakeModel):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.text = nn.Sequential(module)


class _DropPath(nn.Module):
    drop_prob = 0.1


class _AttentionWithDropout(nn.Module):
    attention_dropout = 0.1


@pytest.mark.parametrize("module", [nn.Dropout(0.1), _DropPath(), _AttentionWithDropout()])
def test_exact_refuses_a_tower_that_drops_at_random_and_names_the_setting(
    module: nn.Module,
) -> None:
    with pytest.raises(ConfigError, match="text.0 .*model.text.options"):
        Objective(config_of("run.exact=true"), _Dropping(module))
    Objective(config_of(), _Dropping(module))
    Objective(config_of("run.exact=true"), _Dropping(nn.Dropout(0.0)))


def test_a_report_without_text_leaves_every_parameter_gradient_finite() -> None:
    batch = make_batch()
    nothing = {name: torch.zeros_like(getattr(batch, name))
               for name in ("content_mask", "entity_mask")}  # fmt: skip
    objective = _make()
    total, terms = objective(dataclasses.replace(batch, **nothing), step=0, progress=2.0)
    total.backward()
    assert float(terms["local_alignment"]) == float(terms["matching"]) == 0.0
    for name, parameter in objective.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.isfinite().all()), name


def test_a_damaged_image_gives_a_total_that_is_not_finite_and_no_crash() -> None:
    # the engine skips such a step; it can only do so if the losses hand the NaN on
    objective, batch = _make(), make_batch()
    image = batch.image.clone()
    image[2] = torch.nan
    total, terms = objective(dataclasses.replace(batch, image=image), step=0, progress=2.0)
    assert not bool(total.isfinite())
    total.backward()
    after, _ = _run(objective)
    assert bool(after.isfinite())


def test_parameters_cast_to_bf16_give_nearly_the_same_terms_in_float32() -> None:
    # DeepSpeed's bf16 mode casts the whole module; tolerance: 8 bits through two towers and heads
    objective, batch = _make(), make_batch()
    _, terms = objective.eval()(batch, step=3, progress=1.5)
    objective.bfloat16()
    cast_batch = dataclasses.replace(batch, image=batch.image.bfloat16())
    total, cast = objective.train()(cast_batch, step=3, progress=1.5)
    total.backward()
    assert total.dtype == torch.float32
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in objective.parameters())
    assert float(objective.losses["category"].queue[0].float().abs().max()) > 0
    for name in ("local_alignment", "category", "matching"):
        torch.testing.assert_close(cast[name], terms[name], rtol=0.05, atol=0.0)
