"""Text tower: padding changes nothing, token weights are the last layer's attention, names once."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mlip.encoders.text import TextEncoder, token_states
from mlip.settings.config import Text

OPTIONS = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}


def _encoder(attention: str = "sdpa") -> TextEncoder:
    torch.manual_seed(0)
    settings = Text(options=OPTIONS)
    return TextEncoder(
        settings, vocab_size=50, max_tokens=12, attention=attention, keeps_attention=True
    ).eval()


def _tokens() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    mask = torch.tensor([[True] * 8, [True] * 5 + [False] * 3])
    return torch.randint(5, 50, (2, 8)), mask


def test_padding_does_not_change_a_report() -> None:
    encoder = _encoder()
    ids, mask = _tokens()
    longer = torch.nn.functional.pad(ids, (0, 4), value=7)
    wide = torch.nn.functional.pad(mask, (0, 4), value=False)
    pooled, states, attention = encoder(ids, mask)
    pooled_2, states_2, attention_2 = encoder(longer, wide)
    torch.testing.assert_close(pooled, pooled_2, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(states[mask], states_2[wide], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(attention, attention_2[:, :8], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager", "varlen"])
def test_packed_reports_give_the_states_and_gradients_of_padded_ones(
    attention: str, checkpointing: bool
) -> None:
    results = []
    mask = torch.arange(12) < torch.tensor([12, 2, 7])[:, None]
    ids = torch.randint(5, 50, mask.shape, generator=torch.Generator().manual_seed(2))
    for packed in (False, True):
        torch.manual_seed(0)
        options = OPTIONS | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        encoder = TextEncoder(
            Text(options=options, packed=packed, checkpointing=checkpointing, pool="attention"),
            vocab_size=50,
            max_tokens=12,
            attention=attention,
            keeps_attention=True,
        ).double()
        pooled, states, attended = encoder(ids, mask)
        assert attended is not None and states.shape == (3, 12, 16)
        (pooled.square().sum() + states[mask].pow(3).sum()).backward()
        gradients = [p.grad for p in encoder.parameters() if p.grad is not None]
        results.append([pooled, states[mask], attended, *gradients])
    assert len(results[0]) == len(results[1]) > 30
    for padded, without in zip(*results, strict=True):
        torch.testing.assert_close(without, padded, rtol=1e-10, atol=1e-11)


def test_packed_reports_cost_as_much_as_they_hold() -> None:
    mask = torch.arange(12) < torch.tensor([12, 3, 3, 6])[:, None]  # half of it is real
    counts = []
    for packed in (False, True):
        encoder = TextEncoder(Text(options=OPTIONS, packed=packed), vocab_size=50, max_tokens=12)
        with FlopCounterMode(display=False) as counter:
            encoder(torch.full(mask.shape, 7), mask)
        counts.append(counter.get_flop_counts()["Global"][torch.ops.aten.addmm])
    assert counts[1] * 2 == counts[0] > 0


def test_kept_attention_is_the_cls_row_of_the_last_layers_softmax() -> None:
    encoder = _encoder()
    ids, mask = _tokens()
    seen = {}
    layer = encoder.backbone.encoder.layer[-1].attention.self
    layer.register_forward_hook(
        lambda module, args, kwargs, out: seen.update(
            x=args[0] if args else kwargs["hidden_states"]
        ),
        with_kwargs=True,
    )
    _, _, attention = encoder(ids, mask)
    heads, width = 2, 8
    query = layer.query(seen["x"])[:, 0].view(2, heads, width)
    key = layer.key(seen["x"]).view(2, 8, heads, width)
    scores = torch.einsum("bhd,bthd->bht", query, key) / width**0.5
    truth = scores.masked_fill(~mask[:, None], -torch.inf).softmax(-1).mean(1)
    torch.testing.assert_close(attention, truth, rtol=1e-5, atol=1e-6)
    assert not attention.requires_grad


def test_eager_and_sdpa_towers_agree() -> None:
    ids, mask = _tokens()
    left, right = _encoder("sdpa")(ids, mask), _encoder("eager")(ids, mask)
    torch.testing.assert_close(left[1][mask], right[1][mask], rtol=1e-5, atol=1e-5)


def test_every_parameter_is_saved_under_one_name() -> None:
    encoder = _encoder()
    assert len(encoder.state_dict()) == len(encoder.backbone.state_dict())


def test_token_states_average_real_tokens_only() -> None:
    encoder = _encoder()
    ids, mask = _tokens()
    _, states, _ = encoder(ids, mask)
    torch.testing.assert_close(token_states(encoder, ids, mask)[1], states[1, :5].mean(0))


def test_more_tokens_than_positions_is_refused() -> None:
    with pytest.raises(ValueError, match="data.max_tokens=20"):
        TextEncoder(
            Text(options={**OPTIONS, "max_position_embeddings": 12}), vocab_size=50, max_tokens=20
        )


def test_a_width_that_attention_pooling_cannot_share_out_is_refused() -> None:
    settings = Text(options=OPTIONS | {"hidden_size": 20}, pool="attention")
    with pytest.raises(ValueError, match="8 heads do not divide 20 channels; change the tower"):
        TextEncoder(settings, vocab_size=50, max_tokens=12)
