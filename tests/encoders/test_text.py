"""Text tower: padding changes nothing, token weights are the last layer's attention, names once."""

from __future__ import annotations

import pytest
import torch

from mlip.config import Text
from mlip.encoders.text import TextEncoder, token_states

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
