"""Options handed to transformers: what it would keep silently or refuse unnamed is said by key."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import BertConfig, BertModel, PretrainedConfig, ResNetConfig, ViTConfig, ViTModel

from mlip.encoders.options import build_tower, tower_config


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        (ResNetConfig, {"hidden_size": 12}, "no option 'hidden_size'; the nearest is 'hidden_s"),
        (BertConfig, {"hiden_size": 12}, "no option 'hiden_size'; the nearest is 'hidden_size'"),
        (ViTConfig, {"drop_path_rate": 0.1}, "no option 'drop_path_rate'"),
        (ViTConfig, {"num_channels": 3}, "num_channels follows from data.channels"),
        (BertConfig, {"vocab_size": 30522}, "vocab_size follows from the tokenizer"),
        (ResNetConfig, {"layer_type": "wide"}, "refuses these values"),
        (BertConfig, {"hidden_size": "wide"}, "refuses these values"),
    ],
)
def test_an_option_that_cannot_be_honoured_names_the_setting(
    kind: type[PretrainedConfig], options: dict[str, Any], expected: str
) -> None:
    with pytest.raises(ValueError, match=f"model.text.options: .*{expected}"):
        tower_config(kind, "model.text.options", options)


@pytest.mark.parametrize(
    ("model", "kind", "options"),
    [
        (ViTModel, ViTConfig, {"hidden_act": "nope"}),
        (BertModel, BertConfig, {"num_attention_heads": 0}),
        (BertModel, BertConfig, {"pad_token_id": 100000}),
    ],
)
def test_values_that_no_tower_can_have_name_the_setting(
    model: Any, kind: type[PretrainedConfig], options: dict[str, Any]
) -> None:
    given = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1} | options
    with pytest.raises(ValueError, match="^model.x.options: "):
        build_tower(lambda: model(tower_config(kind, "model.x.options", given)), "model.x.options")


def test_options_win_over_defaults_and_keep_their_values() -> None:
    made = tower_config(ViTConfig, "key", {"hidden_size": 48, "patch_size": 8}, num_channels=1)
    assert (made.hidden_size, made.patch_size, made.num_channels) == (48, 8, 1)
