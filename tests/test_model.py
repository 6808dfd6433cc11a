"""MLIPModel: the switches of the local score that belong to the model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mlip.batch import ABSENT, PRESENT, UNCERTAIN
from mlip.encoders import text, vision
from mlip.encoders.residual import RoundedLayerNorm
from mlip.kernels.token_knowledge_patch import token_knowledge_patch_scores
from mlip.model import MLIPModel
from mlip.settings.config import load

TINY = (
    "data.channels=1",
    "data.resize_px=64",
    "data.crop_px=64",
    "model.embed_dim=16",
    "model.heads.hidden=16",
    "model.vision.options={embedding_size: 8, hidden_sizes: [8, 16], depths: [1, 1],"
    " layer_type: basic}",
    "model.vision.patch_stage=1",
    "model.text.options={hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2,"
    " intermediate_size: 16}",
)


def _make(*overrides: str) -> MLIPModel:
    torch.manual_seed(0)
    config = load([], [*TINY, *overrides])
    return MLIPModel(config, vocab_size=40, concept_vectors=torch.randn(6, 12)).eval()


@pytest.mark.parametrize(("gain", "share"), [(0.0, 0.0), (0.5, 0.0), (0.0, 0.25)])
def test_a_gain_of_zero_and_a_share_of_zero_keep_knowledge_out_for_good(
    gain: float, share: float
) -> None:
    local = "loss.local_alignment"
    model = _make(f"{local}.knowledge_gain={gain}", f"{local}.knowledge_share={share}")
    # a gain of 0 is a switch: a learned one would come back after the first step
    assert model.scales.stored["knowledge_gain"].requires_grad == (gain > 0)
    mask = torch.ones(2, 5, dtype=torch.bool)
    ids, state = torch.tensor([[0, 1], [2, 3]]), torch.zeros(2, 2, dtype=torch.long)
    knowledge = model.encode_knowledge(ids, state, torch.ones(2, 2, dtype=torch.bool))
    patches, tokens = torch.randn(2, 4, 16), torch.randn(2, 5, 16)
    with_it = model.local_scores(patches, tokens, mask, None, knowledge)
    without = model.local_scores(patches, tokens, mask, None, None)
    assert torch.equal(with_it, without) == (gain == 0 and share == 0)
    # oracle: method.md's s, 1 for a present mention; switched off no mention is a row, so that a
    # report of mentions alone is empty and not an anchor whose score is always 0
    assert knowledge.row_weights.tolist() == [[float(gain + share > 0)] * 2] * 2


@pytest.mark.parametrize(("pooling", "aggregation"), [("max", "mean"), ("context", "lse")])
@pytest.mark.parametrize("is_learned", [False, True])
@torch.no_grad()
def test_every_setting_of_the_local_score_reaches_the_kernel(
    pooling: str, aggregation: str, is_learned: bool
) -> None:
    # oracle: the kernel, given the numbers of this test
    numbers: dict[str, Any] = {"attention_scale": 7.0, "knowledge_scale": 3.0}
    numbers |= {"knowledge_gain": 0.3, "aggregation_scale": 4.0}
    settings: dict[str, Any] = {
        "pooling": pooling,
        "aggregation": aggregation,
        "knowledge_share": 0.2,
    }
    named = {**numbers, **settings, "learn_scales": is_learned}
    model = _make(
        *(f"loss.local_alignment.{name}={value}" for name, value in named.items()),
        "knowledge.weight_present=1.5",
        "knowledge.weight_absent=0.75",
        "knowledge.weight_uncertain=0.25",
    )
    for name, value in numbers.items():
        stored = model.scales.stored[name]
        assert stored.requires_grad == is_learned and float(stored) == pytest.approx(value)
        stored.mul_(1.5)  # as if trained: where nothing is learned, the settings hold
        numbers[name] = float(stored) if is_learned else value
    ids = torch.tensor([[0, 1, 2], [3, 4, 5]])
    state = torch.tensor([[PRESENT, ABSENT, UNCERTAIN]] * 2)
    shown = torch.ones(2, 3, dtype=torch.bool)
    knowledge = model.encode_knowledge(ids, state, shown)
    patches, tokens, mask = torch.randn(2, 4, 16), torch.randn(2, 5, 16), shown.new_ones(2, 5)
    expected = token_knowledge_patch_scores(
        patches,
        tokens,
        knowledge.entities,
        token_weights=mask.float(),
        knowledge_weights=torch.tensor([[1.5, 0.75, 0.25]] * 2),
        knowledge_mask=shown,
        **numbers,
        **settings,
    )
    torch.testing.assert_close(model.local_scores(patches, tokens, mask, None, knowledge), expected)
    # what the settings say is not of the weights: a file that holds it would be refused, or win
    assert "state_weights" not in model.state_dict()
    if not torch.cuda.is_available():
        forced = _make("loss.local_alignment.impl=triton")
        with pytest.raises(ValueError, match="triton"):
            forced.local_scores(patches, tokens, mask, None, None)


def test_logit_scales_are_float32_exponentials_of_whatever_is_stored() -> None:
    # oracle: exp of the stored number in float64; in bfloat16 the result would be off by 1 in 500
    scales = _make().bfloat16().scales
    for name, scale in (("log_scale", scales.logit_scale()),
                        ("log_scale_local", scales.logit_scale_local())):  # fmt: skip
        assert scale.dtype == torch.float32
        expected = scales.stored[name].detach().double().exp()[0]
        torch.testing.assert_close(scale.detach().double(), expected, rtol=1e-6, atol=0.0)


def test_attention_weights_are_clipped_to_the_reports_own_quantiles() -> None:
    # oracle: numpy's quantiles (linear between order statistics) of the real tokens of each report
    model = _make("loss.local_alignment.token_weights=attention")
    attention = torch.rand(3, 12, generator=torch.Generator().manual_seed(1))
    mask = torch.arange(12) < torch.tensor([12, 3, 0])[:, None]
    weights = model.token_weights(mask, attention.clone().requires_grad_())
    assert not weights.requires_grad
    for n, count in enumerate((12, 3)):
        shown = attention[n, :count].numpy()
        expected = np.clip(shown, *np.quantile(shown, [0.1, 0.9]))
        np.testing.assert_allclose(weights[n, :count].numpy(), expected, rtol=1e-6)
    assert not weights[~mask].any()


def test_attention_that_leaves_no_token_a_weight_counts_tokens_alike() -> None:
    # one token of twelve holds all of it: both quantiles are 0; [CLS] keeps all of it: all are 0.
    # Weights of 0 would take the report's gradient and leave it an anchor of score 0
    model = _make("loss.local_alignment.token_weights=attention")
    attention = torch.zeros(2, 12)
    attention[0, 3] = 1.0
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[1, 7:] = False
    assert torch.equal(model.token_weights(mask, attention), mask.float())


def test_batch_norm_of_the_token_head_sees_the_reports_own_tokens_alone() -> None:
    # [CLS], [SEP] and padding are no tokens of the report: to the norm they are zero, so that what
    # is left of them is the bias of the last layer
    model = _make("model.heads.norm=batch").train()
    ids, shown = torch.arange(14).view(2, 7) + 5, torch.ones(2, 7, dtype=torch.bool)
    content = shown.clone()
    content[:, 0] = content[0, 6] = content[1, 3:] = False
    tokens = model.encode_text(ids, shown, content).tokens
    bias = model.token_head.second.bias
    torch.testing.assert_close(tokens[~content], bias.expand(7, 16))
    assert bool((tokens[content] - bias).abs().amax(dim=1).min() > 1e-3)


@torch.no_grad()
def test_scales_start_as_clips_and_are_kept_in_their_bounds() -> None:
    # oracle: 1 / 0.07 and at most 100 (Radford et al. 2021, section 2.5); the others ours
    scales = _make().scales
    logit = (scales.logit_scale, scales.logit_scale_local)
    assert [float(scale()) for scale in logit] == pytest.approx([1 / 0.07] * 2)
    others = ("attention_scale", "knowledge_scale", "knowledge_gain", "aggregation_scale")
    bounds = ((-1e4, [0.01, 0.0, 0.0, 0.0, 0.1]), (1e4, [100.0, 200.0, 200.0, 10.0, 100.0]))
    for far, ends in bounds:
        for stored in scales.stored.values():
            stored.fill_(far)
        scales.clamp_()
        assert [float(scale()) for scale in logit] == pytest.approx([ends[0]] * 2)
        assert [float(getattr(scales, name)) for name in others] == pytest.approx(ends[1:])


def test_a_state_starts_about_as_long_as_a_concepts_vector() -> None:
    # concept vectors have unit length; a state of another length would drown them or turn nothing
    lengths = _make().state_embedding.weight.detach().norm(dim=1)
    assert bool(((lengths > 0.4) & (lengths < 1.8)).all())


def test_the_settings_of_a_run_reach_both_towers_and_the_heads() -> None:
    sizes = "hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 16"
    settings = [
        *(setting for setting in TINY if "vision" not in setting),
        "data.channels=3",
        "model.attention=eager",
        f"model.vision={{kind: vit, options: {{{sizes}, patch_size: 32}}}}",
        "train.precision=bf16",
        "train.residual=bf16",
        "loss.local_alignment.token_weights=attention",
    ]
    model = MLIPModel(load([], settings), vocab_size=40, concept_vectors=torch.randn(6, 12))
    for backbone in (model.text.backbone, model.vision.tower.backbone):
        assert backbone.config._attn_implementation == "mlip_eager"
        assert any(isinstance(module, RoundedLayerNorm) for module in backbone.modules())
    ids, shown = torch.arange(10).view(2, 5), torch.ones(2, 5, dtype=torch.bool)
    images = model.encode_image(torch.randn(2, 3, 64, 64))
    texts = model.encode_text(ids, shown, shown)
    assert images.patches.dtype == texts.tokens.dtype == torch.bfloat16
    for embedding in (images.embedding, texts.embedding):
        torch.testing.assert_close(embedding.norm(dim=1), torch.ones(2))
    assert texts.attention is not None
    # elsewhere nobody asks for it, and the layer would be computed twice
    assert _make().encode_text(ids, shown, shown).attention is None


@pytest.mark.parametrize("is_offline", [True, False])
def test_a_tower_is_looked_for_in_the_network_only_where_that_is_allowed(
    is_offline: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = []

    def load_tower(*_: object, offline: bool, **__: object) -> None:
        told.append(offline)
        raise LookupError

    for module, name in ((text, "text"), (vision, "vision")):
        monkeypatch.setattr(module, "load_tower", load_tower)
        with pytest.raises(LookupError):
            _make(f"run.offline={is_offline}", f"model.{name}={{source: org/name}}")
    assert told == [is_offline] * 2
